"""IMS, invertible masking using selection (NeurIPS 2025, arXiv 2509.15497).

Two networks are cut from the frozen one f₀: f_m shall keep what clean images need and f_i what a backdoor needs. Each
unit has a mask a and a selection s, both in [0, 1] and 1 at first; with S(a) = σ(k (a − ½)) the unit's output is
multiplied by

    a' = S(a) + s (1 − S(a))  in f_m        ā' = S(1 − a) + s (1 − S(1 − a))  in f_i

so that s = 1 leaves the unit to both, and s = 0 gives it to exactly one. For probabilities p, q with o = ⟨p, q⟩,
agree = −mean log(o + 10⁻⁸) and disagree = −mean log(1 − o + 10⁻⁸). Perturbations δ stand for the unknown trigger:

    stage 1      min over a, s of  agree(f_m(x), f₀(x)) + disagree(f_i(x), f₀(x)) + λ₁ mean(1 − s)
    stages 2, 3  inner: δ ← argmin  agree(f_i(x + δ), f₀(x + δ)) + disagree(f₀(x + δ), f₀(x))
                 outer: that of stage 1
                        + agree(f_m(x + δ), f₀(x)) + agree(f_i(x + δ), f₀(x + δ)) + disagree(f_i(x + δ), f₀(x))

each round on one batch, stage 2 with λ₁ = 0; a stage ends when its loss has not fallen by 2 % for 25 rounds. No labels
are used. The result is f_m, its masks multiplied into the weights.

Units are the output channels of the convolutions. Of networks without BatchNorm (ViT, ConvNeXt) they are hidden units
of MLPs and attention heads, which is hfdetox's own choice: the paper's ViTs (preliminary, it says) have their masks on
the output of whole blocks, residual included, and those cannot be folded into an ordinary model; they are left out.

Further from the authors' code: δ is found by the sum over a batch's images and not their mean (AdamW is blind to that
factor), and 1 − o is computed as Σ p_c (1 − q_c), which rounding cannot make negative. As there, x + δ is not clipped
to the range of pixels, and AdamW's decay pulls a and s down. All is computed in float32, whatever
precision is asked for: a step of δ is a quarter of a grey level, less than bf16 resolves in many a pixel.

∂a'/∂a = (1 − s) S'(a): at s = 1 a unit's mask has no gradient, and at a = 1 its selection has hardly one for f_m. So
only a unit that has left s = 1 can be cut, which is up to the terms of f_i: what f_i needs from the start stays shared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfdetox.defenses._perturbed import FrozenMethod, OwnState, require_pixels
from hfdetox.defenses.base import Batch, DefenseConfig, Network, Pass, Phase
from hfdetox.errors import UsageError
from hfdetox.models.layers import has_batch_norm, head_layers
from hfdetox.training.masks import ChannelMasks, MaskedLayer, unit_layers
from hfdetox.training.search import PIXEL
from hfdetox.values import Interval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# a total has to be better by so much for patience to start anew
_BETTER = 0.98
_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class IMSConfig(DefenseConfig):
    """Settings of IMS; the defaults are those of the authors' code.

    Attributes:
        units: `conv` (output channels), `hidden` (units of MLPs and attention heads), or `auto`: `conv` with BatchNorm,
            else `hidden` where there are such units.
        selection: off is an ablation: every unit belongs to one side (s = 0).
        inverse: off is an ablation: no f_i, and δ only changes the original's mind.
        steepness: k, positive.
        sparsity: λ₁ of stages 1 and 3, at least 0; none is 10 for `conv` and 0 for `hidden`, as for the paper's ViTs.
        initial_rounds: of stage 1, at most; 0 leaves it out.
        free_rounds: of stage 2, at most; 0 leaves it out.
        sparse_rounds: of stage 3, at most; 0 leaves it out. Without stages 2 and 3 there is no perturbation.
        patience: a stage ends after so many rounds without a total 2 % better.
        batch_size: images of a round, drawn anew for each; all of them where there are fewer.
        learning_rate: of AdamW on a and s.
        weight_decay: of that AdamW.
        inner_steps: AdamW steps on δ.
        inner_rate: of that AdamW, for δ in pixels of 0 to 1.
    """

    name = "ims"
    summary = "cut away the units that only an inverted mask needs, by trained masks and selections"
    paper = "arXiv 2509.15497 (NeurIPS 2025)"
    data = "clean images (labels are not used)"
    cost = "up to 500 batches in float32, of which 400 at 30 times a batch of fine-tuning"
    card_text = ("IMS, invertible masking using selection (arXiv 2509.15497), learnt on {images} which units of the "
                 "network clean images need{against}, and scaled the weights of the others down.")  # fmt: skip
    presets: ClassVar = {
        "paper": {}, "no-selection": {"selection": False}, "no-inverse": {"inverse": False},
        "no-perturbation": {"free_rounds": 0, "sparse_rounds": 0}}  # fmt: skip

    units: Literal["auto", "conv", "hidden"] = "auto"
    selection: bool = True
    inverse: bool = True
    steepness: PositiveFloat = 20.0
    sparsity: NonNegativeFloat | None = None
    initial_rounds: NonNegativeInt = 100
    free_rounds: NonNegativeInt = 200
    sparse_rounds: NonNegativeInt = 200
    patience: PositiveInt = 25
    batch_size: Annotated[int, Interval("[2, inf]")] = 256
    learning_rate: PositiveFloat = 0.02
    weight_decay: NonNegativeFloat = 0.01
    inner_steps: PositiveInt = 20
    inner_rate: PositiveFloat = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges; raises UsageError that names the setting and what it may be."""
        super().__post_init__()
        if not any((self.initial_rounds, self.free_rounds, self.sparse_rounds)):
            raise UsageError("ims: the rounds of the three stages are all 0: nothing would be learnt")

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        batch, stages = min(self.batch_size, images), (self.initial_rounds, self.free_rounds, self.sparse_rounds)
        # a stage ends after `patience` rounds at the soonest
        found = []
        for most in (self.patience, max(stages)):
            initial, *perturbed = (min(most, rounds) for rounds in stages)
            found.append(batch * (2 * initial + sum(perturbed) * (4 + 2 * self.inner_steps)))
        return tuple(map(float, found))

    def describe(self, images: str) -> str:
        perturbed = ", against perturbations that stand for a trigger" if self.free_rounds + self.sparse_rounds else ""
        return super().describe(images).replace("{against}", perturbed)

    def phases(self, network: Network) -> list[Phase | Pass]:
        require_pixels(network, self.name)
        ims = IMS(network, self)
        stages = [
            ims.stage("ims-initial", self.initial_rounds, perturbed=False, sparsity=ims.sparsity),
            ims.stage("ims-free", self.free_rounds, perturbed=True, sparsity=0.0),
            ims.stage("ims-sparse", self.sparse_rounds, perturbed=True, sparsity=ims.sparsity),
        ]
        fold = Pass(name="ims-fold", on_batch=ims.compare, finish=ims.fold, state=OwnState(ims))
        return [*(stage for stage in stages if stage.epochs), fold]


