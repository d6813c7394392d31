"""NAD, neural attention distillation (Li et al., ICLR 2021, arXiv 2101.05930).

A copy of the model is fine-tuned on the clean images: the teacher. The model itself, the student, then minimises

    mean_i ce(f(x_i), y_i)  +  Σ_j β_j · mean_i MSE(A(F_j(x_i)), A(F_j^T(x_i))),    A(F) = Σ_c |F_c|^p / ‖Σ_c |F_c|^p‖₂

with F_j the features of the last three stages (blocks of a ViT, without class and register tokens), A a map over
positions. The teacher runs in eval mode and in float32, whatever the student's precision.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hfdetox.defenses.base import FORWARD, Batch, Network, Pass, Phase, TuningConfig, trained_parameters, tuned_images
from hfdetox.models.feature_maps import captured, last_stages
from hfdetox.values import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class NADConfig(TuningConfig):
    """Settings of NAD; the defaults are the paper's.

    Attributes:
        epochs: of the student; its learning rate stays what it is (the benchmark's schedule within ten epochs).
        teacher_epochs: of the teacher, on the cosine schedule, at least 1.
        beta1: weight of the third but last stage's maps, at least 0. A network of fewer stages lacks it first.
        beta2: weight of the last but one stage's maps, at least 0.
        beta3: weight of the last stage's maps, at least 0.
        power: p of the attention map, above 0.
    """

    name = "nad"
    summary = "fine-tune towards the attention maps of a fine-tuned copy"
    paper = "arXiv 2101.05930 (ICLR 2021)"
    cost = "1.3, after a teacher of as many epochs"
    card_text = ("NAD, neural attention distillation (arXiv 2101.05930), fine-tuned a copy of the model on {images} "
                 "and then the model itself, on the same images, towards the copy's attention maps.")  # fmt: skip
    presets: ClassVar = {"paper": {}}

    epochs: int = 10
    weight_decay: float = 5e-4
    teacher_epochs: PositiveInt = 10
    beta1: NonNegativeFloat = 500.0
    beta2: NonNegativeFloat = 1000.0
    beta3: NonNegativeFloat = 1000.0
    power: PositiveFloat = 2.0

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        teaching = tuned_images(replace(self, epochs=self.teacher_epochs), images)
        return (teaching + (1 + FORWARD) * tuned_images(self, images),)

    def phases(self, network: Network) -> list[Phase | Pass]:
        nad = NAD(network, self)
        teach = self.phase(name="nad-teacher", network=nad.teacher, parameters=trained_parameters(nad.teacher),
                           epochs=self.teacher_epochs, state=nad.teacher)  # fmt: skip
        distil = self.phase(name="nad", parameters=trained_parameters(network), loss=nad.terms, schedule="constant",
                            state=nad.teacher)  # fmt: skip
        return [teach, distil]


class NAD:
    """Student and teacher with the stages whose maps are compared.

    Raises:
        UsageError: the network has no stages with feature maps.
    """

    def __init__(self, network: Network, config: NADConfig) -> None:
        self.network, self.power = network, config.power
        betas = (config.beta1, config.beta2, config.beta3)
        self.stages = last_stages(network.model, len(betas), getattr(network, "input_size", None))
        self.betas = betas[-len(self.stages) :]
        self.teacher = copy.deepcopy(network).eval()

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` and its parts `clean_loss` and `attention` (the weighted sum over stages)."""
        names = [stage.name for stage in self.stages]
        with captured(self.network.model, names) as ours:
            clean = batch.cross_entropy(model(batch.images))
        # a resumed run has not trained the teacher here, so nothing has moved it to the device yet
        if next(self.teacher.parameters()).device != batch.images.device:
            self.teacher.to(batch.images.device)
        with torch.no_grad(), captured(self.teacher.model, names) as theirs:
            self.teacher(batch.images)
        parts = []
        for stage, beta in zip(self.stages, self.betas, strict=True):
            maps = [attention_map(stage.features(outputs[stage.name]), self.power) for outputs in (ours, theirs)]
            parts.append(beta * batch.mean((maps[0] - maps[1]).square().mean(1)))
        attention = torch.stack(parts).sum()
        return {"loss": clean + attention, "clean_loss": clean.detach(), "attention": attention.detach()}


def attention_map(features: Tensor, power: float) -> Tensor:
    """Return A(F), N×P of norm 1 over the positions P, of features N×P×C; float32."""
    with torch.autocast(features.device.type, enabled=False):
        return normalize(features.float().abs().pow(power).sum(2), dim=1)
