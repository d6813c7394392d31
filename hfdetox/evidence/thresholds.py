"""What a score's statistic is held against, and what several scores together allow to be said.

The thresholds lie in `thresholds.json`, with how they were fixed and how often they were wrong on other models. One
with `"measured": false` is a guess, of which no error rate is known.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any, Final, Literal

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Rate
from hfdetox.evidence.base import MIN_CLASSES
from hfdetox.evidence.results import Finding, ScanResult, ScoreResult, Threshold

When = Literal["before", "after"]
# the key of all scores together
COMBINED: Final = "combined"
# two looks at the same head: what one is sure of and the other thinks most likely is said by both
_PAIR: Final = ("head-probe", "latent-shift")
# fewer clean images than these cannot tell that there is no evidence
LEAST_IMAGES: Final = 100


@cache
def table() -> dict[str, Any]:
    """Return the file: `how` the thresholds were fixed, and `scores`, by name and time."""
    return json.loads(resources.files("hfdetox.evidence").joinpath("thresholds.json").read_text(encoding="utf-8"))


def threshold_of(score: str, when: When) -> Threshold | None:
    """Return what a score's statistic is held against at a time; None where there is none."""
    found = table()["scores"].get(score, {}).get(when)
    if found is None:
        return None
    return Threshold(found["value"], found["measured"], found["models"], found["rule"], _rate(found["false_alarms"]),
                     _rate(found["found"]))  # fmt: skip


def _rate(counts: Any) -> Rate | None:
    """Return the rate of [successes, samples]."""
    return None if counts is None else rate(*counts)


def judge_score(name: str, found: ScoreResult, when: When) -> ScoreResult:
    """Return a score's result with its threshold, and what it allows to be said."""
    threshold = threshold_of(name, when)
    if threshold is None or found.statistic is None:
        return replace(found, threshold=threshold, finding=str(Finding.UNKNOWN))
    above = found.statistic > threshold.value
    return replace(found, threshold=threshold, finding=str(Finding.SUSPICIOUS if above else Finding.NO_EVIDENCE))


def combine(scores: Mapping[str, ScoreResult], labels: tuple[str, ...], samples: int, accuracy: Rate | None,
            ) -> tuple[Finding, int | None, str]:  # fmt: skip
    """Return what judged scores together allow to be said, the class that is suspected, and why.

    No score alone decides. `suspicious`: two are above their thresholds, at least one of them names a class, and no two
    name different ones; or head probe or latent shift is above its own, and the other names the same class, however
    little it stands out. `no evidence found`: none is above, and images and accuracy are enough. All else is `unknown`.

    Args:
        labels: the model's.
        samples: how many clean images the scores looked at.
        accuracy: on these.
    """
    above = {name: one for name, one in scores.items() if one.finding == Finding.SUSPICIOUS and name != "scar"}
    classes = Counter(one.accused for one in above.values() if one.accused is not None)
    names = ", ".join(above)
    if len(labels) < MIN_CLASSES:
        return Finding.UNKNOWN, None, f"{len(labels)} classes are too few to tell one that stands out"
    if accuracy is not None and accuracy.value < _least_accuracy(len(labels)):
        return Finding.UNKNOWN, None, (f"the model is right on only {accuracy.value:.1%} of the clean images, too "
                                       "few to tell a backdoor from what it never learnt")  # fmt: skip
    if len(classes) > 1:
        said = "; ".join(
            f"{name} names {labels[one.accused]}" for name, one in above.items() if one.accused is not None
        )
        return Finding.UNKNOWN, None, f"the scores disagree: {said}"
    accused = next(iter(classes), None)
    if len(above) > 1 and accused is not None:
        return Finding.SUSPICIOUS, accused, f"{names} are above their thresholds"
    for one, other in (_PAIR, _PAIR[::-1]):
        if one in above and other in scores and accused is not None and scores[other].accused == accused:
            return Finding.SUSPICIOUS, accused, f"{one} is above its threshold, and {other} names the same class"
    if above:
        return Finding.UNKNOWN, accused, f"{names} alone is above its threshold, and no score decides alone"
    known = [name for name, one in scores.items() if one.finding == Finding.NO_EVIDENCE and name != "scar"]
    if samples < LEAST_IMAGES:
        return Finding.UNKNOWN, None, f"{samples} clean images are too few (at least {LEAST_IMAGES})"
    if len(known) < 2:
        return Finding.UNKNOWN, None, "fewer than two scores could be measured"
    return Finding.NO_EVIDENCE, None, f"none of {', '.join(known)} is above its threshold"


def _least_accuracy(classes: int) -> float:
    """Return the accuracy below which nothing can be said: that a third of the way from chance to certainty."""
    return 1 / classes + (1 - 1 / classes) / 3


def judged(result: ScanResult, when: When, labels: tuple[str, ...]) -> ScanResult:
    """Return a scan with every score judged, and what all of them together allow to be said."""
    scores = {name: replace(judge_score(name, one, when), label=None if one.accused is None else labels[one.accused])
              for name, one in result.scores.items()}  # fmt: skip
    finding, accused, why = combine(scores, labels, result.samples, result.accuracy)
    label = None if accused is None else labels[accused]
    return replace(result, scores=scores, finding=str(finding), accused=accused, why=why, label=label,
                   combined=threshold_of(COMBINED, when))  # fmt: skip
