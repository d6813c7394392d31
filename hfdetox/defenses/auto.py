"""D3 as a defense: its settings, and what its preset `auto` finds by itself, never from a trigger.

**How hard.** One λ is a gentle push on one network and a violent one on another, for ‖∇d‖ = 1 whatever the norm R of a
layer: what a run does is how far it turns W. So the distance is made the constraint, and λ follows from it:

    min over θ with W ∈ 𝒮 of  h(θ) = mean_i max(0, ce_i − ε)   s.t.  c(t) = cos ∠(W, W⁰) ≤ c₀ + (c* − c₀) · p(t)

p(t) grows with the learning rate that is spent by step t, after a first part (`HEAD_START`) in which the features learn
to serve the new head and turn it back a little; W is at c* when the rate is 0. The multiplier of the constraint is 1/λ,
moved by dual ascent on its logarithm with a proportional term (as an augmented Lagrangian has), after every step and
without waiting for the device:

    log λ_I ← log λ_I − κ_I · g,    λ = λ_I · exp(−κ_P · g),    g = c(t) − (c₀ + (c* − c₀) · p(t))

A g below 0 counts `AHEAD` times. λ starts where the length of all steps would just do (`first_lambda`): heads have
norms R from below 1 to tens.

**ε** is the median over the clean images of the model's own loss: one on which the cleaned model is as good as the
suspect one is on half of them asks for nothing more. They may be images it was trained on, and its losses near 0, so ε
is at least `LEAST_EPSILON`.

**Augmentation.** A model that never saw crops is wrong on some of them, and few clean images do not teach it crops
while its head turns. Of the augmentations up to the one set, the strongest is taken that costs the model, as it came,
no more than `TOLERATED` of its accuracy on the clean images.

**Where.** The classifier's own layer, started from random weights of its old norm, without the mean of its rows; the
scale of a norm that feeds it is fixed, for its sign could undo the turn.

**Who trains the features.** SGD, as in the paper, where there is BatchNorm, and AdamW where there is none: such
networks are trained with it from the start, and SGD in so few steps leaves their features behind the turning head. The
selected weights are SGD's everywhere, since AdamW's scaling would change what a unit of push is.

**What it said before.** `distillation` adds to h the divergence from what the model said as it came, once the weights
have turned: from the start it would teach the backdoor too. `gratings` shows a share of the images through a random
wave of one frequency, which the teacher does not see: textures that lead to a class are unlearnt without a search.

**How long.** As many epochs as set, or more until `min_steps` optimiser steps are made. It is the constraint that keeps
a backdoor from creeping back, by holding the weights; a rule that stops when they turn back would come too late.

This is hfdetox's own; the paper (arXiv 2411.09585) has constants, and names their choice as open.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses import _by_evidence
from hfdetox.defenses._augmentations import ACCURACY, STRENGTH, TOLERATED, candidates, chosen_augmentation
from hfdetox.defenses.base import FORWARD, Network, TuningConfig, trained_parameters, tuned_images
from hfdetox.defenses.d3 import D3, D3Settings
from hfdetox.defenses.unlearn import UnlearnConfig
from hfdetox.errors import UsageError
from hfdetox.models.layers import has_batch_norm, match_layers
from hfdetox.training.augment import Augmentation, Augmenter
from hfdetox.training.batches import Batch, step_bounds
from hfdetox.training.distillation import Teacher
from hfdetox.training.gratings import with_gratings
from hfdetox.training.mixup import mixed
from hfdetox.training.phases import JointOptimizer, MakeOptimizer, Pass, Phase
from hfdetox.values import Interval, NonNegativeFloat, NonNegativeInt, PositiveFloat

_PROBE, _FIXED, _ADAMW = "d3-look", "fixed_scales", "adamw"
# a true class at 74 %; found, like all constants here, on the first half of the zoo
LEAST_EPSILON = 0.3
# how far λ may go; κ_I and κ_P, and how many times as much weights count that are ahead, for nothing turns them back
# once every image is under ε; and the share of the push that what is learnt turns back, for the first λ
BOUNDS = (0.5, 1e4)
INTEGRAL, PROPORTIONAL = 0.05, 6.0
AHEAD, TURNED_BACK = 5.0, 0.63
# the share of all learning rate after which the weights have to begin to turn
HEAD_START = 0.3
# the share of the steps after which the model as it came may teach: before, it would teach its backdoor too; and how
# far short of c* weights may end before the card says so
FORGETTING, SHORT = 0.6, 0.1
_BATCH = 256
# AdamW's usual decay, with which the networks that it trains were made
_DECAY = 0.05

# settings of the push that a run finds the rest of
_PUSH: dict[str, Any] = {"lambda_": "auto", "epsilon": "auto", "centered": True, "match_augmentation": True,
                         "epochs": 20, "min_steps": 200, "learning_rate": 0.03, "features": "auto",
                         "mixup": 0.2}  # fmt: skip

Auto = Literal["auto"]
Features = Literal["sgd", "adamw", "auto"]


@dataclass(frozen=True, kw_only=True)
class D3Config(D3Settings, TuningConfig):
    """Settings of D3; the defaults are the paper's (preset `paper`).

    Attributes:
        lambda_: as in `D3Settings`, as are those not named here; `--set lambda=…`, preset `code` has 0.5. `auto` moves
            it during the run so that the layers turn as far as `cosine` says.
        epsilon: `auto` takes the median over the clean images of the model's own, as it came.
        cosine: with `lambda=auto`, cos ∠(W, W⁰) at which the selected weights shall end, in (−1, 0).
        match_augmentation: use the strongest augmentation up to `augmentation` under which the model, as it came, is
            as right on the clean images as without (see `TOLERATED`): others ask it to learn what it never saw.
        mixup: α of mixup (arXiv 1710.09412), at least 0: images are blended in pairs with a share drawn from Beta(α, α)
            for each batch, and so are their losses; 0 blends none. Pairs are of one process.
        min_steps: optimiser steps of the run at least: with few images it takes more epochs than `epochs`. `--epochs`
            without it takes a preset's back.
        features: what trains everything but the selected weights, which are always SGD's: `sgd` as in the paper,
            `adamw`, or `auto`, AdamW for networks without BatchNorm.
        features_learning_rate: of AdamW, before the cosine schedule, positive.
        reconstruct: first search triggers as `unlearn` does. Where one speaks for a backdoor they are unlearnt, and
            nothing is pushed; where none does, or none can be searched, the weights are pushed as without it.
        distillation: how much the difference from the answers of the model as it came (KL at a temperature of 2) counts
            beside the clean loss, at least 0; where a run finds something itself, in the last 40 % of its steps.
        gratings: the share of the images that the model sees with a random grating, and its teacher without, in [0, 1);
            none where images are no grey levels.
    """

    name = "d3"
    summary = "keep the clean loss under a threshold while pushing selected weights far from the old ones"
    paper = "arXiv 2411.09585 (ICCV 2025)"
    cost = "1"
    card_text = ("D3, distance-driven detoxification (arXiv 2411.09585), fine-tuned the model on {images} while "
                 "pushing the weights of the selected layers away from where the author left them, on the sphere of "
                 "their initial norm, as far as the loss on those images allows.")  # fmt: skip
    presets: ClassVar = {"paper": {}, "code": {"lambda_": 0.5},
                         "auto": {**_PUSH, "reconstruct": True, "distillation": 1.0, "gratings": 0.1},
                         "auto-1": _PUSH}  # fmt: skip

    lambda_: PositiveFloat | Auto = 10.0
    epsilon: NonNegativeFloat | Auto = 0.1
    cosine: Annotated[float, Interval("(-1, 0)")] = -0.4
    match_augmentation: bool = False
    mixup: NonNegativeFloat = 0.0
    min_steps: NonNegativeInt = 0
    features: Features = "sgd"
    features_learning_rate: PositiveFloat = 5e-4
    reconstruct: bool = False
    distillation: NonNegativeFloat = 0.0
    gratings: Annotated[float, Interval("[0, 1)")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruct and self.reweight != "none":
            raise UsageError(f"d3: {UnlearnConfig.unweighted}; take the preset auto-1, or leave reweight out")

    @property
    def automatic(self) -> bool:
        """Whether a look at the model and the clean images comes before the training."""
        return "auto" in (self.lambda_, self.epsilon) or self.match_augmentation or self.min_steps > 0

    def settled(self, *, batch_norm: bool) -> Self:
        return self if self.features != "auto" else replace(self, features="sgd" if batch_norm else "adamw")

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        pushed = tuned_images(self, images) * (1 + FORWARD if self.distillation else 1)
        pushed += FORWARD * len(STRENGTH) * images if self.automatic else 0
        if not self.reconstruct:
            return (pushed,)
        unlearning = self._unlearning
        looked = 2 * FORWARD * images + unlearning.searched(classes, most=False, rounds=False)
        return *unlearning.efforts(images, classes), looked + pushed

    def selected_layers(self, model: nn.Module) -> list[str]:
        return match_layers(model, self.layers)

    def choices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        found = next((entry for entry in history if entry.get("phase") == _PROBE), None)
        ways = _by_evidence.ways(self._unlearning, history) if self.reconstruct and history else []
        if found is None or not self.automatic:
            return ways
        return ways + self._pushed(found, history)

    @property
    def text_of_card(self) -> str:
        return _by_evidence.CARD_TEXT if self.reconstruct else self.card_text

    def _pushed(self, found: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what the look `found` and what came of it, a sentence each."""
        said = [f"Selected: {', '.join(self.layers)}, which is turned away from its old weights. It started from "
                f"{self.initialization} weights as large as the old ones. "
                + ("How far it has turned is measured without the mean over the classes, which changes no answer. "
                   if self.centered else "")
                + ("The normalisation before it kept its scale, which could have undone the turn by changing its sign."
                   if found[_FIXED] else "No normalisation stands before it that could undo the turn.")]  # fmt: skip
        if self.features == "auto":
            said.append("AdamW trained the features, for the network has no BatchNorm." if found[_ADAMW] else
                        "SGD trained the features, for the network has BatchNorm.")  # fmt: skip
        if self.match_augmentation:
            tried = [name for name in STRENGTH if ACCURACY + name in found]
            rates = ", ".join(f"{name} {100 * found[ACCURACY + name]:.1f} %" for name in tried)
            said.append(f"Augmentation {chosen_augmentation(found)}: the strongest that cost the model as it came at "
                        f"most {100 * TOLERATED:.0f} point of accuracy on the trusted images ({rates}).")  # fmt: skip
        if self.epsilon == "auto":
            said.append(f"ε = {found['epsilon']:.3f}: the median of that model's losses on them, but at least "
                        f"{LEAST_EPSILON}.")  # fmt: skip
        if self.distillation:
            said.append(f"After {100 * FORGETTING:.0f} % of the steps it was also held to what it said as it came "
                        "(distillation).")  # fmt: skip
        if self.min_steps:
            said.append(f"{found['epochs']:.0f} epochs, {found['steps']:.0f} steps: at least {self.epochs} epochs and "
                        f"{self.min_steps} steps.")  # fmt: skip
        trained = [entry for entry in history if "lambda" in entry]
        if self.lambda_ == "auto" and trained:
            values, ended = [entry["lambda"] for entry in trained], trained[-1]["cosine"]
            said.append(f"λ between {min(values):.2f} and {max(values):.2f}, moved after every step so that the "
                        f"selected weights turn to a cosine of {self.cosine:g} with the old ones; they ended at "
                        f"{ended:.2f}.")  # fmt: skip
            if ended > self.cosine + SHORT:
                said.append("That is short of it: the clean images held them back although λ fell to "
                            f"{values[-1]:.2f}.")  # fmt: skip
        return said

    def phases(self, network: Network) -> list[Phase | Pass]:
        d3 = AutoD3(network.model, self) if self.automatic else D3(network.model, self)
        teacher = Teacher(network) if self.distillation else None
        searched = _by_evidence.searched(network, self._unlearning) if self.reconstruct else None
        share = self.gratings if self.gratings and network.normalizes else 0.0

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            images, *mixing = mixed(batch, self.mixup)
            seen = _by_evidence.with_triggers(images, searched)
            logits = model(with_gratings(seen, share) if share else seen)
            asked = teacher if d3.forgotten else None
            kept = self.distillation * asked.divergence(images, logits, batch.weights) if asked else None
            return d3.terms(logits, batch.labels, batch.weights, *mixing, kept=kept)

        trained = trained_parameters(network, but=d3.frozen_scales)
        phase = self.phase(name="d3", parameters=trained, loss=loss, start=d3.initialize, after_step=d3.project,
                           state=d3, optimizer=self._optimizer(network, d3))  # fmt: skip
        push: list[Phase | Pass] = [d3.probe_pass(phase), phase] if isinstance(d3, AutoD3) else [phase]
        return _by_evidence.by_evidence(searched, self._unlearning, push) if searched else push

    @property
    def _unlearning(self) -> UnlearnConfig:
        """The settings of the unlearning that comes first."""
        return _by_evidence.unlearning_of(self, self.features)

    def adamw_for(self, model: nn.Module) -> bool:
        """Tell whether AdamW trains what is not selected of `model`."""
        return self.features == "adamw" or (self.features == "auto" and not has_batch_norm(model))

    def _optimizer(self, network: Network, d3: D3) -> MakeOptimizer:
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