class IMS(FrozenMethod):
    """The frozen network, in eval mode, with the masks a and selections s of all units in flat tensors.

    Raises:
        UsageError: the network has no units of the kind that is asked for.
    """

    def __init__(self, network: nn.Module, config: IMSConfig) -> None:
        super().__init__(network)
        self.config = config
        self.channels = ChannelMasks(network, config.name, masked_layers(network, config.units))
        rows = not any(layer.width for layer in self.channels.layers)
        self.sparsity = config.sparsity if config.sparsity is not None else 10.0 if rows else 0.0
        self.mask = nn.Parameter(torch.ones(self.channels.count))
        self.selection = nn.Parameter(torch.full((self.channels.count,), float(config.selection)))
        self.best, self.waited = nn.Buffer(torch.tensor(math.inf)), nn.Buffer(torch.tensor(0))
        self._seen = torch.zeros(2)

    def stage(self, name: str, rounds: int, *, perturbed: bool, sparsity: float) -> Phase:
        """Return a stage as a phase whose epochs are rounds of one batch, with an optimiser of its own."""
        config = self.config
        adamw = partial(torch.optim.AdamW, lr=config.learning_rate, weight_decay=config.weight_decay)

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return model(batch, perturbed, sparsity)

        return Phase(
            name=name, network=self, parameters=[self.mask, *([self.selection] if config.selection else [])],
            optimizer=adamw, loss=loss, epochs=rounds, steps=1, batch_size=config.batch_size, augmentation="none",
            schedule="constant", start=self.begin_stage, after_step=self.project, stop=self.stalled,
            state=OwnState(self))  # fmt: skip

    def masks(self) -> tuple[Tensor, Tensor]:
        """Return a' and ā' of all units, flat."""
        steepness = self.config.steepness
        return soft_mask(self.mask, self.selection, steepness), soft_mask(1 - self.mask, self.selection, steepness)

    def forward(self, batch: Batch, perturbed: bool, sparsity: float) -> dict[str, Tensor]:
        """Return the terms of a round on a batch: `loss` and its parts."""
        x, (kept, inverse) = batch.images.float(), self.masks()
        with torch.no_grad():
            own = self.probabilities(x)
        terms = {"agreement": batch.mean(agree(self.probabilities(x, kept), own))}
        if self.config.inverse:
            terms["opposition"] = batch.mean(disagree(self.probabilities(x, inverse), own))
        if perturbed:
            moved = x + PIXEL * self.perturbation(x, own)
            terms["recovery"] = batch.mean(agree(self.probabilities(moved, kept), own))
            if self.config.inverse:
                with torch.no_grad():
                    perturbed_probs = self.probabilities(moved)
                led = self.probabilities(moved, inverse)
                terms["complicity"] = batch.mean(agree(led, perturbed_probs) + disagree(led, own))
        if sparsity and self.config.selection:
            terms["sparsity"] = sparsity * (1 - self.selection).mean()
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def perturbation(self, x: Tensor, own: Tensor) -> Tensor:
        """Return δ (like `x`, in pixels of 0 to 1) that changes f₀'s answers from `own` (N×K) and takes f_i along."""
        inverse = self.masks()[1].detach()
        delta = torch.zeros_like(x).requires_grad_()
        optimizer = torch.optim.AdamW([delta], lr=self.config.inner_rate)
        for _ in range(self.config.inner_steps):
            moved = x + PIXEL * delta
            perturbed_probs = self.probabilities(moved)
            aims = disagree(perturbed_probs, own)
            if self.config.inverse:
                aims = aims + agree(self.probabilities(moved, inverse), perturbed_probs)
            (delta.grad,) = torch.autograd.grad(aims.sum(), [delta])
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(-1, 1)
        return delta.detach()

    def probabilities(self, images: Tensor, values: Tensor | None = None) -> Tensor:
        """Return the softmax (N×K, float32) of the network's logits, under masks (flat) if given."""
        with torch.autocast(images.device.type, enabled=False):
            if values is None:
                return self.network(images).softmax(1)
            return self.channels.logits(self.network, images, values, values).softmax(1)

    @torch.no_grad()
    def project(self) -> None:
        """Put a and s back into [0, 1], in place."""
        self.mask.clamp_(0, 1)
        self.selection.clamp_(0, 1)

    def begin_stage(self) -> None:
        """Forget the best total."""
        self.best.fill_(math.inf)
        self.waited.zero_()

    def stalled(self, entry: Mapping[str, Any]) -> bool:
        """Take a round's total and tell whether the stage is over."""
        better = float(entry["loss"]) < _BETTER * float(self.best)
        if better:
            self.best.fill_(float(entry["loss"]))
        self.waited.fill_(0 if better else int(self.waited) + 1)
        return int(self.waited) >= self.config.patience

    def compare(self, network: nn.Module, batch: Batch) -> None:
        """Count the images, and those that f_m and f₀ call alike."""
        self.to(batch.images.device)
        x = batch.images.float()
        same = self.probabilities(x).argmax(1) == self.probabilities(x, self.masks()[0]).argmax(1)
        self._seen = self._seen.to(x.device) + torch.stack([same.sum(), same.new_tensor(len(x), dtype=torch.int64)])

    @torch.no_grad()
    def fold(self, accelerator: Accelerator) -> dict[str, float]:
        """Multiply a' into the weights; return the share of `kept` (a' ≥ ½) and `shared` (s ≥ ½) units, and of images
        whose answer stays (`unchanged_answers`)."""
        kept = self.masks()[0]
        self.channels.fold(self.network, kept, kept)
        same, images = accelerator.reduce(self._seen.to(accelerator.device), reduction="sum").tolist()
        shared = (self.selection >= 0.5).float().mean()
        return {"units": float(len(kept)), "kept": float((kept >= 0.5).float().mean()), "shared": float(shared),
                "unchanged_answers": same / images}  # fmt: skip


