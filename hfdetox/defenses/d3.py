"""D3, distance-driven detoxification (Wei et al., ICCV 2025, arXiv 2411.09585).

The backdoored weights θ⁰ are a minimum of the clean loss and of the backdoor loss. D3 leaves them as far behind as the
clean loss allows:

    min over θ with θ_s ∈ 𝒮 of  λ · mean_i max(0, ce_i − ε)  −  Σ_l ‖W_l − W_l⁰‖_F

where θ_s = {W_l} are the selected weights and 𝒮 the product of the spheres ‖W_l‖_F = ‖W_l⁰‖_F, on which no layer can
fake distance by growing.

This is the mathematics; the defense that runs it is `hfdetox.defenses.auto.D3Config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from hfdetox.errors import UsageError
from hfdetox.models.layers import head_layers, match_layers, norms_before_head, scales

Initialization = Literal["near", "middle", "far", "noise", "random"]


@dataclass(frozen=True, kw_only=True)
class D3Settings:
    """What the mathematics needs; the defaults are the paper's. `hfdetox.defenses.auto` has what a run needs besides.

    Attributes:
        lambda_: weight λ of the clean constraint against the distance, positive; 10 in the paper, 0.5 in the authors'
            code. A text stands for a number that is to be found first.
        epsilon: clean cross-entropy ε (nats) of an image below which it asks for nothing, at least 0; or a text.
        layers: `head`, or name patterns (`*` and `?`) of Linear and Conv2d modules: the selected weights.
        initialization: where the selected weights start: `random` (uniform, rescaled to the old norm), `noise` (the
            old plus normal noise of the same deviation), `middle` (zero), `far` (minus the old) or `near` (the old).
        freeze_norm: keep the scale γ of an affine norm that feeds the head directly fixed. Otherwise (W, γ, β) →
            (−W, −γ, −β) is the same function at the largest distance. No effect on networks without such a norm.
        centered: measure and project the head's weights without the mean of their rows. A vector added to every row
            changes no class probability, and would count as distance.
    """

    lambda_: float | str = 10.0
    epsilon: float | str = 0.1
    layers: tuple[str, ...] = ("head",)
    initialization: Initialization = "random"
    freeze_norm: bool = True
    centered: bool = False


class D3:
    """The method without a loop: call `initialize` once, take `loss` every batch, `project` after every optimiser step.

    With gradient accumulation, project only after real steps; with mixed precision, compute the loss outside autocast
    on the float32 weights. It is deterministic given torch's random state at `initialize`, so all processes agree if
    they were seeded alike. With `freeze_norm`, keep the parameters in `frozen_scales` out of your optimiser (an empty
    list for most networks without a norm before the head).

    Args:
        model: any module; the selected weights are changed in place.
        config: the settings; a `D3Config` is one.

    Raises:
        UsageError: no layer matches, every selected weight is zero, or λ or ε is no number (only a run can find them).
    """

    def __init__(self, model: nn.Module, config: D3Settings) -> None:
        if isinstance(config.lambda_, str) or isinstance(config.epsilon, str):
            raise UsageError("d3: lambda and epsilon must be numbers here; words are for detoxify and the command")
        self.config = config
        self.epsilon = config.epsilon
        modules = {name: model.get_submodule(name) for name in match_layers(model, config.layers)}
        weights = {name: module.weight for name, module in modules.items() if isinstance(module.weight, nn.Parameter)}
        self.weights = {name: weight for name, weight in weights.items() if weight.detach().any()}
        if not self.weights:
            raise UsageError(f"d3: the weights of {', '.join(modules)} are all zero; select other layers")
        self.centered = set(head_layers(model)) & set(self.weights) if config.centered else set()
        self.initial = {name: self._centred(name, w.detach().float()).clone() for name, w in self.weights.items()}
        norms = norms_before_head(model) if config.freeze_norm else []
        self.frozen_scales = [scale for norm in norms for scale in scales(model.get_submodule(norm))]

    @property
    def forgotten(self) -> bool:
        """Whether the model as it came may teach; a run that knows its steps says no at first."""
        return True

    @torch.no_grad()
    def initialize(self) -> None:
        """Move the selected weights to where the method starts (biases stay); draws from torch's CPU generator."""
        for name, weight in self.weights.items():
            start = start_weight(self._initial(name, weight), self.config.initialization)
            if name in self.centered:
                # what was drawn has a mean too, and without it another norm
                start = project_to_sphere(self._centred(name, start), torch.linalg.vector_norm(start))
            weight.copy_(start)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar to minimise, for logits (N×K) and labels (N, int64)."""
        return self.terms(logits, labels)["loss"]

    def terms(
        self, logits: Tensor, labels: Tensor, sample_weights: Tensor | None = None,
        mixed_labels: Tensor | None = None, share: float = 1.0, *,
        kept: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Return `loss` and its parts `clean_loss`, `penalty` (the hinge), `distance` and `cosine`: 0-d, float32.

        `sample_weights` (N, sum 1 over a batch) replaces the mean's 1/N; `cosine` is the layers' mean of cos ∠(W, W⁰).
        Of blended images `share` is that of `labels`, and `mixed_labels` (N, int64) are the others'. What else is to be
        `kept` low (0-d) counts with the hinge, and is returned as `distillation`.
        """
        with torch.autocast(logits.device.type, enabled=False):
            clean = cross_entropy(logits.float(), labels, reduction="none")
            if mixed_labels is not None:
                clean = torch.lerp(cross_entropy(logits.float(), mixed_labels, reduction="none"), clean, share)
            shares = clean.new_full((), 1 / len(clean)) if sample_weights is None else sample_weights
            penalty = (shares * relu(clean - self.epsilon)).sum()
            pairs = [(weight.float(), self._initial(name, weight)) for name, weight in self.weights.items()]
            distance = torch.stack([torch.linalg.vector_norm(now - old) for now, old in pairs]).sum()
            more = {} if kept is None else {"distillation": kept.detach()}
            cost = penalty if kept is None else penalty + kept
            return {"loss": self.objective(cost, distance), **more, "clean_loss": (shares * clean).sum().detach(),
                    "penalty": penalty.detach(), "distance": distance.detach(), "cosine": self.cosine()}  # fmt: skip

    def objective(self, penalty: Tensor, distance: Tensor) -> Tensor:
        """Return λ·h − d of the hinge h and the distance d, divided by λ + 1 where λ is above 1, as the authors do."""
        weight = float(self.config.lambda_)
        return (weight * penalty - distance) / (weight + 1 if weight > 1 else 1)

    @torch.no_grad()
    def cosine(self) -> Tensor:
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

    def state_dict(self) -> dict[str, Tensor]:
        """Return the initial selected weights by layer name (float32); a run cannot be resumed without them."""
        return dict(self.initial)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the initial weights of a stopped run; raises UsageError when they are of other layers or shapes."""
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise UsageError(f"d3: the saved state is of layers {sorted(state)}, this model selects {sorted(shapes)}")
        self.initial = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def _centred(self, name: str, weight: Tensor) -> Tensor:
        """Take the mean of its rows (one a class) out of a head's weight, where the settings ask for that."""
        return weight - weight.mean(0, keepdim=True) if name in self.centered else weight

    def _initial(self, name: str, weight: Tensor) -> Tensor:
        # the model may have moved to its device after this object was made
        if self.initial[name].device != weight.device:
            self.initial[name] = self.initial[name].to(weight.device)
        return self.initial[name]


def project_to_sphere(weight: Tensor, radius: Tensor | float) -> Tensor:
    """Return W · R / ‖W‖_F: the point of the sphere of radius R nearest to W. A zero W has none and stays zero."""
    norm = torch.linalg.vector_norm(weight)
    # no branch on the value: it would make the GPU wait every step; R divided by a tiny norm could overflow
    return weight / norm.clamp_min(torch.finfo(weight.dtype).tiny) * radius


def start_weight(initial: Tensor, how: Initialization) -> Tensor:
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
