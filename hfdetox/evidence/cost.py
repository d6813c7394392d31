"""What a command will take, from what it computes and how fast this machine was on a few batches before it starts.

Work is counted in images that go through the network and back; one that goes forward alone counts `FORWARD`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hfdetox.defenses.base import FORWARD
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evidence.inquiry import planned_passes
from hfdetox.evidence.residual import residual_effort
from hfdetox.evidence.run import LOOKED_AT
from hfdetox.models.layers import has_batch_norm
from hfdetox.models.network import Network
from hfdetox.progress import draws, note
from hfdetox.training.devices import evaluating, saved_bytes

# numbers of clean images that are proposed instead
_FEWER = (2500, 1000, 500, 250, 100)
_WORTH_SAYING = 60.0  # seconds
# images there and back of the scores that search nothing, of both reconstructions for a class, and of the margin's
_LOOKS, _SEARCH, _MARGIN = 3_000, 11_520, 9_000
# reconstructed triggers that are measured as known ones are
_RECONSTRUCTED = 2
# of the batches that are timed: what one may keep for its backward pass, its most images, and for how many seconds
_BYTES, _IMAGES, _SECONDS = 2**27, 64, 1.0


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        method: the defense's configuration.
        images: how many clean images there are.
        classes: how many the model tells apart.
        measured: how many images are measured on.
        triggers: how many known triggers.
        speed: images there and back a second, of all processes together.
        where: what they were timed on, such as "this CPU".
        scan: whether it is scanned, which takes at most half as much as the defense.
        residual: whether it is tested for sleeping backdoors.
    """

    method: Any
    images: int
    classes: int
    measured: int
    triggers: int
    speed: float
    where: str
    scan: bool = True
    residual: bool = False

    @property
    def minutes(self) -> tuple[float, float]:
        """About how many minutes the run takes, by the shortest and by the longest of the ways that it may take."""
        triggers = self.triggers + (_RECONSTRUCTED if self.scan else 0)
        shared = FORWARD * 2 * self.measured * (1 + triggers)
        if self.scan:
            shared += min(planned_passes(self.method, self.images) / 4, scan_effort(self.classes, thorough=False))
        if self.residual:
            shared += residual_effort(self.images, triggers)
        ways = self.method.efforts(self.images, self.classes)
        return (shared + min(ways)) / self.speed / 60, (shared + max(ways)) / self.speed / 60

    def fitting(self, minutes: float) -> tuple[str, Cost] | None:
        """Return the first options that keep the run below so many minutes, and its cost; None where none do."""
        for scan in (True, False) if self.scan else (False,):
            words = "" if scan == self.scan else "--no-scan "
            for images in (self.images, *(number for number in _FEWER if number < self.images)):
                fewer = replace(self, images=images, scan=scan)
                if fewer.minutes[1] <= minutes:
                    return (words + (f"--samples {images}" if images < self.images else "")).strip(), fewer
        return None

    def check(self, most: float | None) -> None:
        """Refuse a run of which the longest way takes more than `most` minutes.

        Raises:
            UsageError: it does; the message says what would not.
        """
        if most is not None and self.minutes[1] > most:
            fits = self.fitting(most)
            how = (f"{fits[0]} would take about {spoken(*fits[1].minutes)}" if fits else
                   "fewer clean images will not do: try another --defense, or fewer --eval-samples")  # fmt: skip
            raise UsageError(f"the run takes about {spoken(*self.minutes)} on {self.where}, more than --max-minutes "
                             f"{most:g}; {how}")  # fmt: skip

    def __str__(self) -> str:
        """Return what the run takes, and what fewer images would: "about 14 minutes on this CPU; …"."""
        fits = self.fitting(self.minutes[1] / 2) if self.minutes[1] * 60 > _WORTH_SAYING else None
        less = f"; {spoken(*fits[1].minutes)} with {fits[0]}" if fits else ""
        return f"about {spoken(*self.minutes)} on {self.where}{less}"

    def say(self, *, progress: bool) -> None:
        """Say what the run takes where that is more than a minute."""
        note(str(self), shown=progress and self.minutes[1] * 60 > _WORTH_SAYING)


def measure_cost(evaluation: Evaluator, method: Any, images: int, *, scan: bool, residual: bool) -> Cost:
    """Return what a run will take, by the time of a few batches of its evaluation images, there and back.

    The model stays as it is, and no random number is drawn.

    Args:
        method: the defense's configuration.
        images: how many clean images there are.
        scan: whether the model is scanned.
        residual: whether it is tested for sleeping backdoors.
    """
    speeds = [speed_on(evaluation)]
    if evaluation.accelerator.num_processes > 1:
        # the first process's, so that no two of them decide differently
        broadcast_object_list(speeds)
    classifier = evaluation.classifier
    method = method.settled(batch_norm=has_batch_norm(classifier.network))
    return Cost(method, images, len(classifier.labels), len(evaluation.clean), len(evaluation.views), speeds[0],
                where(evaluation.accelerator), scan, residual)  # fmt: skip


