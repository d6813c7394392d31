"""D3, distance-driven detoxification (Wei et al., ICCV 2025, arXiv 2411.09585).

The backdoored weights θ⁰ are a minimum of the clean loss and of the backdoor loss. D3 leaves them as far behind as the
clean loss allows:

    min over θ with θ_s ∈ 𝒮 of  λ · mean_i max(0, ce_i − ε)  −  Σ_l ‖W_l − W_l⁰‖_F

where θ_s = {W_l} are the selected weights and 𝒮 the product of the spheres ‖W_l‖_F = ‖W_l⁰‖_F, on which no layer can
fake distance by growing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from hfdetox.batches import Batch
from hfdetox.defenses.base import TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.layers import match_layers, norms_before_head
from hfdetox.network import Network
from hfdetox.phases import Pass, Phase

Initialization = Literal["near", "middle", "far", "noise", "random"]


@dataclass(frozen=True, kw_only=True)
class D3Config(TuningConfig):
    """Settings of D3; the defaults are the paper's (preset `paper`).

    Attributes:
        lambda_: weight λ of the clean constraint against the distance, positive; 10 in the paper, 0.5 in the authors'
            code (preset `code`). `--set lambda=…`.
        epsilon: clean cross-entropy ε (nats) of an image below which it asks for nothing, at least 0.
        layers: `head`, or name patterns (`*` and `?`) of Linear and Conv2d modules: the selected weights.
        initialization: where the selected weights start: `random` (uniform, rescaled to the old norm), `noise` (the
            old plus normal noise of the same deviation), `middle` (zero), `far` (minus the old) or `near` (the old).
        freeze_norm: keep the scale γ of an affine norm that feeds the head directly fixed. Otherwise (W, γ, β) →
            (−W, −γ, −β) is the same function at the largest distance. No effect on networks without such a norm.
    """

    name: ClassVar[str] = "d3"
    summary: ClassVar[str] = (
        "keep the clean loss under a threshold while pushing selected weights far from the old ones"
    )
    paper: ClassVar[str] = "arXiv 2411.09585 (ICCV 2025)"
    data: ClassVar[str] = "clean images with labels"
    cost: ClassVar[str] = "1"
    card_text: ClassVar[str] = (
        "D3, distance-driven detoxification ([arXiv 2411.09585](https://arxiv.org/abs/2411.09585)), fine-tuned the "
        "model on {images} while pushing the weights of the selected layers away from where the author left them, on "
        "the sphere of their initial norm, as far as the loss on those images allows."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "code": {"lambda_": 0.5}}

    lambda_: float = 10.0
    epsilon: float = 0.1
    layers: tuple[str, ...] = ("head",)
    initialization: Initialization = "random"
    freeze_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lambda_ < math.inf or not 0 <= self.epsilon < math.inf:
            found = f"{self.lambda_} and {self.epsilon}"
            raise UsageError(f"d3: lambda must be positive and epsilon at least 0, both finite, got {found}")

    def selected_layers(self, model: nn.Module) -> list[str]:
        return match_layers(model, self.layers)

    def phases(self, network: Network) -> list[Phase | Pass]:
        d3 = D3(network.model, self)

        def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return d3.terms(model(batch.images), batch.labels, batch.weights)

        frozen = {id(scale) for scale in d3.frozen_scales}
        trained = [parameter for parameter in trained_parameters(network) if id(parameter) not in frozen]
        return [self.phase(name="d3", parameters=trained, loss=loss, start=d3.initialize, after_step=d3.project,
                           state=d3)]  # fmt: skip


class D3:
    """The method without a loop: call `initialize` once, take `loss` every batch, `project` after every optimiser step.

    With gradient accumulation, project only after real steps; with mixed precision, compute the loss outside autocast
    on the float32 weights. It is deterministic given torch's random state at `initialize`, so all processes agree if
    they were seeded alike. With `freeze_norm`, keep the parameters in `frozen_scales` out of your optimiser (an empty
    list for most networks without a norm before the head).

    Args:
        model: any module; the selected weights are changed in place.
        config: the settings; only `lambda_`, `epsilon`, `layers`, `initialization` and `freeze_norm` are read here.

    Raises:
        UsageError: no layer matches, or every selected weight is zero.
    """

    def __init__(self, model: nn.Module, config: D3Config) -> None:
        self.config = config
        modules = {name: model.get_submodule(name) for name in config.selected_layers(model)}
        weights = {name: module.weight for name, module in modules.items() if isinstance(module.weight, nn.Parameter)}
        self.weights = {name: weight for name, weight in weights.items() if weight.detach().any()}
        if not self.weights:
            raise UsageError(f"d3: the weights of {', '.join(modules)} are all zero; select other layers")
        self.initial = {name: weight.detach().float().clone() for name, weight in self.weights.items()}
        norms = norms_before_head(model) if config.freeze_norm else []
        self.frozen_scales = [model.get_submodule(norm).weight for norm in norms]

    @torch.no_grad()
    def initialize(self) -> None:
        """Move the selected weights to where the method starts (biases stay); draws from torch's CPU generator."""
        for name, weight in self.weights.items():
            weight.copy_(start_weight(self._initial(name, weight), self.config.initialization))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the scalar to minimise, for logits (N×K) and labels (N, int64)."""
        return self.terms(logits, labels)["loss"]

    def terms(
        self, logits: torch.Tensor, labels: torch.Tensor, sample_weights: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `loss` and its parts `clean_loss`, `penalty` (the hinge), `distance` and `cosine`: 0-d, float32.

        `sample_weights` (N, sum 1 over a batch) replaces the mean's 1/N; `cosine` is the layers' mean of cos ∠(W, W⁰).
        """
        with torch.autocast(logits.device.type, enabled=False):
            clean = cross_entropy(logits.float(), labels, reduction="none")
            shares = clean.new_full((), 1 / len(clean)) if sample_weights is None else sample_weights
            penalty = (shares * relu(clean - self.config.epsilon)).sum()
            pairs = [(weight.float(), self._initial(name, weight)) for name, weight in self.weights.items()]
            distance = torch.stack([torch.linalg.vector_norm(now - old) for now, old in pairs]).sum()
            weight = self.config.lambda_
            loss = (weight * penalty - distance) / (weight + 1 if weight > 1 else 1)
            with torch.no_grad():
                cosines = [torch.cosine_similarity(now.flatten(), old.flatten(), dim=0) for now, old in pairs]
            return {"loss": loss, "clean_loss": (shares * clean).sum().detach(), "penalty": penalty.detach(),
                    "distance": distance.detach(), "cosine": torch.stack(cosines).mean()}  # fmt: skip

    @torch.no_grad()
    def project(self) -> None:
        """Put every selected weight back on the sphere of its initial norm, in place."""
        for name, weight in self.weights.items():
            radius = torch.linalg.vector_norm(self._initial(name, weight))
            weight.copy_(project_to_sphere(weight.float(), radius))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the initial selected weights by layer name (float32); a run cannot be resumed without them."""
        return dict(self.initial)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the initial weights of a stopped run; raises UsageError when they are of other layers or shapes."""
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise UsageError(f"d3: the saved state is of layers {sorted(state)}, this model selects {sorted(shapes)}")
        self.initial = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def _initial(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        # the model may have moved to its device after this object was made
        if self.initial[name].device != weight.device:
            self.initial[name] = self.initial[name].to(weight.device)
        return self.initial[name]


def project_to_sphere(weight: torch.Tensor, radius: torch.Tensor | float) -> torch.Tensor:
    """Return W · R / ‖W‖_F: the point of the sphere of radius R nearest to W. A zero W has none and stays zero."""
    norm = torch.linalg.vector_norm(weight)
    # no branch on the value: it would make the GPU wait every step; R divided by a tiny norm could overflow
    return weight / norm.clamp_min(torch.finfo(weight.dtype).tiny) * radius


def start_weight(initial: torch.Tensor, how: Initialization) -> torch.Tensor:
    """Return the start of a weight whose old value is `initial` (float32); drawn on the CPU, returned on its device."""
    if how == "near":
        return initial.clone()
    if how == "middle":
        return torch.zeros_like(initial)
    if how == "far":
        return -initial
    if how == "noise":
        return initial + torch.randn(initial.shape).to(initial.device) * initial.std(correction=0)
    uniform = torch.rand(initial.shape).to(initial.device) - 0.5
    return project_to_sphere(uniform, torch.linalg.vector_norm(initial))
