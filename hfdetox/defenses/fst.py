"""FST, feature shift tuning (Min et al., NeurIPS 2023, arXiv 2310.01875).

    min over θ with ‖W‖ = ‖W⁰‖ of  mean_i ce(f_θ(x_i), y_i) + α ⟨W, W⁰⟩

where W is the head's weight. The head's weight and bias are drawn anew first, and the norm is restored after every
step. On that sphere α ⟨W, W⁰⟩ is a constant minus (α / 2) · ‖W − W⁰‖²: D3 with the squared distance and no hinge.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.defenses.d3 import D3, D3Settings
from hfdetox.models.layers import HEAD
from hfdetox.values import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class FSTConfig(TuningConfig):
    """Settings of FST; the defaults are those of the authors' code for CIFAR-10 (preset `paper`).

    Attributes:
        alpha: weight α of the inner product, at least 0; 0.2 in the authors' code, 0.1 in its README (preset `readme`),
            near 0 where there are many classes (preset `tiny`, for Tiny ImageNet, is by the authors of IMS). The inner
            product goes with ‖W⁰‖², so a head of large norm needs a smaller α, or the accuracy suffers.
        freeze_norm: keep the scale of a norm that feeds the head directly fixed, as D3 does: otherwise turning both
            signs lowers the inner product and changes nothing.
    """

    name = "fst"
    summary = "draw the head anew and fine-tune while turning its weights away from the old ones"
    paper = "arXiv 2310.01875 (NeurIPS 2023)"
    cost = "1"
    card_text = ("FST, feature shift tuning (arXiv 2310.01875), drew the model's classifier head anew and fine-tuned "
                 "the model on {images} while turning the head's weights away from the old ones.")  # fmt: skip
    treats = (HEAD,)
    presets: ClassVar = {"paper": {}, "readme": {"alpha": 0.1},
                         "tiny": {"alpha": 0.001, "learning_rate": 0.001, "epochs": 15}}  # fmt: skip

    epochs: int = 10
    alpha: NonNegativeFloat = 0.2
    freeze_norm: bool = True

    def phases(self, network: Network) -> list[Phase | Pass]:
        fst = FST(network.model, self)
        trained = trained_parameters(network, but=fst.sphere.frozen_scales)
        return [self.phase(name="fst", parameters=trained, loss=fst.terms, start=fst.initialize,
                           after_step=fst.sphere.project, state=fst.sphere)]  # fmt: skip


class FST:
    """The method's parts; `sphere` has W⁰, the projection and the state that D3 has of the same layers.

    Raises:
        UsageError: no head is found, or its weights are all zero.
    """

    def __init__(self, model: nn.Module, config: FSTConfig) -> None:
        self.model, self.alpha = model, config.alpha
        self.sphere = D3(model, D3Settings(layers=(HEAD,), freeze_norm=config.freeze_norm))

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weight and bias from U(−1/√d, 1/√d), d inputs a class, with torch's CPU generator."""
        for name, weight in self.sphere.weights.items():
            bound = 1 / math.sqrt(weight[0].numel())
            for tensor in self.model.get_submodule(name).parameters(recurse=False):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound))

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` and its parts `clean_loss` and `inner_product` (Σ over heads of ⟨W, W⁰⟩), and `distance`."""
        clean = batch.cross_entropy(model(batch.images))
        pairs = [(w.float(), self.sphere.initial[name].to(w.device)) for name, w in self.sphere.weights.items()]
        inner = torch.stack([(now * old).sum() for now, old in pairs]).sum()
        distance = torch.stack([torch.linalg.vector_norm(now.detach() - old) for now, old in pairs]).sum()
        return {"loss": clean + self.alpha * inner, "clean_loss": clean.detach(), "inner_product": inner.detach(),
                "distance": distance}  # fmt: skip