def soft_mask(mask: Tensor, selection: Tensor, steepness: float) -> Tensor:
    """Return S(a) + s (1 − S(a)) with S(a) = σ(k (a − ½)); of 1 − a it is the inverse mask."""
    hard = torch.sigmoid(steepness * (mask - 0.5))
    return hard + selection * (1 - hard)


def agree(p: Tensor, q: Tensor) -> Tensor:
    """Return −log(⟨p, q⟩ + 10⁻⁸) of probabilities (N×K), shape (N,)."""
    return -((p * q).sum(1) + _TINY).log()


def disagree(p: Tensor, q: Tensor) -> Tensor:
    """Return −log(1 − ⟨p, q⟩ + 10⁻⁸) of probabilities (N×K), shape (N,)."""
    return -((p * (1 - q)).sum(1) + _TINY).log()


def masked_layers(network: nn.Module, units: Literal["auto", "conv", "hidden"]) -> list[MaskedLayer]:
    """Return the layers whose units are masked; raises UsageError when there are none."""
    hidden = unit_layers(network)
    convolutions = units == "conv" or (units == "auto" and (has_batch_norm(network) or not hidden))
    found = _convolutions(network) if convolutions else hidden
    if not found:
        kinds = {"conv": "convolutions", "hidden": "MLPs or attention heads", "auto": "convolutions, MLPs or heads"}
        name = type(getattr(network, "model", network)).__name__
        raise UsageError(f"ims: {name} has no {kinds[units]} whose masks could be folded into its weights; use another "
                         "defense, or units=auto")  # fmt: skip
    return found


def _convolutions(network: nn.Module) -> list[MaskedLayer]:
    """Return the convolutions but the head's that use their weights as they are (a standardised one undoes a mask)."""
    heads = set(head_layers(network))
    # a parametrised weight is no parameter of its module
    found = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
             and "Std" not in type(module).__name__ and name not in heads
             and isinstance(module._parameters.get("weight"), nn.Parameter)}  # fmt: skip
    return [MaskedLayer(f"{name}.weight", f"{name}.bias" if module.bias is not None else None, len(module.weight))
            for name, module in found.items()]  # fmt: skip
