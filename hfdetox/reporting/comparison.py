"""Two measurements of one model, number by number: what a report states, and what was found again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import (
    ClassAccuracies,
    Destination,
    Difference,
    Measurement,
    Rate,
    Rating,
    TriggerResult,
)
from hfdetox.evaluation.verdict import percent
from hfdetox.reporting.report import EnvironmentInfo

# of so many images, two may be answered differently by other processors or versions
IMAGES_A_FLIP, FLIPS = 10_000, 2
# what is computed of equal counts is equal but for the last digits of its text
EXACT = 1e-9
# how far a mean loss may be apart, relative to the larger of it and 1: with equal counts, and with other processors
LOSS_EXACT, LOSS_OTHER = 1e-5, 1e-2
# the same of a score, which rounding moves further: outliers divide by a small spread, and odd images follow signs
SCORE_EXACT, SCORE_OTHER = 1e-3, 5e-2
_TRIGGER = ("kind", "spec", "mode", "target", "file_sha256")
_SAME = ("device", "threads", "torch", "transformers", "timm", "datasets")


class CheckFinding(StrEnum):
    """What was found of one number or file."""

    MATCH = "match"
    MISMATCH = "mismatch"
    OPEN = "not recomputed"


@dataclass(frozen=True)
class Check:
    """One number or file of a report, and what was found.

    Attributes:
        what: what it is, such as `after: accuracy`.
        stated: as the report has it, in words.
        found: as it was found, in words; "" where nothing was.
        finding: `match`, `mismatch`, or `not recomputed`.
        why: the reason, where there is one to tell.
    """

    what: str
    stated: str
    found: str
    finding: CheckFinding
    why: str = ""


def differing_environment(stated: EnvironmentInfo, here: EnvironmentInfo) -> list[str]:
    """Return in what two environments differ that may change an answer: processor, threads and versions."""
    pairs = ((name, getattr(stated, name), getattr(here, name)) for name in _SAME)
    return [f"{name} {there} there, {now} here" for name, there, now in pairs if there != now]


@dataclass(frozen=True)
class Comparison:
    """How closely two measurements must agree: count by count where `exact`, else within 2 of 10,000, at least 1.

    Attributes:
        exact: whether both were made by the same processor model, threads and versions.
        class_counts: how many images of each label were measured.
    """

    exact: bool
    class_counts: Sequence[int] = ()

    def allowed(self, samples: int) -> int:
        """Return by how many of so many images a count may differ."""
        return 0 if self.exact else max(1, samples * FLIPS // IMAGES_A_FLIP)

    def measurements(self, where: str, stated: Measurement, found: Measurement) -> Iterator[Check]:
        """Give the checks of one state of a model, such as `after`; triggers that were not found again are left out."""
        yield self.rates(f"{where}: accuracy", stated.accuracy, found.accuracy)
        apart = LOSS_EXACT if self.exact else LOSS_OTHER
        yield self._numbers(f"{where}: loss", stated.loss, found.loss, apart * max(1.0, abs(found.loss)))
        if stated.classes is not None and found.classes is not None:
            yield from self._classes(where, stated.classes, found.classes)
        for name, trigger in stated.triggers.items():
            if name in found.triggers:
                yield from self.triggers(f"{where}: {name}", trigger, found.triggers[name])
        if self.exact:
            wrong = next(_differing(stated, found), None)
            yield _check(f"{where}: all of it", "as counted again", wrong or "as counted again", wrong is None)

    def triggers(self, where: str, stated: TriggerResult, found: TriggerResult) -> Iterator[Check]:
        """Give the checks of one trigger, and of its effect; what an earlier version did not measure has none."""
        wrong = [name for name in _TRIGGER if getattr(stated, name) not in (None, getattr(found, name))]
        yield _check(f"{where}: what it is", stated.spec, f"another {wrong[0]}" if wrong else found.spec, not wrong)
        for name in ("attack_success_rate", "robust_accuracy", "accuracy_without"):
            old, new = getattr(stated, name), getattr(found, name)
            if old is not None and new is not None:
                yield self.rates(f"{where}: {name.replace('_', ' ')}", old, new)
        if stated.destination is not None and found.destination is not None:
            yield from self._destinations(where, stated.destination, found.destination)

    def rates(self, what: str, stated: Rate, found: Rate) -> Check:
        """Compare two counts of the same images."""
        apart = abs(stated.successes - found.successes)
        same = stated.samples == found.samples and apart <= self.allowed(found.samples)
        return _check(what, _counts(stated), _counts(found), same)

    def estimates(self, what: str, stated: Difference | Rating, found: Difference | Rating, samples: int) -> Check:
        """Compare what was computed of outcomes on so many images, with its interval."""
        # each of two states may differ by what is allowed, and the interval's ends move with them
        apart = max(EXACT, 4 * self.allowed(samples) / samples)
        pairs = zip((stated.value, *stated.interval), (found.value, *found.interval), strict=True)
        return _check(what, _estimate(stated), _estimate(found), all(abs(a - b) <= apart for a, b in pairs))

    def scores(self, what: str, stated: float | None, found: float | None) -> Check:
        """Compare two values of a score, which has no counts; None where it had none."""
        if stated is None or found is None:
            return _check(what, f"{stated}", f"{found}", stated == found)
        return self._numbers(what, stated, found, (SCORE_EXACT if self.exact else SCORE_OTHER) * max(1.0, abs(stated)))

    def _numbers(self, what: str, stated: float, found: float, apart: float) -> Check:
        return _check(what, f"{stated:.6g}", f"{found:.6g}", abs(stated - found) <= apart)

    def _classes(self, where: str, stated: ClassAccuracies, found: ClassAccuracies) -> Iterator[Check]:
        worst = self.rates(f"{where}: worst class", stated.worst, found.worst)
        if stated.worst_label != found.worst_label:
            # of classes that are as bad but for one image, either may be named
            near = self._near(stated.worst, found.worst)
            worst = dataclasses.replace(worst, finding=CheckFinding.MATCH if near else CheckFinding.MISMATCH,
                                        why="another class is the worst")  # fmt: skip
        yield worst
        wrong = [label for label, (old, new) in enumerate(zip(stated.accuracies, found.accuracies, strict=False))
                 if not self._class_fits(label, old, new)]  # fmt: skip
        same = len(stated.accuracies) == len(found.accuracies) and not wrong
        named = f"label {wrong[0]} differs" if wrong else f"{len(found.accuracies)} labels"
        yield _check(f"{where}: accuracy of each class", f"{len(stated.accuracies)} labels", named, same)

    def _near(self, stated: Rate, found: Rate) -> bool:
        """Tell whether two shares of different images are as large but for what may differ."""
        least = min(stated.samples, found.samples)
        return not self.exact and abs(stated.value - found.value) <= 2 * self.allowed(least) / least

    def _class_fits(self, label: int, stated: float | None, found: float | None) -> bool:
        if stated is None or found is None:
            return stated is found
        count = self.class_counts[label] if label < len(self.class_counts) else 1
        return abs(stated - found) <= EXACT + self.allowed(count) / max(1, count)

    def _destinations(self, where: str, stated: Destination, found: Destination) -> Iterator[Check]:
        what = f"{where}: largest class"
        share = self.rates(what, stated.rate, found.rate)
        if stated.label == found.label:
            yield dataclasses.replace(
                share, stated=f"{stated.name}: {share.stated}", found=f"{found.name}: {share.found}"
            )
            yield self.rates(f"{what}, without the trigger", stated.without, found.without)
            yield self.estimates(f"{what}, excess", stated.excess, found.excess, found.rate.samples)
            return
        # of two classes that take as many images but for one, either may be named; the others then are other images
        near = self._near(stated.rate, found.rate)
        yield _check(what, f"{stated.name}: {_counts(stated.rate)}", f"{found.name}: {_counts(found.rate)}", near)


def _differing(stated: Any, found: Any, where: str = "") -> Iterator[str]:
    """Give the names of the numbers and words that differ; what the stated side does not have is passed over."""
    if dataclasses.is_dataclass(stated) and type(stated) is type(found):
        for one in dataclasses.fields(stated):
            yield from _differing(getattr(stated, one.name), getattr(found, one.name), f"{where}.{one.name}".strip("."))
    elif isinstance(stated, dict):
        for name in stated.keys() & found.keys():
            yield from _differing(stated[name], found[name], f"{where}.{name}".strip("."))
    elif isinstance(stated, list | tuple) and len(stated) == len(found):
        for place, (old, new) in enumerate(zip(stated, found, strict=True)):
            yield from _differing(old, new, f"{where}[{place}]")
    elif isinstance(stated, float) and isinstance(found, float):
        # a mean over images; all else is computed of counts
        apart = LOSS_EXACT * max(1.0, abs(found)) if where == "loss" else EXACT
        if not abs(stated - found) <= apart:
            yield f"{where} differs"
    elif stated is not None and stated != found:
        yield f"{where} differs"


def inconsistent(value: Any, where: str = "") -> Iterator[str]:
    """Give the rates anywhere in a report whose value or interval is not that of their own counts, by their names."""
    if isinstance(value, Rate):
        try:
            made = rate(value.successes, value.samples)
        except ValueError:
            yield f"{where} ({value.successes} of {value.samples})"
            return
        pairs = zip((value.value, *value.interval), (made.value, *made.interval), strict=True)
        if any(abs(a - b) > EXACT for a, b in pairs):
            yield f"{where} ({value.successes} of {value.samples} is {percent(made.value)})"
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from inconsistent(getattr(value, one.name), f"{where}.{one.name}".strip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from inconsistent(item, f"{where}.{name}".strip("."))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from inconsistent(item, f"{where}[{place}]")


def _check(what: str, stated: str, found: str, same: bool) -> Check:
    return Check(what, stated, found, CheckFinding.MATCH if same else CheckFinding.MISMATCH)


def _counts(one: Rate) -> str:
    return f"{one.successes:,} of {one.samples:,} ({percent(one.value)})"


def _estimate(one: Difference | Rating) -> str:
    low, high = one.interval
    return f"{100 * one.value:.2f} ({100 * low:.2f} to {100 * high:.2f})"
