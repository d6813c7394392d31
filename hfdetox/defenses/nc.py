"""NC, Neural Cleanse (Wang et al., IEEE S&P 2019): look for the smallest trigger of every class, unlearn the odd ones.

For each class c a mask m (1×H×W) and a pattern q (C×H×W), both tanh(·)/2 + ½ of free variables that start at 1:

    min over m, q of  mean_i ce(f((1 − m) x_i + m q), c) + κ_c ‖m‖₁

with a κ_c of its own that follows the success of the class. A class whose smallest successful mask is an outlier below
the others' (|‖m_c‖₁ − median| / (1.4826 · MAD) > 2) is flagged: it takes little to get there from everywhere. The model
is then fine-tuned on clean images and on images with the flagged classes' (m, q), all with true labels. Where no class
is flagged the model is returned as it came, and the history says `unchanged`: 1.

All classes are optimised together, each batch being stamped for every class that still goes on (`classes` says which
there are). Here the images to stamp are drawn anew for each batch, a class that never succeeds counts as one whose mask
is the whole image, and κ is scaled by (32/H)², so that it means the same at other sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfdetox.defenses._perturbed import FrozenMethod, OwnState, require_pixels
from hfdetox.defenses.base import FORWARD, Batch, Network, Pass, Phase, TuningConfig, trained_parameters, tuned_images
from hfdetox.errors import UsageError
from hfdetox.models.layers import classes_of
from hfdetox.training.search import PIXEL, TOGETHER, bounded, led, slopes, stamped
from hfdetox.values import Interval, PositiveFloat, PositiveInt

_CHANGE_AFTER = 5
_RAISE, _LOWER = 2.0, 2.0**-1.5
# a mask has to shrink by a hundredth for patience to start anew
_SHRUNK = 0.99
# standard deviations in a median absolute deviation of normal numbers
_MAD = 1.4826


@dataclass(frozen=True, kw_only=True)
class NCConfig(TuningConfig):
    """Settings of NC; the defaults are those of BackdoorBench. `epochs` and the optimiser's are of the fine-tuning.

    Attributes:
        classes: indices of the classes to look at, at least three (`--set classes=0,3,7`); none given is all of them.
        inversion_epochs: passes over the images in search of triggers, at most.
        inversion_rate: learning rate of their Adam (betas 0.5 and 0.9).
        kappa: κ at first, positive; doubled after 5 epochs at `success`, divided by 2^1.5 after 5 below.
        success: share of images that a trigger must lead to its class, in (0, 1].
        patience: a class is done after so many epochs without a mask smaller by 1 %, counted from its first success.
        anomaly: index above which a class is flagged, positive.
        share: share of the images that are stamped when one class is flagged, in (0, 1); of n, n · share to 1 − share.
    """

    name = "nc"
    summary = "search a small trigger for every class and unlearn those that are oddly small"
    paper = "Neural Cleanse (IEEE S&P 2019)"
    cost = "up to 0.8 for each class, and 1 where a class is flagged"
    card_text = ("NC, Neural Cleanse (IEEE S&P 2019), searched a small trigger for each class it looked at on "
                 "{images}. Where one class's was far smaller than the others', the model was fine-tuned on those "
                 "images, some of them with that trigger and their true labels; else it is as it was.")  # fmt: skip
    presets: ClassVar = {"paper": {}}

    weight_decay: float = 5e-4
    classes: tuple[str, ...] = ()
    inversion_epochs: PositiveInt = 80
    inversion_rate: PositiveFloat = 0.1
    kappa: PositiveFloat = 1e-3
    success: Annotated[float, Interval("(0, 1]")] = 0.98
    patience: PositiveInt = 25
    anomaly: PositiveFloat = 2.0
    share: Annotated[float, Interval("(0, 1)")] = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(text.isdecimal() for text in self.classes) or len(set(self.classes)) != len(self.classes):
            raise UsageError(f"nc: classes must be different indices, as in 0,3,7, got {','.join(self.classes)!r}")

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        tuning = tuned_images(self, images)
        # a class is done after `patience` epochs at the soonest
        least, most = (self.searched(images, classes, epochs) for epochs in (self.patience, self.inversion_epochs))
        return least, most + tuning

    def searched(self, images: int, classes: int, epochs: int) -> float:
        """Return how many images the search takes there and back in so many epochs, and the verdict."""
        return (len(self.classes) or classes) * images * (min(epochs, self.inversion_epochs) + FORWARD)

    def chosen_classes(self, model: nn.Module) -> list[int]:
        """Return the indices of the classes to look at; raises UsageError when there are too few, or no such."""
        count = classes_of(model)
        chosen = [int(text) for text in self.classes] or list(range(count))
        if max(chosen) >= count:
            raise UsageError(f"nc: this model has the classes 0 to {count - 1}, and classes names {max(chosen)}")
        if len(chosen) < 3:
            raise UsageError(f"nc: an outlier among {len(chosen)} classes means nothing; three are the least")
        return chosen

    def search(self, network: Network) -> tuple[Inversion, list[Phase | Pass]]:
        """Return what has the triggers in the end, and the phases that search them and give the verdict."""
        require_pixels(network, self.name)
        inversion = Inversion(network, self)
        state, adam = OwnState(inversion), partial(torch.optim.Adam, lr=self.inversion_rate, betas=(0.5, 0.9))
        search = replace(self, reweight="none").phase(
            name="nc-inversion", network=inversion, parameters=[inversion.masks, inversion.patterns], optimizer=adam,
            loss=operator.call, epochs=self.inversion_epochs, schedule="constant", augmentation="none",
            max_grad_norm=None, start=inversion.active, stop=inversion.end_epoch, state=state)  # fmt: skip
        return inversion, [search, Pass(name="nc-verdict", batch_size=self.batch_size, on_batch=inversion.on_batch,
                                        finish=inversion.judge, state=state)]  # fmt: skip

    def phases(self, network: Network) -> list[Phase | Pass]:
        inversion, search = self.search(network)
        tuning = self.phase(name="nc-unlearning", parameters=trained_parameters(network), poison=inversion.stamp_some,
                            state=OwnState(inversion))  # fmt: skip

        def begin_tuning() -> None:
            # known only now: a phase without epochs does nothing
            if not inversion.flagged.any():
                tuning.epochs = 0

        tuning.start = begin_tuning
        return [*search, tuning]


class Inversion(FrozenMethod):
    """The frozen network, in eval mode, and a mask and a pattern for each class: rows of K×1×H×W and K×C×H×W.

    Buffers, one value a class: `kappa`, `above` and `below` (epochs in a row at and below success), `stale` (epochs
    without a smaller mask), `best_norm`, `best_masks`, `best_patterns` (in [0, 1]), `hits`, `flagged`.
    """

    def __init__(self, network: Network, config: NCConfig) -> None:
        super().__init__(network)
        self.config = config
        chosen, (channels, height, width) = config.chosen_classes(network.model), network.input_size
        count, self.whole = len(chosen), float(height * width)
        self.masks = nn.Parameter(torch.ones(count, 1, height, width))
        self.patterns = nn.Parameter(torch.ones(count, channels, height, width))
        self.classes, self.flagged = nn.Buffer(torch.tensor(chosen)), nn.Buffer(torch.zeros(count).bool())
        self.kappa = nn.Buffer(torch.full((count,), config.kappa * 32**2 / self.whole))
        self.above, self.below, self.stale = (nn.Buffer(torch.zeros(count, dtype=torch.int64)) for _ in range(3))
        self.best_norm, self.hits = nn.Buffer(torch.full((count,), self.whole)), nn.Buffer(torch.zeros(count))
        self.best_masks = nn.Buffer(torch.ones(count, 1, height, width))
        self.best_patterns = nn.Buffer(torch.zeros(count, channels, height, width))
        # what the host must know of the device's numbers, read when they have changed
        self._active: tuple[Tensor, list[int]] | None = None
        self._flagged: Tensor | None = None

    def active(self) -> tuple[Tensor, list[int]]:
        """Return rows (int64) and indices of the classes that still go on; read from the device once an epoch."""
        if self._active is None:
            rows = (self.stale < self.config.patience).nonzero().flatten()
            self._active = (rows, self.classes[rows].tolist())
        return self._active

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, summed over the active classes, and the success of each (`success_3` of class 3).

        Its gradients are taken a group of classes at a time; they are those of the loss that is returned.
        """
        x, (rows, classes) = batch.images.float(), self.active()

        def group(part: Tensor) -> tuple[Tensor, Tensor]:
            masks = bounded(self.masks[part])
            stamps = masks, bounded(self.patterns[part])
            errors, success = led(self.network, x, batch.weights, stamps, self.classes[part])
            return errors + self.kappa[part] * masks.sum((1, 2, 3)), success

        found, losses, rates = slopes((self.masks, self.patterns), rows, len(x), group)
        total = batch.weights.new_zeros(())
        for part in losses:
            total = total + part.sum()
        tilt = (self.masks * found[0]).sum() + (self.patterns * found[1]).sum()
        named = zip(classes, rates, strict=True)
        return {"loss": total + tilt - tilt.detach(), **{f"success_{name}": rate for name, rate in named}}

    @torch.no_grad()
    def end_epoch(self, entry: Mapping[str, Any]) -> bool:
        """Keep the smallest masks, change κ by the epoch's success rates, and tell whether all classes are done."""
        rows, classes = self.active()
        rates = torch.tensor([entry[f"success_{name}"] for name in classes], device=rows.device)
        masks, good = bounded(self.masks[rows]), rates >= self.config.success
        norms, best = masks.sum((1, 2, 3)), self.best_norm[rows]
        better, shrunk = good & (norms < best), good & (norms < _SHRUNK * best)
        kept = better.view(-1, 1, 1, 1)
        self.best_norm[rows] = torch.where(better, norms, best)
        self.best_masks[rows] = torch.where(kept, masks, self.best_masks[rows])
        self.best_patterns[rows] = torch.where(kept, bounded(self.patterns[rows]), self.best_patterns[rows])
        waiting = ~shrunk & (self.best_norm[rows] < self.whole)
        self.stale[rows] = torch.where(waiting, self.stale[rows] + 1, 0)
        above, below = torch.where(good, self.above[rows] + 1, 0), torch.where(good, 0, self.below[rows] + 1)
        higher, lower = above >= _CHANGE_AFTER, below >= _CHANGE_AFTER
        self.kappa[rows] *= torch.where(higher, _RAISE, torch.where(lower, _LOWER, 1.0))
        self.above[rows], self.below[rows] = torch.where(higher, 0, above), torch.where(lower, 0, below)
        self._active = None
        return not self.active()[1]

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Count the images of a batch that the kept triggers lead to their classes."""
        x = batch.images.float()
        self.to(x.device)
        for rows in torch.arange(len(self.classes), device=x.device).split(max(1, TOGETHER // len(x))):
            predicted = network(stamped(x, self.best_masks[rows], self.best_patterns[rows])).argmax(1)
            hits = predicted.view(len(rows), -1) == self.classes[rows, None]
            self.hits[rows] += (batch.weights * hits).sum(1)

    def judge(self, accelerator: Accelerator) -> dict[str, float]:
        """Flag the outliers; return how many, whether the model stays `unchanged`, and the numbers of each class."""
        index = anomaly_index(self.best_norm)
        small = self.best_norm < self.best_norm.quantile(0.5)
        self.flagged.copy_((index > self.config.anomaly) & small)
        self._flagged = self.flagged.nonzero().flatten()
        found = int(self.flagged.sum())
        columns = {"mask_norm": self.best_norm, "anomaly_index": index,
                   "success": accelerator.reduce(self.hits, reduction="mean")}  # fmt: skip
        each = {f"{column}_{name}": value for column, values in columns.items()
                for name, value in zip(self.classes.tolist(), values.tolist(), strict=True)}  # fmt: skip
        return {"flagged": float(found), "unchanged": float(not found), **each}

    def stamp_some(self, images: Tensor, labels: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Return images (N×C×H×W, float32, 0 to 255), some with a flagged class's trigger, and the labels they had.

        Each is drawn by itself, so that `rows`, the images' numbers in the step, do not matter.
        """
        if self._flagged is None:
            self._flagged = self.to(images.device).flagged.nonzero().flatten()
        flagged = self._flagged
        odds = len(flagged) * self.config.share
        chosen = torch.rand(len(images)) < odds / (odds + 1 - self.config.share)
        which = flagged[torch.randint(len(flagged), (len(images),)).to(flagged.device, non_blocking=True)]
        masks, patterns = self.best_masks[which], self.best_patterns[which]
        x = images.float()
        stamp = chosen.to(images.device, non_blocking=True).view(-1, 1, 1, 1) * masks
        return x + stamp * (PIXEL * patterns - x), labels


def anomaly_index(norms: Tensor) -> Tensor:
    """Return |n_c − median| / (1.4826 · MAD) of the norms (K), the median of an even number being the mean of two."""
    away = (norms - norms.quantile(0.5)).abs()
    # where half of the norms are equal their index is 0, not 0/0, and that of the others finite
    return away / (_MAD * away.quantile(0.5)).clamp(min=1e-6)
