"""What a run will take, measured on its first images before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evidence.inquiry import planned_passes
from hfdetox.evidence.run import LOOKED_AT
from hfdetox.progress import note
from hfdetox.training.devices import evaluating, saved_bytes

# numbers of clean images that are proposed instead
_FEWER = (2500, 1000, 500, 250, 100)
_WORTH_SAYING = 60.0  # seconds
# image passes of the scores that search nothing, of both reconstructions for a class, and of the margin's
_LOOKS, _SEARCH, _MARGIN = 6_000, 23_040, 18_000
_BYTES, _IMAGES = 2**27, 64  # of the batch that is timed: what it may keep for its backward pass, and the most images


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        method: the defense's configuration.
        images: how many clean images there are.
        measuring: image passes of measuring before and after.
        scan: whether it is scanned, which takes at most half as many passes as the defense.
        second_passes: image passes a second, of all processes together; a gradient counts as one more.
        where: what they were timed on, such as "this CPU".
    """

    method: Any
    images: int
    measuring: int
    scan: bool
    second_passes: float
    where: str

    @property
    def minutes(self) -> float:
        """About how many minutes the run takes."""
        passes = planned_passes(self.method, self.images)
        return (self.measuring + passes * (1.5 if self.scan else 1)) / self.second_passes / 60

    def fitting(self, minutes: float) -> tuple[str, float] | None:
        """Return the first options that bring the run below so many minutes, and its minutes; None where none do."""
        for scan in (True, False) if self.scan else (False,):
            words = "" if scan == self.scan else "--no-scan "
            for images in (self.images, *(number for number in _FEWER if number < self.images)):
                fewer = replace(self, images=images, scan=scan)
                if fewer.minutes <= minutes:
                    return (words + (f"--samples {images}" if images < self.images else "")).strip(), fewer.minutes
        return None

    def check(self, most: float | None, *, progress: bool) -> None:
        """Say what the run takes where that is more than a minute.

        Raises:
            UsageError: it takes more than `most` minutes; the message says what would not.
        """
        if most is not None and self.minutes > most:
            fits = self.fitting(most)
            how = (f"{fits[0]} would take about {_spoken(fits[1])}" if fits else
                   "fewer clean images will not do: try another --defense, or fewer --eval-samples")  # fmt: skip
            raise UsageError(f"the run takes about {_spoken(self.minutes)} on {self.where}, more than --max-minutes "
                             f"{most:g}; {how}")  # fmt: skip
        if self.minutes * 60 > _WORTH_SAYING:
            fits = self.fitting(self.minutes / 2)
            less = f"; {_spoken(fits[1])} with {fits[0]}" if fits else ""
            note(f"about {_spoken(self.minutes)} on {self.where}{less}", shown=progress)


def measure_cost(evaluation: Evaluator, method: Any, images: int, *, scan: bool) -> Cost:
    """Return what a run will take, by the time of two batches of its evaluation images, forward and backward.

    The model stays as it is, and no random number is drawn.

    Args:
        method: the defense's configuration.
        images: how many clean images there are.
        scan: whether the model is scanned.
    """
    measuring = 2 * (len(evaluation.clean) + sum(len(view.source) for view in evaluation.views))
    return Cost(method, images, measuring, scan, second_passes(evaluation), _where(evaluation))


def say_scan(evaluation: Evaluator, *, thorough: bool, progress: bool) -> None:
    """Say what a scan of the model takes where that is more than a minute."""
    speed, classes = second_passes(evaluation), len(evaluation.classifier.labels)
    minutes = scan_passes(classes, thorough=thorough) / speed / 60
    if minutes * 60 > _WORTH_SAYING:
        fewer = scan_passes(classes, thorough=False) / speed / 60
        less = f"; {_spoken(fewer)} without --thorough" if thorough else ""
        note(f"the scan takes about {_spoken(minutes)} on {_where(evaluation)}{less}", shown=progress)


def say_training(evaluation: Evaluator, passes: int, *, progress: bool) -> None:
    """Say what a training of so many image passes takes where that is more than a minute."""
    minutes = passes / second_passes(evaluation) / 60
    if minutes * 60 > _WORTH_SAYING:
        note(f"the training takes about {_spoken(minutes)} on {_where(evaluation)}; fewer --set epochs=… take less",
             shown=progress)  # fmt: skip


def scan_passes(classes: int, *, thorough: bool) -> int:
    """Return about how many image passes the scores of a scan take before cleaning, by what each says of itself."""
    searched = classes if thorough else min(LOOKED_AT, classes)
    return _LOOKS + _SEARCH * searched + (_MARGIN * classes if thorough else 0)


def second_passes(evaluation: Evaluator) -> float:
    """Return image passes a second, of all processes together, from two batches; a gradient counts as one more."""
    accelerator, clean = evaluation.accelerator, evaluation.clean
    network = evaluation.classifier.network.to(accelerator.device)
    count = max(1, min(_IMAGES, len(clean), _BYTES // saved_bytes(network)))
    pixels = clean.__getitems__(range(count))[1].to(accelerator.device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    with evaluating(network), torch.enable_grad():
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            loss = network(pixels).float().logsumexp(1).sum()
            torch.autograd.grad(loss, weights, allow_unused=True)
            float(loss.detach())  # waits for the device
            seconds = time.perf_counter() - start
    return 2 * count * accelerator.num_processes / max(seconds, 1e-9)


def _where(evaluation: Evaluator) -> str:
    kind = evaluation.accelerator.device.type
    return "this CPU" if kind == "cpu" else f"this {kind.upper()} device"


def _spoken(minutes: float) -> str:
    rounded = max(1, round(minutes))
    return f"{rounded:,} minute{'s' if rounded > 1 else ''}"
