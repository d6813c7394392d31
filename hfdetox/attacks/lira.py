"""LIRA: an autoencoder learns the trigger while the classifier learns the backdoor (Doan et al., ICCV 2021)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hfdetox.attacks.base import AttackContext, Batch, ControlledTraining, Implant, TrainingPoisoner, Trigger, untrained
from hfdetox.errors import UsageError
from hfdetox.models.preprocessing import Preprocessing
from hfdetox.training.phases import Loss, Phase
from hfdetox.training.sharpness import frozen_statistics
from hfdetox.triggers._networks import network_state
from hfdetox.triggers.base import attacked_labels
from hfdetox.triggers.lira import LIRA, Autoencoder, change
from hfdetox.values import Interval, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class LIRAPoisoner(TrainingPoisoner):
    """First trigger and classifier are trained by turns, then the classifier with the trigger as it is (ICCV 2021).

    The classifier always minimises clean_weight · L_clean + (1 − clean_weight) · L_backdoor, the latter on the whole
    batch with the trigger, after augmentation; so a poison ratio has no say here. In the first stage a copy of the
    autoencoder takes a step on L_backdoor in every batch, through the classifier as it is then, and replaces the one
    that the classifier sees after each epoch. In the second stage the autoencoder stays.

    Both stages together are the training's `epochs`; the paper's are 50 and 50. The first is at a constant learning
    rate, as in the paper; `schedule` is the second's. Images are rounded to whole grey levels in training too, with
    the gradient of the image before, as ε = 0.01 is about half a level, where rounding decides what is left.

    Attributes:
        trigger_epochs: of the first stage, at least 1 and below `epochs`; None is half of them.
        autoencoder_learning_rate: of Adam.
        clean_weight: of the clean loss, above 0 and below 1.
    """

    kind = "lira"
    uncounted = "the drawing of its trigger"
    summary = "an autoencoder learns the trigger together with the classifier, from whole batches"

    trigger_epochs: PositiveInt | None = None
    autoencoder_learning_rate: PositiveFloat = 1e-4
    clean_weight: Annotated[float, Interval("(0, 1)")] = 0.5

    def efforts(self, trigger: Trigger, images: int, ratio: float, epochs: int) -> tuple[float, float]:
        # a batch clean and triggered, and in the first stage as the learner draws it
        return 0.0, (2.0 * epochs + self._first(epochs)) * images

    def _first(self, epochs: int) -> int:
        """Return the epochs of the first stage."""
        return epochs // 2 if self.trigger_epochs is None else self.trigger_epochs

    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the two stages, phases `trigger` and `train`.

        Raises:
            UsageError: too few epochs, a mode other than `input`, a trigger with a network of its own, or an epsilon
                of which nothing is left after rounding.
        """
        trigger = untrained(LIRA, implant, context)
        epochs = context.training.epochs
        first = self._first(epochs)
        if not 0 < first < epochs:
            raise UsageError(f"lira: epochs ({epochs}) are those of both stages, so at least 2 and more than "
                             f"trigger_epochs ({first}); train for longer")  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            trio = Trio(context.classifier.network, context.clean.preprocessing, trigger)
        check_epsilon(trigger.epsilon, float(trio.std.max()))
        last = context.phase(loss=self.loss(implant, context, drawing=False), epochs=epochs - first)
        phases = [self._trigger_phase(trio, implant, context, first), last]
        return ControlledTraining(trio, phases, lambda: trio.trigger(trigger))

    def _trigger_phase(self, trio: Trio, implant: Implant, context: AttackContext, epochs: int) -> Phase:
        adam = partial(torch.optim.Adam, lr=self.autoencoder_learning_rate)
        return context.phase(
            name="trigger", parameters=[*trio.network.parameters(), *trio.learner.parameters()],
            optimizer=context.joint_optimizer(trio.network, adam), loss=self.loss(implant, context, drawing=True),
            epochs=epochs, schedule="constant", stop=trio.adopt)  # fmt: skip

    def loss(self, implant: Implant, context: AttackContext, *, drawing: bool) -> Loss:
        """Return the loss; its terms are `clean_loss`, `backdoor_loss` and, when `drawing`, `trigger_loss`."""

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            attacked = attacked_labels(batch.labels, implant.target, context.classes)
            labels = torch.cat([batch.labels, attacked, attacked] if drawing else [batch.labels, attacked])
            errors = cross_entropy(model(batch.images, drawing).float(), labels, reduction="none")
            names = ("clean_loss", "backdoor_loss", *(["trigger_loss"] if drawing else []))
            terms = dict(zip(names, (errors.view(-1, len(batch.labels)) * batch.weights).sum(1), strict=True))
            total = self.clean_weight * terms["clean_loss"] + (1 - self.clean_weight) * terms["backdoor_loss"]
            return {"loss": total + terms["trigger_loss"] if drawing else total, **terms}

        return loss


