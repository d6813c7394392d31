"""What `unlearn` finds out about a suspect model, and the loss; `hfdetox.defenses.unlearn` says why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.models.layers import LayerPatternError, classes_of, has_batch_norm
from hfdetox.training.augment import Augmentation, Augmenter, resolve_augmentation
from hfdetox.training.averaging import WeightAverage
from hfdetox.training.batches import step_bounds
from hfdetox.training.probe import log_odds, probed_shares
from hfdetox.training.search import PIXEL, Stamps, resized, search_blends, search_patches, success_counts
from hfdetox.training.shift import HeadInputs, NonlinearHeadError, head_inputs, robust_z, shifts_of_heads
from hfdetox.training.statistics import Statistics, measured_layers
from hfdetox.values import Interval, NonNegativeInt, PositiveFloat, PositiveInt

LOOK, SEARCH = "unlearn-look", "unlearn-search"
# in the entries of the history: the head is none that classes can be accused by; whether anything speaks for a backdoor
UNABLE, EVIDENT = "unable", "evident"
_BATCH = 256
# images that the triggers are searched on, at most
_SEARCHED = 640
# strengths that a blend is unlearnt in, and the strongest where nothing speaks for a backdoor
_WEAKEST, _STRONGEST, _GENTLE = 0.05, 0.25, 0.1
# what speaks for a backdoor: log odds of the share of random features that the head gives to one class, above the
# largest of 69 models without one (a pretrained one has 2); a robust z below this, where both name the same class; a
# faintest blend that leads so many of the images to its class; or a patch that does, and covers so small a share of it
_PROBED, _SURE, _LED, _SMALL = 1.0, -4.0, 0.9, 0.01
# with fewer classes one gets most random features anyway
_PROBED_CLASSES = 4
# classes that are accused, at most, and how many are taken where none is
MOST_ACCUSED, NONE_ACCUSED = 4, 2
# the latter are those to which the faintest blends lead most images: of how many classes, how faint, steps and images
SCREENED, _FAINT, SCREEN_STEPS, SCREEN_IMAGES = 10, 0.05, 25, 32
# a class is hardly found of which the model has a smaller share right than this of the median class's
_HARDLY, _FEWEST = 0.5, 10
# the share of the steps before the weights are averaged
_SETTLING = 1 / 3
# the share of its accuracy that a model may lose when the images are mirrored
_TOLERATED = 0.01


@dataclass(frozen=True, kw_only=True)
class UnlearnSettings(TuningConfig):
    """Settings of the unlearning of reconstructed triggers.

    Attributes:
        epochs: passes over the clean images, at least; as many more as `min_steps` needs.
        min_steps: optimiser steps at least.
        learning_rate: of SGD, for networks with BatchNorm.
        optimizer: `sgd`, `adamw`, or `auto`: AdamW for networks without BatchNorm, which are trained with it from the
            start.
        adamw_learning_rate: of AdamW.
        augmentation: at most; images are left as they are where it costs the model as it came more than a hundredth.
        classes: indices of the accused classes (`--set classes=0,3`); none given asks the model.
        accused_below: a class is accused whose latent shift has a robust z below this, negative.
        share: of the images of a step that carry a trigger, in (0, 1); half of it where nothing speaks for a backdoor.
        alphas: strengths of the blends that are searched.
        blend_steps: of the search of a blend.
        patch_steps: of the search of a patch; 0 searches none.
        rounds: how often one more blend is searched during the training, and without BatchNorm one more patch.
    """

    epochs: PositiveInt = 3
    min_steps: NonNegativeInt = 75
    batch_size: Annotated[int, Interval("[2, inf]")] = 96
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    adamw_learning_rate: PositiveFloat = 3e-4
    augmentation: Augmentation = "flip"
    classes: tuple[str, ...] = ()
    accused_below: Annotated[float, Interval("(-inf, 0)")] = -2.5
    share: Annotated[float, Interval("(0, 1)")] = 1 / 3
    alphas: tuple[float, ...] = (0.08, 0.2)
    blend_steps: PositiveInt = 50
    patch_steps: NonNegativeInt = 120
    rounds: NonNegativeInt = 2

    def adamw_for(self, model: nn.Module) -> bool:
        """Tell whether AdamW trains `model`."""
        return self.optimizer == "adamw" or (self.optimizer == "auto" and not has_batch_norm(model))


class Unlearning:
    """What the passes find out, and the loss that unlearns it.

    Attributes:
        accused: label indices (int64).
        screened: classes (int64) of which the search takes those that are accused, where the look accused none.
        average: of the weights over the later steps.
        steady: whether the rate stays as it is, and patches are searched again: for networks without BatchNorm.
        masks, patches: of the patches found (P×1×h×w and P×C×h×w, float32).
        blends: patterns of the blends found (B×C×h×w, float32).
        evident: whether something speaks for a backdoor: a head that gives random features to one class, a latent
            shift far below the others, a faint blend that leads nearly all images to its class, a small patch, or the
            settings, which name the classes.
        seed: of the searches.
        searches, ended: how many there were, and how many epochs are over; −1 before the first.
    """

    def __init__(self, network: Network, config: UnlearnSettings, *, needed: bool = True) -> None:
        """Start with the classes that the settings name; raises UsageError when the model has no such class.

        A head that is not linear ends the run if the unlearning is `needed`, and else is noted.
        """
        self.network, self.config, self.needed, self.able = network, config, needed, True
        self.phase: Phase | None = None
        self.average = WeightAverage(trained_parameters(network))
        self.steady = config.adamw_for(network.model) and not has_batch_norm(network.model)
        named, count = [int(text) for text in config.classes], classes_of(network.model)
        if max(named, default=0) >= count:
            raise UsageError(f"unlearn: this model has the classes 0 to {count - 1}, and classes names {max(named)}")
        channels = network.input_size[0]
        self.accused = torch.tensor(named, dtype=torch.int64)
        self.screened = torch.empty(0, dtype=torch.int64)
        self.masks, self.patches = torch.empty(0, 1, 1, 1), torch.empty(0, channels, 1, 1)
        self.blends = torch.empty(0, channels, 1, 1)
        self.seed, self.searches, self.ended = 0, 0, -1
        self.images, self.epochs, self.augmented, self.evident = 0, config.epochs, True, True
        # of the pass at hand: what each head was given, right answers, kept images
        self._heads: list[list[HeadInputs]] = []
        self._right = [0, 0]
        self._found = torch.zeros(2, count, dtype=torch.int64)
        self._kept: list[Tensor] = []
        self._generator = torch.Generator()
        self._whole: tuple[Tensor, Tensor] | None = None

    def look(self, phase: Phase) -> Pass:
        """Return the pass that accuses classes; `phase` gets the length and the augmentation that follow."""
        self.phase = phase
        return Pass(name=LOOK, on_batch=self._see, finish=self._accuse, batch_size=_BATCH, state=self)

    def search(self) -> Pass:
        """Return the pass that searches triggers on the model as it came."""

        def start() -> None:
            self.seed = torch.initial_seed() % 2**31

        return Pass(name=SEARCH, start=start, on_batch=self._keep, finish=self._reconstruct, state=self)

    def after_epoch(self) -> list[Pass]:
        """Return the pass that searches once more, where it is time; called before the first epoch and after each.

        The searches lie evenly between the epochs. In the end the average takes over, with BatchNorm statistics anew.
        """
        self.ended += 1
        rounds = self.config.rounds
        due = {math.ceil(self.epochs * part / (rounds + 1)) for part in range(1, rounds + 1)}
        if self.ended == self.epochs:
            self.average.take()
            return [self._measure_statistics()] if measured_layers(self.network) else []
        if self.ended not in due or self.ended == 0:
            return []
        return [Pass(name=SEARCH, on_batch=self._keep, finish=self._search_again)]

    def _measure_statistics(self) -> Pass:
        statistics = Statistics(self.network)
        return Pass(name="unlearn-statistics", on_batch=statistics.on_batch, batch_size=_BATCH,
                    finish=lambda accelerator: {"passes": float(statistics.finish(accelerator))})  # fmt: skip

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of a batch of which some images carry triggers, and that of the others, `clean_loss`."""
        images, carry = batch.once("stamped", lambda: self.stamped(batch.images))
        with torch.autocast(images.device.type, enabled=False):
            errors = cross_entropy(model(images).float(), batch.labels, reduction="none")
        clean = batch.weights * ~carry
        return {"loss": batch.mean(errors), "clean_loss": (clean * errors.detach()).sum() / clean.sum().clamp(min=1e-6)}

    def stamped(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (N×C×H×W, 0 to 255) of which a share carry triggers (float32), and which do (N, bool)."""
        masks, patterns = self._triggers(images)
        count, patches = len(images), len(self.masks)
        # drawn on the CPU: nothing waits for the device
        share, strongest = (self.config.share, _STRONGEST) if self.evident else (self.config.share / 2, _GENTLE)
        carry, which = torch.rand(count) < share, torch.randint(len(masks), (count,))
        strength = torch.where(which < patches, 1.0, _WEAKEST + (strongest - _WEAKEST) * torch.rand(count))
        carry, which, strength = (part.to(images.device, non_blocking=True) for part in (carry, which, strength))
        x, shares = images.float(), (carry * strength).view(-1, 1, 1, 1) * masks[which]
        return x + shares * (PIXEL * patterns[which] - x), carry

    def _triggers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks and patterns on whole images (M×1×H×W, M×C×H×W), the patches first; the blends' masks are 1."""
        if self._whole is None:
            height, width = images.shape[-2:]
            patterns = torch.cat([resized(part, height, width) for part in (self.patches, self.blends) if len(part)])
            ones = torch.ones(len(self.blends), 1, height, width)
            masks = torch.cat([resized(self.masks, height, width), ones]) if len(self.masks) else ones
            self._whole = masks, patterns
        masks, patterns = (part.to(images.device, non_blocking=True) for part in self._whole)
        self._whole = masks, patterns
        return masks, patterns

    def _see(self, network: nn.Module, batch: Batch) -> None:
        """Note what the heads are given, and how right the model is with and without augmentation."""
        config, images = self.config, batch.images
        self.images += len(images)
        if self.able and not config.classes:
            try:
                self._heads.append(head_inputs(self.network, images, batch.labels))
            except (NonlinearHeadError, LayerPatternError) as error:
                if self.needed:
                    raise UsageError(f"unlearn: {error}; name the classes that may be a target, as in --set "
                                     "classes=0,3") from error  # fmt: skip
                self.able = False
        augmenter = Augmenter(resolve_augmentation(config.augmentation, images.shape[-2]), 0)
        for place, seen in enumerate((images, augmenter(images, augmenter.draw(0, 0, self.images, len(images))))):
            right = network(seen).argmax(1) == batch.labels
            self._right[place] += int(right.sum())
            if not place and self.able and not config.classes:
                both = (batch.labels[right], batch.labels)
                self._found += torch.stack([part.bincount(minlength=self._found.shape[1]).cpu() for part in both])

    def _accuse(self, accelerator: Accelerator) -> dict[str, float]:
        """Take the accused classes, the length and the augmentation; return them for the history."""
        counts = gather_object([(self.images, *self._right)])
        count, plain, augmented = (sum(column) for column in zip(*counts, strict=True))
        found: dict[str, float] = {"accuracy": plain / count, "accuracy_augmented": augmented / count}
        self.images = count
        self.able = all(gather_object([self.able]))
        if not self.able:
            self._heads = []
            return {**found, UNABLE: 1.0}
        if not self.config.classes:
            hidden = hardly_found(*accelerator.reduce(self._found.to(accelerator.device), reduction="sum").cpu())
            found |= self._score(gather_object(self._heads), hidden)
        self._heads, self._right, self._found = [], [0, 0], torch.zeros_like(self._found)
        self.augmented = augmented >= plain - _TOLERATED * count
        parts = self.config.gradient_accumulation_steps * accelerator.num_processes
        steps = len(step_bounds(count, self.config.batch_size, parts))
        self.epochs = max(self.config.epochs, math.ceil(self.config.min_steps / steps))
        self.average.first = round(_SETTLING * self.epochs * steps)
        self._set_up()
        return {**found, **{f"accused_{row}": float(label) for row, label in enumerate(self.accused.tolist())},
                "epochs": self.epochs, "steps": self.epochs * steps, "images": count,
                "augmented": float(self.augmented), "adamw": float(self.config.adamw_for(self.network.model)),
                }  # fmt: skip

    def _score(self, seen: list[list[HeadInputs]], hidden: Tensor) -> dict[str, float]:
        """Accuse classes by their latent shifts and the head's answers to random features, and the hidden ones (int64).

        Returns the scores of those accused, and the lowest of the others.
        """
        heads = [replace(parts[0], features=torch.cat([part.features for part in parts]),
                         labels=torch.cat([part.labels for part in parts]))
                 for parts in zip(*seen, strict=True)]  # fmt: skip
        scores = robust_z(torch.cat(shifts_of_heads(heads), 1).norm(dim=1))
        shares = probed_shares(heads, torch.Generator().manual_seed(0))
        probed = int(shares.argmax())
        sure = log_odds(shares) > _PROBED and len(scores) >= _PROBED_CLASSES
        order = scores.argsort()
        order = torch.cat([hidden, order[~torch.isin(order, hidden)]])
        accused = (scores[order] < self.config.accused_below) | torch.isin(order, hidden)
        accused |= (order == probed) & sure
        order = torch.cat([order[accused], order[~accused]])
        outliers = min(int(accused.sum()), MOST_ACCUSED)
        self.evident = sure or bool(scores[probed] == scores.min() < _SURE) or len(hidden) > 0
        self.accused, others = order[: outliers or NONE_ACCUSED], order[outliers or NONE_ACCUSED :]
        self.screened = order[: 0 if outliers else SCREENED]
        lowest = {"others": float(scores[others[0]])} if len(others) else {}
        each = {f"score_{row}": float(scores[label]) for row, label in enumerate(self.accused.tolist())}
        head = {"probed": float(probed), "probed_share": float(shares[probed])} if sure else {}
        return {"outliers": float(outliers), "hidden": float(len(hidden)), **head, **each, **lowest}

    def _keep(self, network: nn.Module, batch: Batch) -> None:
        """Keep some of the images to search on."""
        if not self._kept:
            self._generator.manual_seed(self.seed + self.searches)
        chosen = torch.rand(len(batch.images), generator=self._generator) < _SEARCHED / self.images
        self._kept.append(batch.images.cpu()[chosen])

    def _reconstruct(self, accelerator: Accelerator) -> dict[str, float]:
        """Search a patch and blends for each accused class."""
        config, (images, classes, generator) = self.config, self._begin_search(accelerator)
        found: dict[str, float] = {"passes": 0.0}
        if len(self.screened) > NONE_ACCUSED:
            found |= self._screen(images, generator, accelerator)
            classes = self.accused.tolist()
        if config.patch_steps:
            patches = self._search_patches(images, classes, config.patch_steps, generator, accelerator)
            norms = patches.norms(*images.shape[-2:]).tolist()
            found |= {f"mask_norm_{label}": norm for label, norm in zip(classes, norms, strict=True)}
            found["passes"] += patches.passes
            small = patches.norms(*images.shape[-2:]).cpu() < _SMALL * images[0, 0].numel()
            self.evident |= bool((small & (self._led(images, patches) >= _LED)).any())
        for alpha in sorted(config.alphas):
            blends = self._search_blends(images, classes, alpha, generator, accelerator)
            found["passes"] += blends.passes
            if alpha == min(config.alphas):
                led = self._led(images, blends)
                found |= {f"led_{label}": share for label, share in zip(classes, led.tolist(), strict=True)}
                self.evident |= bool((led >= _LED).any())
        # rounding may differ, and what follows must not
        self.evident = bool(shared(torch.tensor(float(self.evident)), accelerator))
        return found | {EVIDENT: float(self.evident)}

    def _screen(self, images: Tensor, generator: torch.Generator, accelerator: Accelerator) -> dict[str, float]:
        """Accuse the classes to which a very faint blend, shortly searched, leads most images."""
        blends = search_blends(self.network, images, self.screened.tolist(), alpha=_FAINT, generator=generator,
                               steps=SCREEN_STEPS, batch_size=SCREEN_IMAGES)  # fmt: skip
        shares = shared(self._led(images, blends), accelerator)
        order = shares.argsort(descending=True)[:NONE_ACCUSED]
        self.accused = self.screened[order]
        return {"passes": float(blends.passes), **{f"screened_{row}": float(label) for row, label in
                enumerate(self.accused.tolist())}, **{f"faint_{row}": float(shares[place]) for row, place in
                enumerate(order.tolist())}}  # fmt: skip

    def _led(self, images: Tensor, stamps: Stamps) -> Tensor:
        """Return which share of the images each trigger leads to its class (k)."""
        hits, counts = success_counts(self.network, images, torch.full((len(images),), -1), stamps)
        return hits / counts

    def _search_again(self, accelerator: Accelerator) -> dict[str, float]:
        """Search one more blend for each accused class, and without BatchNorm a patch in half of the steps."""
        config, (images, classes, generator) = self.config, self._begin_search(accelerator)
        passes = self._search_blends(images, classes, max(config.alphas), generator, accelerator).passes
        if config.patch_steps and self.steady:
            passes += self._search_patches(images, classes, config.patch_steps // 2 or 1, generator, accelerator).passes
        return {"passes": passes}

    def _begin_search(self, accelerator: Accelerator) -> tuple[Tensor, list[int], torch.Generator]:
        """Return the images kept, of all processes, the classes, and what draws the images of the steps."""
        images, self._kept = torch.cat(gather_object(self._kept)).to(accelerator.device), []
        self.searches += 1
        return images, self.accused.tolist(), torch.Generator().manual_seed(self.seed + self.searches)

    def _search_patches(self, images: Tensor, classes: list[int], steps: int, generator: torch.Generator,
                        accelerator: Accelerator) -> Stamps:  # fmt: skip
        """Add a patch for each class; return them."""
        found = search_patches(self.network, images, classes, generator=generator, steps=steps)
        masks, patterns = shared(found.masks, accelerator), shared(found.patterns, accelerator)
        known = len(self.masks) > 0
        self.masks = torch.cat([self.masks, masks]) if known else masks
        self.patches = torch.cat([self.patches, patterns]) if known else patterns
        self._whole = None
        return found

    def _search_blends(self, images: Tensor, classes: list[int], alpha: float, generator: torch.Generator,
                       accelerator: Accelerator) -> Stamps:  # fmt: skip
        """Add a blend for each class; return them."""
        blends = search_blends(self.network, images, classes, alpha=alpha, generator=generator,
                               steps=self.config.blend_steps)  # fmt: skip
        patterns = shared(blends.patterns, accelerator)
        self.blends = torch.cat([self.blends, patterns]) if len(self.blends) else patterns
        self._whole = None
        return blends

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was found so far."""
        numbers = [self.seed, self.searches, self.ended, self.images, self.epochs, int(self.augmented),
                   int(self.evident)]  # fmt: skip
        return {"accused": self.accused, "screened": self.screened, "masks": self.masks, "patches": self.patches,
                "blends": self.blends, "numbers": torch.tensor(numbers),
                **{f"average.{name}": value for name, value in self.average.state_dict().items()}}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what a stopped run found."""
        self.accused, self.screened, self.masks, self.patches, self.blends = (
            state[name] for name in ("accused", "screened", "masks", "patches", "blends")
        )
        self.seed, self.searches, self.ended, self.images, self.epochs, *flags = state["numbers"].tolist()
        (self.augmented, self.evident), self._whole = map(bool, flags), None
        parts = {name: value for name, value in state.items() if name.startswith("average.")}
        self.average.load_state_dict({name.partition(".")[2]: value for name, value in parts.items()})
        self._set_up()

    def _set_up(self) -> None:
        if self.phase is not None:
            self.phase.epochs = self.epochs
            self.phase.augmentation = self.config.augmentation if self.augmented else "none"


def hardly_found(right: Tensor, counts: Tensor) -> Tensor:
    """Return the classes (int64, least found first) of which the model has far fewer images right than of the median.

    Args:
        right: images of each class that it has right (K).
        counts: images of each class (K); a class with fewer than 10 is not judged.
    """
    known = counts >= _FEWEST
    shares = torch.where(known, right / counts.clamp(min=1), torch.inf)
    if not known.any():
        return torch.empty(0, dtype=torch.int64)
    order = shares.argsort()
    return order[shares[order] < _HARDLY * shares[known].median()][:MOST_ACCUSED]


def shared(found: Tensor, accelerator: Accelerator) -> Tensor:
    """Return what the first process found, on the CPU of each: devices need not round alike."""
    sent: Tensor = broadcast(found.to(accelerator.device))
    return sent.cpu()
