"""D3, distance-driven detoxification (Wei et al., ICCV 2025, arXiv 2411.09585).

The backdoored weights θ⁰ are a minimum of the clean loss and of the backdoor loss. D3 leaves them as far behind as the
clean loss allows:

    min over θ with θ_s ∈ 𝒮 of  λ · mean_i max(0, ce_i − ε)  −  Σ_l ‖W_l − W_l⁰‖_F

where θ_s = {W_l} are the selected weights and 𝒮 the product of the spheres ‖W_l‖_F = ‖W_l⁰‖_F, on which no layer can
fake distance by growing.

The paper fixes λ, ε and the length for one network. The preset `auto` finds them, and the augmentation, from the model
and the clean images; see `hfdetox.defenses.d3_auto`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from hfdetox.defenses.base import TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.models.layers import has_batch_norm, head_layers, match_layers, norms_before_head
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.optimizers import JointOptimizer
from hfdetox.training.phases import Pass, Phase

Auto = Literal["auto"]
Initialization = Literal["near", "middle", "far", "noise", "random"]
Features = Literal["sgd", "adamw", "auto"]

# AdamW's usual decay, with which the networks that it trains were made
_DECAY = 0.05


@dataclass(frozen=True, kw_only=True)
class D3Config(TuningConfig):
    """Settings of D3; the defaults are the paper's (preset `paper`).

    Attributes:
        lambda_: weight λ of the clean constraint against the distance, positive; 10 in the paper, 0.5 in the authors'
            code (preset `code`). `--set lambda=…`. `auto` moves it during the run so that the layers turn as far as
            `cosine` says.
        epsilon: clean cross-entropy ε (nats) of an image below which it asks for nothing, at least 0. `auto` takes the
            median over the clean images of the model's own, as it came.
        layers: `head`, or name patterns (`*` and `?`) of Linear and Conv2d modules: the selected weights.
        initialization: where the selected weights start: `random` (uniform, rescaled to the old norm), `noise` (the
            old plus normal noise of the same deviation), `middle` (zero), `far` (minus the old) or `near` (the old).
        freeze_norm: keep the scale γ of an affine norm that feeds the head directly fixed. Otherwise (W, γ, β) →
            (−W, −γ, −β) is the same function at the largest distance. No effect on networks without such a norm.
        centered: measure and project the head's weights without the mean of their rows. A vector added to every row
            changes no class probability, and would count as distance.
        cosine: with `lambda=auto`, cos ∠(W, W⁰) at which the selected weights shall end, in (−1, 0).
        match_augmentation: use the strongest augmentation up to `augmentation` under which the model, as it came, is
            as right on the clean images as without (see `d3_auto.TOLERATED`): others ask it to learn what it never saw.
        mixup: α of mixup (arXiv 1710.09412), at least 0: images are blended in pairs with a share drawn from Beta(α, α)
            for each batch, and so are their losses; 0 blends none. Pairs are of one process.
        min_steps: optimiser steps of the run at least: with few images it takes more epochs than `epochs`. `--epochs`
            without it takes a preset's back.
        features: what trains everything but the selected weights, which are always SGD's: `sgd` as in the paper,
            `adamw`, or `auto`, AdamW for networks without BatchNorm.
        features_learning_rate: of AdamW, before the cosine schedule, positive.
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
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {}, "code": {"lambda_": 0.5},
        "auto": {"lambda_": "auto", "epsilon": "auto", "centered": True, "match_augmentation": True, "epochs": 20,
                 "min_steps": 200, "learning_rate": 0.03, "features": "auto", "mixup": 0.2},
    }  # fmt: skip

    lambda_: float | Auto = 10.0
    epsilon: float | Auto = 0.1
    layers: tuple[str, ...] = ("head",)
    initialization: Initialization = "random"
    freeze_norm: bool = True
    centered: bool = False
    cosine: float = -0.4
    match_augmentation: bool = False
    mixup: float = 0.0
    min_steps: int = 0
    features: Features = "sgd"
    features_learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("lambda", self.lambda_, math.ulp(0), "positive")
        _check("epsilon", self.epsilon, 0, "at least 0")
        if not -1 < self.cosine < 0:
            raise UsageError(f"d3: cosine must be between -1 and 0, got {self.cosine}")
        if not 0 <= self.mixup < math.inf:
            raise UsageError(f"d3: mixup must be at least 0 and finite, got {self.mixup}")
        if self.min_steps < 0:
            raise UsageError(f"d3: min_steps must be at least 0, got {self.min_steps}")
        rate = self.features_learning_rate
        if not 0 < rate < math.inf:
            raise UsageError(f"d3: features_learning_rate must be positive and finite, got {rate}")

    @property
    def automatic(self) -> bool:
        """Whether a look at the model and the clean images comes before the training."""
        return "auto" in (self.lambda_, self.epsilon) or self.match_augmentation or self.min_steps > 0

    def selected_layers(self, model: nn.Module) -> list[str]:
        return match_layers(model, self.layers)

    def choices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        from hfdetox.defenses.d3_auto import describe

        return describe(self, history) if self.automatic else []

    def phases(self, network: Network) -> list[Phase | Pass]:
        # it is made of what is below, so it can be imported only later
        from hfdetox.defenses.d3_auto import AutoD3

        d3 = AutoD3(network.model, self) if self.automatic else D3(network.model, self)

        def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            if not self.mixup:
                return d3.terms(model(batch.images), batch.labels, batch.weights)
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            others = torch.randperm(len(batch.labels)).to(batch.labels.device)
            images = torch.lerp(batch.images[others].float(), batch.images.float(), share)
            return d3.terms(model(images), batch.labels, batch.weights, batch.labels[others], share)

        frozen = {id(scale) for scale in d3.frozen_scales}
        trained = [parameter for parameter in trained_parameters(network) if id(parameter) not in frozen]
        phase = self.phase(name="d3", parameters=trained, loss=loss, start=d3.initialize, after_step=d3.project,
                           state=d3, optimizer=self._optimizer(network, d3))  # fmt: skip
        return [d3.probe_pass(phase), phase] if isinstance(d3, AutoD3) else [phase]

    def adamw_for(self, model: nn.Module) -> bool:
        """Tell whether AdamW trains what is not selected of `model`."""
        return self.features == "adamw" or (self.features == "auto" and not has_batch_norm(model))

    def _optimizer(self, network: Network, d3: D3) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        """Return what makes the optimiser: SGD of all, or of the selected weights beside AdamW of the others."""
        if not self.adamw_for(network.model):
            return self.sgd

        def joint(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            selected = {id(weight) for weight in d3.weights.values()}
            pushed = [parameter for parameter in parameters if id(parameter) in selected]
            others = [parameter for parameter in parameters if id(parameter) not in selected]
            if not others:
                return self.sgd(pushed)
            adamw = torch.optim.AdamW(others, lr=self.features_learning_rate, weight_decay=_DECAY)
            return JointOptimizer(self.sgd(pushed), adamw)

        return joint


def _check(name: str, value: float | str, least: float, wanted: str) -> None:
    if value != "auto" and (isinstance(value, str) or not least <= value < math.inf):
        raise UsageError(f"d3: {name} must be {wanted} and finite, or auto, got {value}")


class D3:
    """The method without a loop: call `initialize` once, take `loss` every batch, `project` after every optimiser step.

    With gradient accumulation, project only after real steps; with mixed precision, compute the loss outside autocast
    on the float32 weights. It is deterministic given torch's random state at `initialize`, so all processes agree if
    they were seeded alike. With `freeze_norm`, keep the parameters in `frozen_scales` out of your optimiser (an empty
    list for most networks without a norm before the head).

    Args:
        model: any module; the selected weights are changed in place.
        config: the settings; only `lambda_`, `epsilon`, `layers`, `initialization`, `freeze_norm` and `centered` are
            read here.

    Raises:
        UsageError: no layer matches, every selected weight is zero, or λ or ε is `auto` (only a run can find them).
    """

    def __init__(self, model: nn.Module, config: D3Config) -> None:
        if isinstance(config.lambda_, str) or isinstance(config.epsilon, str):
            raise UsageError("d3: lambda and epsilon must be numbers here; auto is for detoxify and the command")
        self.config = config
        self.epsilon = config.epsilon
        modules = {name: model.get_submodule(name) for name in config.selected_layers(model)}
        weights = {name: module.weight for name, module in modules.items() if isinstance(module.weight, nn.Parameter)}
        self.weights = {name: weight for name, weight in weights.items() if weight.detach().any()}
        if not self.weights:
            raise UsageError(f"d3: the weights of {', '.join(modules)} are all zero; select other layers")
        self.centered = set(head_layers(model)) & set(self.weights) if config.centered else set()
        self.initial = {name: self._centred(name, w.detach().float()).clone() for name, w in self.weights.items()}
        norms = norms_before_head(model) if config.freeze_norm else []
        self.frozen_scales = [model.get_submodule(norm).weight for norm in norms]

    @torch.no_grad()
    def initialize(self) -> None:
        """Move the selected weights to where the method starts (biases stay); draws from torch's CPU generator."""
        for name, weight in self.weights.items():
            start = start_weight(self._initial(name, weight), self.config.initialization)
            if name in self.centered:
                # what was drawn has a mean too, and without it another norm
                start = project_to_sphere(self._centred(name, start), torch.linalg.vector_norm(start))
            weight.copy_(start)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the scalar to minimise, for logits (N×K) and labels (N, int64)."""
        return self.terms(logits, labels)["loss"]

    def terms(
        self, logits: torch.Tensor, labels: torch.Tensor, sample_weights: torch.Tensor | None = None,
        mixed_labels: torch.Tensor | None = None, share: float = 1.0,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return `loss` and its parts `clean_loss`, `penalty` (the hinge), `distance` and `cosine`: 0-d, float32.

        `sample_weights` (N, sum 1 over a batch) replaces the mean's 1/N; `cosine` is the layers' mean of cos ∠(W, W⁰).
        Of blended images `share` is that of `labels`, and `mixed_labels` (N, int64) are the others'.
        """
        with torch.autocast(logits.device.type, enabled=False):
            clean = cross_entropy(logits.float(), labels, reduction="none")
            if mixed_labels is not None:
                clean = torch.lerp(cross_entropy(logits.float(), mixed_labels, reduction="none"), clean, share)
            shares = clean.new_full((), 1 / len(clean)) if sample_weights is None else sample_weights
            penalty = (shares * relu(clean - self.epsilon)).sum()
            pairs = [(weight.float(), self._initial(name, weight)) for name, weight in self.weights.items()]
            distance = torch.stack([torch.linalg.vector_norm(now - old) for now, old in pairs]).sum()
            return {"loss": self.objective(penalty, distance), "clean_loss": (shares * clean).sum().detach(),
                    "penalty": penalty.detach(), "distance": distance.detach(), "cosine": self.cosine()}  # fmt: skip

    def objective(self, penalty: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Return λ·h − d of the hinge h and the distance d, divided by λ + 1 where λ is above 1, as the authors do."""
        weight = float(self.config.lambda_)
        return (weight * penalty - distance) / (weight + 1 if weight > 1 else 1)

    @torch.no_grad()
    def cosine(self) -> torch.Tensor:
        """Return the layers' mean of cos ∠(W, W⁰), 0-d, float32."""
        pairs = [(weight.float(), self._initial(name, weight)) for name, weight in self.weights.items()]
        cosines = [torch.cosine_similarity(now.flatten(), old.flatten(), dim=0) for now, old in pairs]
        return torch.stack(cosines).mean()

    @torch.no_grad()
    def project(self) -> None:
        """Put every selected weight back on the sphere of its initial norm (of centred ones, if so), in place."""
        for name, weight in self.weights.items():
            radius = torch.linalg.vector_norm(self._initial(name, weight))
            weight.copy_(project_to_sphere(self._centred(name, weight.float()), radius))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the initial selected weights by layer name (float32); a run cannot be resumed without them."""
        return dict(self.initial)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the initial weights of a stopped run; raises UsageError when they are of other layers or shapes."""
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise UsageError(f"d3: the saved state is of layers {sorted(state)}, this model selects {sorted(shapes)}")
        self.initial = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def _centred(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Take the mean of its rows (one a class) out of a head's weight, where the settings ask for that."""
        return weight - weight.mean(0, keepdim=True) if name in self.centered else weight

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