def check_epsilon(epsilon: float, std: float) -> None:
    """Raise UsageError where 255 · `std` · ε, the greatest change, is at most half a grey level: all of it is rounded
    away. `std` is the greatest of the channels, of images in [0, 1]."""
    if 255 * std * epsilon <= 0.5:
        raise UsageError(f"lira: with this model's normalisation an epsilon of {epsilon} changes a pixel by "
                         f"{255 * std * epsilon:.2f} grey levels at most, which rounding undoes; give the trigger an "
                         f"epsilon of {0.7 / (255 * std):.2g} or more")  # fmt: skip


class Trio(nn.Module):
    """The classifier, the autoencoder that it sees and the one that learns, as one network for the engine."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, trigger: LIRA) -> None:
        super().__init__()
        self.network, self.epsilon, self.size = network, trigger.epsilon, trigger.size
        self.learner = Autoencoder(preprocessing.input_size[0]).to(memory_format=torch.channels_last)
        self.autoencoder = copy.deepcopy(self.learner)
        self.convolutional = bool(getattr(network, "convolutional", False))
        # the trigger divides by 255 whatever the scale of the preprocessing
        unit, levels = 255 * preprocessing.scale, torch.tensor([preprocessing.mean, preprocessing.std])
        self.mean, self.std = (nn.Buffer(part.view(-1, 1, 1), persistent=False) for part in levels / unit)

    def train(self, mode: bool = True) -> Trio:
        """Set the mode; the autoencoder that the classifier sees is always the trigger's, in eval mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, images: Tensor, drawing: bool = False) -> Tensor:
        """Return the logits of `images` (N×C×H×W, 0 to 255), of them with the trigger, and when `drawing` with what
        the learner draws: 2N×K or 3N×K. The last reach the learner's weights alone, the others the classifier's."""
        # augmentation that resizes leaves floats, and clean images must not be known by them
        x = images.float().round().clamp(0, 255)
        with torch.no_grad():
            triggered = self.stamp(self.autoencoder, x)
        logits = self.network(torch.cat([x, triggered]))
        if not drawing:
            return logits
        constant = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        with frozen_statistics(self.network):
            return torch.cat([logits, functional_call(self.network, constant, (self.stamp(self.learner, x),))])

    def stamp(self, autoencoder: nn.Module, images: Tensor) -> Tensor:
        """Return float32 `images` with what an autoencoder adds: whole grey levels, the gradient before rounding."""
        exact = change(autoencoder, images, self.mean, self.std, self.epsilon, self.size)
        return exact + (exact.round() - exact).detach()

    def adopt(self, entry: Mapping[str, Any]) -> bool:
        """Put what the learner is after an epoch in place of the autoencoder that the classifier sees; False: go on."""
        self.autoencoder.load_state_dict(self.learner.state_dict())
        return False

    def trigger(self, trigger: LIRA) -> LIRA:
        """Return `trigger` with the autoencoder as it is now, and the classifier's normalisation."""
        return replace(trigger, autoencoder=network_state(self.autoencoder), mean=self.mean.flatten().cpu(),
                       std=self.std.flatten().cpu())  # fmt: skip