def say_cost(evaluation: Evaluator, what: str, effort: float, less: tuple[float, str] | None = None, *,
             besides: str = "", progress: bool) -> None:  # fmt: skip
    """Say what a command takes where that is more than a minute, or not all of it is counted.

    Args:
        what: the subject of the sentence, such as "the scan".
        effort: images there and back.
        less: what would take less effort, and how that is asked for: "without --thorough".
        besides: what is not counted, such as "the search of its pattern".
    """
    if not draws(progress):
        return
    speed = speed_on(evaluation)
    # what is not counted may be the larger part
    if effort / speed > _WORTH_SAYING or besides:
        words = in_words(effort, speed, where(evaluation.accelerator), less, besides)
        note(f"{what} takes {words}", shown=progress)


def in_words(effort: float, speed: float, where: str, less: tuple[float, str] | None = None, besides: str = "") -> str:
    """Return what so much takes: "about 14 minutes on this CPU; 3 minutes without --thorough".

    Args:
        effort: images there and back.
        speed: of these a second.
        where: what they were timed on.
        less, besides: see `say_cost`.
    """
    if effort / speed <= _WORTH_SAYING:
        less = None
    instead = f"; {spoken(less[0] / speed / 60)} {less[1]}" if less is not None else ""
    return f"about {spoken(effort / speed / 60)} on {where}" + (f" and {besides}" if besides else "") + instead


def scan_effort(classes: int, *, thorough: bool) -> float:
    """Return about how much the scores of a scan take before cleaning, by what each says of itself."""
    searched = classes if thorough else min(LOOKED_AT, classes)
    return float(_LOOKS + _SEARCH * searched + (_MARGIN * classes if thorough else 0))


def scan_efforts(measuring: float, measured: int, classes: int, *,
                 thorough: bool) -> tuple[float, tuple[float, str] | None]:  # fmt: skip
    """Return what a scan takes, measuring included, and where it is thorough how it takes less, as of `say_cost`.

    Args:
        measuring: what measuring takes, known triggers included.
        measured: how many clean images are measured.
        classes: how many the model tells apart.
    """
    shared = measuring + _RECONSTRUCTED * FORWARD * measured
    whole, brief = (shared + scan_effort(classes, thorough=way) for way in (thorough, False))
    return whole, (brief, "without --thorough") if thorough else None


def measuring_effort(evaluation: Evaluator) -> float:
    """Return what one measuring of the clean images, and of those with each trigger, takes."""
    return FORWARD * (len(evaluation.clean) + sum(len(view.source) for view in evaluation.views))


def speed_on(evaluation: Evaluator) -> float:
    """Return how many images a second go there and back, of all processes together, by a few of the clean ones."""
    images = evaluation.clean
    return speed_of(evaluation.classifier.network, evaluation.accelerator,
                    lambda count: images.__getitems__(range(min(count, len(images))))[1])  # fmt: skip


def speed_of(network: Network, accelerator: Accelerator, images: Callable[[int], Tensor]) -> float:
    """Return how many images a second go there and back, of all processes together.

    Args:
        images: gives at most so many, as the network takes them.
    """
    network.to(accelerator.device)
    pixels = images(max(1, min(_IMAGES, _BYTES // saved_bytes(network)))).to(accelerator.device)
    weights = [weight for weight in network.parameters() if weight.requires_grad]

    def once() -> None:
        loss = network(pixels).float().logsumexp(1).sum()
        torch.autograd.grad(loss, weights, allow_unused=True)
        float(loss.detach())  # waits for the device

    with evaluating(network), torch.enable_grad():
        once()  # warms up
        start, batches = time.perf_counter(), 0
        while not batches or time.perf_counter() - start < _SECONDS:
            once()
            batches += 1
        seconds = time.perf_counter() - start
    return batches * len(pixels) * accelerator.num_processes / max(seconds, 1e-9)


def where(accelerator: Accelerator) -> str:
    """Return what the accelerator computes on, such as "this CPU"."""
    kind = accelerator.device.type
    return "this CPU" if kind == "cpu" else f"this {kind.upper()} device"


def spoken(least: float, most: float | None = None) -> str:
    """Return so many minutes in words: "1 minute", or "3 to 5 minutes"; from 3 hours on in hours."""
    pair = [least, least if most is None else most]
    unit, size = ("hour", 60) if pair[1] >= 180 else ("minute", 1)
    first, last = (max(1, round(minutes / size)) for minutes in pair)
    return (f"{first:,} to " if first < last else "") + f"{last:,} {unit}{'s' if last > 1 else ''}"
