"""What the scores share that search a trigger: which images, which classes, and what is held against what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfdetox.errors import UsageError
from hfdetox.evidence.base import Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.training.search import BATCH, Stamps, success_counts
from hfdetox.triggers.base import Trigger
from hfdetox.triggers.mask import Mask

# images that are searched on and counted on, at most, and the fewest of both together
_SEARCHED, _HELD, _LEAST = 600, 800, 40
# of the steps that a search wants, the share without which it means nothing
_ENOUGH = 0.5

Held = tuple[Tensor, Tensor]


def parts(suspect: Suspect, accused: Sequence[int] | None) -> tuple[list[int], Tensor, Held]:
    """Return the classes to look at, the images to search on, and others with their labels to count on.

    Raises:
        UsageError: fewer than two classes or too few images, or images whose range nobody knows.
    """
    classes = sorted(set(range(suspect.classes) if accused is None else accused))
    if len(classes) < 2:
        raise UsageError("one class alone stands out from nothing; look at two at least")
    if not suspect.has_grey_levels:
        raise UsageError(
            "the model's preprocessing gives images in a range of its own, in which no trigger is searched"
        )
    assert suspect.images is not None
    assert suspect.labels is not None
    order = torch.randperm(len(suspect.images), generator=suspect.generator())
    if len(order) < _LEAST:
        raise UsageError(f"{len(order)} images are too few to search a trigger on; {_LEAST} are the least")
    middle = min(_SEARCHED, len(order) // 2)
    searched, held = order[:middle], order[middle : middle + _HELD]
    at = suspect.images.device
    return classes, suspect.images[searched.to(at)], (suspect.images[held.to(at)], suspect.labels[held])


def affordable(suspect: Suspect, classes: Sequence[int], wanted: int, searches: int = 1) -> int:
    """Return how many steps each of so many searches may take: those wanted, or what the suspect's limit allows.

    Raises:
        UsageError: that is less than half of them.
    """
    if suspect.limit is None:
        return wanted
    # there and back for each step, and the held-out images
    steps = min(wanted, (suspect.limit // (len(classes) * searches) - _HELD) // (2 * BATCH))
    if steps < _ENOUGH * wanted:
        raise UsageError(f"a search for {len(classes)} classes takes more image passes than are left")
    return steps


def shortened(steps: int, wanted: int) -> str:
    """Return what a person should know of a search of so many steps: that it was shorter than the thresholds'."""
    return f"a search of {steps} steps, where the error rates are of {wanted}" if steps < wanted else ""


def share_led(suspect: Suspect, held: Held, stamps: Stamps) -> tuple[Tensor, int]:
    """Return which share of the held-out images of other classes each trigger leads to its class, and the passes."""
    hits, counts = success_counts(suspect.network, *held, stamps)
    return hits / counts.clamp(min=1), int(counts.sum())


def ahead(
    suspect: Suspect, classes: list[int], values: Tensor, *, low: bool, passes: int, note: str = ""
) -> ScoreResult:
    """Return a score of the classes looked at whose statistic is how far the first is ahead of the others' median.

    It means the same for two classes and for all, which the spread of two would not.
    """
    best = int(values.argmin() if low else values.argmax())
    others = torch.cat([values[:best], values[best + 1 :]]).double().quantile(0.5)
    lead = float(others - values[best]) if low else float(values[best] - others)
    listed: list[float | None] = [None] * suspect.classes
    for label, value in zip(classes, values.tolist(), strict=True):
        listed[label] = value
    return ScoreResult(listed, lead, classes[best], passes=passes, note=note)


def triggers_of(name: str, stamps: Stamps) -> list[Trigger]:
    """Return the triggers as `mask` triggers named after score and label, such as `patch-3`."""
    masks, patterns = stamps.masks.cpu().clamp(0, 1), stamps.patterns.cpu().clamp(0, 1)
    return [Mask(name=f"{name}-{label}", target=label, mask=mask, pattern=pattern)
            for label, mask, pattern in zip(stamps.classes, masks, patterns, strict=True)]  # fmt: skip