class AutoD3(D3):
    """D3 with what it finds itself: `probe_pass` gives the pass that runs before the phase, and sets the phase up.

    Attributes:
        lambda_: λ of the next step, 0-d float32 on the weights' device.
        log_lambda: log λ_I, as `lambda_`.
        step: optimiser steps made, of `steps` in all.
        losses, right, batches: of the probe pass: each image's loss, the right answers by augmentation, batches seen.
    """

    def __init__(self, model: nn.Module, config: D3Config) -> None:
        """Start with what the settings fix; raises what D3 raises."""
        # the first λ needs the number of steps, which the look finds
        lambda_ = BOUNDS[1] if isinstance(config.lambda_, str) else config.lambda_
        epsilon = 0.0 if isinstance(config.epsilon, str) else config.epsilon
        super().__init__(model, replace(config, lambda_=lambda_, epsilon=epsilon))
        self.wanted, self.adamw = config, config.adamw_for(model)
        self.phase: Phase | None = None
        self.augmentation, self.epochs = config.augmentation, config.epochs
        self.step = self.steps = self.batches = 0
        self.losses: list[float] = []
        self.right: dict[Augmentation, int] = {}
        device = next(iter(self.weights.values())).device
        self.lambda_ = torch.tensor(lambda_, device=device)
        self.log_lambda, self.first = self.lambda_.log(), torch.zeros((), device=device)

    @property
    def forgotten(self) -> bool:
        return self.step >= FORGETTING * self.steps

    def probe_pass(self, phase: Phase) -> Pass:
        """Return the pass that looks at the model and the images; `phase` gets what follows from them."""
        self.phase = phase
        return Pass(name=_PROBE, on_batch=self.on_batch, finish=self.choose, batch_size=_BATCH, part=phase.part,
                    state=self, says=self.length)  # fmt: skip

    def length(self, found: Mapping[str, float]) -> str:
        """Return how long the training will be, from what the probe pass found."""
        epochs, images = int(found["epochs"]), int(found["images"])
        return f"d3: {epochs:,} epochs of {images:,} images: {epochs * images:,} image passes"

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Count how right the model is under each augmentation, and note its losses."""
        config = self.wanted
        if not self.right:
            names = candidates(config.augmentation, batch.images.shape[-2])
            self.right = dict.fromkeys(names if config.match_augmentation else names[:1], 0)
        for name in self.right | {"none": 0}:
            augmenter = Augmenter(name, 0)
            # the numbers of a whole batch, of which this process takes those of its own images
            numbers = augmenter.draw(0, 0, self.batches, _BATCH)[batch.positions % _BATCH]
            logits = network(augmenter(batch.images, numbers)).float()
            if name in self.right:
                self.right[name] += int((logits.argmax(1) == batch.labels).sum())
            if name == "none":
                self.losses += cross_entropy(logits, batch.labels, reduction="none").tolist()
        self.batches += 1

    def choose(self, accelerator: Accelerator) -> dict[str, float]:
        """Take what follows from all processes' images; return it, for the history."""
        config, losses = self.wanted, torch.tensor(gather_object(self.losses))
        counts = torch.tensor([float(count) for count in self.right.values()], device=accelerator.device)
        shares = (accelerator.reduce(counts, reduction="sum") / len(losses)).tolist()
        found = {ACCURACY + name: share for name, share in zip(self.right, shares, strict=True)}
        parts = config.gradient_accumulation_steps * accelerator.num_processes
        steps = len(step_bounds(len(losses), config.batch_size, parts))
        epochs = max(config.epochs, math.ceil(config.min_steps / steps))
        epsilon = max(LEAST_EPSILON, float(losses.median())) if isinstance(config.epsilon, str) else config.epsilon
        self._set_up(epsilon, epochs, epochs * steps, chosen_augmentation(found))
        return {**found, "clean_loss": float(losses.mean()), "epsilon": epsilon, "epochs": epochs, "steps": self.steps,
                "images": len(losses), _FIXED: float(len(self.frozen_scales)), _ADAMW: float(self.adamw)}  # fmt: skip

    @torch.no_grad()
    def initialize(self) -> None:
        super().initialize()
        self.first = self.cosine()
        if self.wanted.lambda_ == "auto":
            low, high = BOUNDS
            first = first_lambda(self.wanted, self.steps, [float(old.norm()) for old in self.initial.values()])
            self.lambda_ = torch.tensor(min(max(first, low), high), device=self.first.device)
            self.log_lambda = self.lambda_.log()

    def terms(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        """Return what D3 returns, and λ."""
        return {**super().terms(*arguments, **named), "lambda": self.lambda_}

    def objective(self, penalty: Tensor, distance: Tensor) -> Tensor:
        """Return (λ·h − d) / (λ + 1), for any λ: a step must not grow when λ falls below 1."""
        return (self.lambda_ * penalty - distance) / (self.lambda_ + 1)

    @torch.no_grad()
    def project(self) -> None:
        """Project as D3 does, and move λ by how far the weights lag behind the constraint."""
        super().project()
        self.step += 1
        if self.wanted.lambda_ == "auto":
            wanted = self.first + (self.wanted.cosine - self.first) * path(self.step / self.steps)
            gap = self.cosine() - wanted
            lag = torch.where(gap < 0, AHEAD * gap, gap)
            low, high = (math.log(bound) for bound in BOUNDS)
            self.log_lambda = (self.log_lambda - INTEGRAL * lag).clamp(low, high)
            self.lambda_ = (self.log_lambda - PROPORTIONAL * lag).clamp(low, high).exp()

    def state_dict(self) -> dict[str, Tensor]:
        numbers = [self.epsilon, self.epochs, self.steps, self.step, STRENGTH.index(self.augmentation)]
        return {**super().state_dict(), "auto.numbers": torch.tensor(numbers, dtype=torch.float64),
                "auto.lambda": torch.stack([self.lambda_, self.log_lambda, self.first]).cpu()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("auto.")})
        epsilon, *numbers = state["auto.numbers"].tolist()
        epochs, steps, self.step, augmentation = map(int, numbers)
        self._set_up(epsilon, epochs, steps, STRENGTH[augmentation])
        device = next(iter(self.weights.values())).device
        self.lambda_, self.log_lambda, self.first = state["auto.lambda"].to(device)

    def _set_up(self, epsilon: float, epochs: int, steps: int, augmentation: Augmentation) -> None:
        self.epsilon, self.epochs, self.steps, self.augmentation = epsilon, epochs, steps, augmentation
        if self.phase is not None:
            self.phase.epochs, self.phase.augmentation = epochs, augmentation


def path(progress: float) -> float:
    """Return p, the share of the way to c* that shall be made at `progress` of the steps; both in [0, 1]."""
    spent = progress + math.sin(math.pi * progress) / math.pi
    return max(0.0, (spent - HEAD_START) / (1 - HEAD_START))


def first_lambda(config: D3Config, steps: int, norms: Sequence[float]) -> float:
    """Return the λ that would turn weights of these norms R by asin(−c*) in a run of so many steps.

    Of the steps' lengths, lr / (1 − momentum) and half of it on average, the push has the share 1 / (λ + 1), of which
    `TURNED_BACK` is lost; it turns a weight by length / R.
    """
    length = steps * config.learning_rate / (1 - config.momentum) / 2
    radius = sum(norms) / len(norms)
    return (1 - TURNED_BACK) * length / (radius * math.asin(-config.cosine)) - 1
