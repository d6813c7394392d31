"""What a report says of the scans, found again: the scores that search nothing, and the grade of the clean images."""

from collections.abc import Iterator, Sequence

from hfdetox.evidence.base import SCORES, Reconstruction, Suspect
from hfdetox.evidence.claims import class_shifts
from hfdetox.evidence.results import ClassShift, Evidence, Finding, ScanResult, ScoreResult, Threshold
from hfdetox.evidence.run import chosen_scores, still
from hfdetox.evidence.thresholds import When, judged

# how far two numbers that are rounded to four digits may be apart
_ROUNDED = 2e-4


def is_cheap(name: str) -> bool:
    """Return whether a score takes a few passes over the images: it searches no trigger and no image of its own."""
    kind = SCORES.get(name)
    return kind is not None and not kind.thorough and not issubclass(kind, Reconstruction)


def recount_scores(scan: ScanResult, suspect: Suspect) -> Iterator[tuple[str, ScoreResult, ScoreResult]]:
    """Measure the cheap scores of a scan again, on as many images as it did.

    Args:
        scan: as the report has it.
        suspect: the model in the state that was scanned, with the same clean images and seed.

    Returns:
        Name, what was stated and what was found, of each score that had a value.
    """
    with still(suspect.network):
        for name, stated in scan.scores.items():
            if stated.statistic is not None and is_cheap(name):
                suspect.limit = stated.passes or None
                found, _ = SCORES[name]().run(suspect, None)
                yield name, stated, found


def fits_threshold(stated: ScoreResult) -> bool:
    """Return whether the finding of a score is what its own value and threshold say."""
    if stated.statistic is None or stated.threshold is None:
        return stated.finding == Finding.UNKNOWN
    above = stated.statistic > stated.threshold.value
    return stated.finding == (Finding.SUSPICIOUS if above else Finding.NO_EVIDENCE)


def scan_faults(evidence: Evidence, labels: Sequence[str], *, finished: bool) -> list[str]:
    """Return by name what of a run's evidence is not what its own scores give by this version's rules and thresholds.

    Args:
        labels: the model's.
        finished: whether the model was cleaned, so that there must be a scan of both.
    """
    scans: dict[When, ScanResult | None] = {"before": evidence.before, "after": evidence.after}
    wrong = [f"no scan {when}" for when, scan in scans.items() if scan is None and finished]
    if finished and evidence.before is not None and evidence.agreement is None:
        wrong.append("no agreement")
    for when, scan in scans.items():
        wrong += [] if scan is None else [f"{when}: {what}" for what in _faults(scan, when, labels)]
    if not wrong and evidence.before is not None and evidence.after is not None:
        found = class_shifts(evidence.before, evidence.after, labels)
        same = len(found) == len(evidence.shifts) and all(map(_alike, evidence.shifts, found))
        wrong += [] if same else ["latent shift of each class"]
    return wrong


def _faults(scan: ScanResult, when: When, labels: Sequence[str]) -> Iterator[str]:
    scores = scan.scores.values()
    if any(one.accused is not None and not 0 <= one.accused < len(labels) for one in scores):
        yield "a class that the model has not"
        return
    again = judged(scan, when, tuple(labels))
    pairs = {"its threshold": (_known(scan.combined), _known(again.combined))}
    pairs |= {name: (getattr(scan, name), getattr(again, name)) for name in ("finding", "accused", "label", "why")}
    for name, one in scan.scores.items():
        other = again.scores[name]
        pairs[name] = ((one.finding, one.label, _known(one.threshold)), (other.finding, other.label,
                                                                        _known(other.threshold)))  # fmt: skip
    yield from (name for name, (stated, found) in pairs.items() if stated != found)
    yield from (f"no score {name}" for name in chosen_scores(when) if name not in scan.scores)


def _alike(stated: ClassShift, found: ClassShift) -> bool:
    pairs = ((stated.before, found.before), (stated.after, found.after))
    near = (a == b if a is None or b is None else abs(a - b) < _ROUNDED for a, b in pairs)
    return (stated.label, stated.name) == (found.label, found.name) and all(near)


def _known(threshold: Threshold | None) -> object:
    """Return what a threshold is, without what is computed of its counts."""
    if threshold is None:
        return None
    rates = (threshold.false_alarms, threshold.found)
    counts = [None if one is None else (one.successes, one.samples) for one in rates]
    return threshold.value, threshold.measured, threshold.models, counts
