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

import operator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from hfdetox.defenses._perturbed import FrozenMethod, OwnState, adam
from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
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
    times = 6.5
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
                           loss=operator.call, optimizer=search, schedule="constant", max_grad_norm=None,
                           start=universal.begin_round, state=state),
                self.phase(name="i-bau-unlearning", network=universal, parameters=trained, epochs=1,
                           loss=universal.unlearning_terms, optimizer=partial(adam, self), schedule="constant",
                           state=state)]  # fmt: skip
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
        self._first: Batch | None = None

    @torch.no_grad()
    def begin_round(self) -> None:
        """Set δ to 0, and forget the first batch of the round before."""
        self.perturbation.zero_()
        self._first = None

    def unlearning_terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the phase that trains θ; `model` is this module as the engine has wrapped it."""
        if self._first is None:
            self._first = batch
        return model(batch, self._first)

    def forward(self, batch: Batch, first: Batch | None = None) -> dict[str, Tensor]:
        """Return the terms of the search for δ, or, given the batch of Φ, those of θ."""
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            return self._search(batch) if first is None else self._unlearn(batch, first)

    def _search(self, batch: Batch) -> dict[str, Tensor]:
        x = batch.images.float()
        with torch.no_grad():
            predicted = self.network(x).argmax(1)
        errors = batch.cross_entropy(self.network(x + self.unit * self.perturbation), predicted)
        squared = self.perturbation.square().sum()
        return {"loss": _DECAY * squared - errors, "cross_entropy": errors, "norm": squared.sqrt()}

    def _unlearn(self, batch: Batch, first: Batch) -> dict[str, Tensor]:
        """Return a loss whose value is H and whose gradient by θ is dH/dθ."""
        x = batch.images.float()
        delta = self.perturbation.detach().clone().requires_grad_()
        carrying = torch.zeros(len(x), 1, 1, 1)
        carrying[torch.randperm(len(x))[: max(1, int(self.config.share * len(x)))]] = 1
        stamped = x + carrying.to(x.device, non_blocking=True) * self.unit * delta
        outer = batch.cross_entropy(self.network(stamped))
        errors = cross_entropy(self.network(first.images.float() + self.unit * delta).float(), first.labels)
        inner = _DECAY * delta.square().sum() - errors
        mapped = delta - _INNER_RATE * torch.autograd.grad(inner, delta, create_graph=True)[0]
        direct = torch.autograd.grad(outer, delta, retain_graph=True)[0]
        v = fixed_point(mapped, delta, direct, self.config.terms)
        implicit = (mapped * v).sum()
        return {"loss": outer + implicit - implicit.detach(), "clean_loss": outer}


def fixed_point(mapped: Tensor, at: Tensor, direct: Tensor, terms: int) -> Tensor:
    """Return v after `terms` iterations of v ← (∂Φ/∂δ)ᵀ v + `direct` from 0, for `mapped` = Φ(δ) and `at` = δ."""
    v = direct
    for _ in range(terms - 1):
        v = direct + torch.autograd.grad(mapped, at, v, retain_graph=True)[0]
    return v
