"""i-BAU, implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022, arXiv 2110.03735).

    min over θ of  H(δ*(θ), θ),   δ*(θ) = argmin over δ of  h(δ, θ) = −ce(f_θ(x+δ), ·) + 0.001 ‖δ‖²

with one universal perturbation δ, and H the cross-entropy, with true labels, of a batch in which a hundredth of the
images carry δ. θ follows the gradient of H through δ* too. As a fixed point δ* = Φ(δ*, θ) = δ* − 0.1 ∇_δ h, it has

    dH/dθ = ∂_θ H + (∂_θ Φ)ᵀ v,   v = ∂_δ H + (∂_δ Φ)ᵀ v,

where the linear equation of v is iterated K times from 0.

A round is one pass over the images for δ, from 0, and one for θ. Numbers and order are those of the authors' code: the
answers of f_θ to x are the labels when δ is searched for, the true ones in Φ, which is that of the first batch of the
round; δ lives in the model's normalised input space, unclipped; the written bound ‖δ‖ ≤ 10 is not enforced. Here Adam
starts anew each round, a batch has at least one image with δ, and each of several processes (or accumulated parts)
takes the gradient of its own part of a batch, of which they then take the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hfdetox.defenses._perturbed import FrozenMethod, OwnState, adam, module_terms
from hfdetox.defenses.base import TuningConfig, cross_entropy_of, trained_parameters
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase
from hfdetox.values import Interval, PositiveFloat, PositiveInt

_INNER_RATE = 0.1
_DECAY = 1e-3


@dataclass(frozen=True, kw_only=True)
class IBAUConfig(TuningConfig):
    """Settings of i-BAU; the defaults are the authors', the preset `backdoorbench` that benchmark's.

    Attributes:
        epochs: rounds, each two passes over the images.
        learning_rate: of Adam, constant.
        momentum: Adam's β₁.
        weight_decay: added to Adam's gradient.
        perturbation_rate: learning rate of SGD for δ, in the normalised input space.
        share: of the images of a batch that carry δ, in (0, 1].
        terms: K of the fixed-point iteration, at least 1; 1 is v = ∂_δ H.
    """

    name = "i-bau"
    summary = "unlearn a universal perturbation, minding how the model's change changes it"
    paper = "arXiv 2110.03735 (ICLR 2022)"
    cost = "8 to 12 for each round"
    card_text = ("i-BAU, implicit backdoor adversarial unlearning (arXiv 2110.03735), fine-tuned the model on "
                 "{images}, some of which carried a perturbation that was searched for to mislead it.")  # fmt: skip
    unweighted = "reweight works from epoch to epoch of a phase, and each round of i-BAU is a phase of its own"
    presets: ClassVar = {"paper": {}, "backdoorbench": {"learning_rate": 1e-4, "batch_size": 256}}

    epochs: int = 5
    batch_size: int = 100
    learning_rate: float = 1e-3
    perturbation_rate: PositiveFloat = 10.0
    share: Annotated[float, Interval("(0, 1]")] = 0.01
    terms: PositiveInt = 5

    def phases(self, network: Network) -> list[Phase | Pass]:
        universal = Universal(network, self)
        trained, state = trained_parameters(network), OwnState(universal)
        search = partial(torch.optim.SGD, lr=self.perturbation_rate)
        phases: list[Phase | Pass] = []
        for _ in range(self.epochs):
            phases += [
                self.phase(name="i-bau-perturbation", network=universal, parameters=[universal.perturbation], epochs=1,
                           loss=module_terms, optimizer=search, schedule="constant", max_grad_norm=None,
                           start=universal.begin_search, state=state),
                self.phase(name="i-bau-unlearning", network=universal, parameters=trained, epochs=1,
                           loss=universal.unlearning_terms, optimizer=partial(adam, self), schedule="constant",
                           start=universal.begin_unlearning, state=state),
            ]  # fmt: skip
        return phases


class Universal(FrozenMethod):
    """The network, in eval mode as in the authors' code, and the perturbation δ (1×C×H×W, normalised input space)."""

    def __init__(self, network: Network, config: IBAUConfig) -> None:
        super().__init__(network)
        self.config = config
        self.perturbation = nn.Parameter(torch.zeros(1, *network.input_size))
        # what 1 in the normalised space is in the images the network takes (C×1×1)
        unit = network.std / network.scale if network.normalizes else torch.ones_like(network.std)
        self.unit = nn.Buffer(unit.detach().clone(), persistent=False)
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def begin_search(self) -> None:
        """Set δ to 0."""
        self.perturbation.zero_()

    def begin_unlearning(self) -> None:
        """Forget the first batch of the round before."""
        self._first = None

    def unlearning_terms(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the terms of the phase that trains θ; `model` is this module as the engine has wrapped it."""
        if self._first is None:
            self._first = (batch.images, batch.labels)
        return model(batch.images, batch.labels, batch.weights, self._first)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor,
                first: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return the terms of the search for δ, or, given the images and labels of Φ, those of θ.

        Args:
            images: N×C×H×W, as the network takes them; `labels` N, int64; `weights` N.
        """
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            if first is None:
                return self._search(images.float(), weights)
            return self._unlearn(images.float(), labels, weights, first[0].float(), first[1])

    def _search(self, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            predicted = self.network(x).argmax(1)
        errors = cross_entropy_of(self.network(x + self.unit * self.perturbation), predicted, weights)
        squared = self.perturbation.square().sum()
        return {"loss": _DECAY * squared - errors, "cross_entropy": errors, "norm": squared.sqrt()}

    def _unlearn(self, x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, first: torch.Tensor,
                 first_labels: torch.Tensor) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return a loss whose value is H and whose gradient by θ is dH/dθ."""
        delta = self.perturbation.detach().clone().requires_grad_()
        carrying = torch.zeros(len(x), 1, 1, 1)
        carrying[torch.randperm(len(x))[: max(1, int(self.config.share * len(x)))]] = 1
        stamped = x + carrying.to(x.device) * self.unit * delta
        outer = cross_entropy_of(self.network(stamped), labels, weights)
        errors = cross_entropy(self.network(first + self.unit * delta).float(), first_labels)
        inner = _DECAY * delta.square().sum() - errors
        mapped = delta - _INNER_RATE * torch.autograd.grad(inner, delta, create_graph=True)[0]
        direct = torch.autograd.grad(outer, delta, retain_graph=True)[0]
        v = fixed_point(mapped, delta, direct, self.config.terms)
        implicit = (mapped * v).sum()
        return {"loss": outer + implicit - implicit.detach(), "clean_loss": outer}


def fixed_point(mapped: torch.Tensor, at: torch.Tensor, direct: torch.Tensor, terms: int) -> torch.Tensor:
    """Return v after `terms` iterations of v ← (∂Φ/∂δ)ᵀ v + `direct` from 0, for `mapped` = Φ(δ) and `at` = δ."""
    v = direct
    for _ in range(terms - 1):
        v = direct + torch.autograd.grad(mapped, at, v, retain_graph=True)[0]
    return v
