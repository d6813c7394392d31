"""What a report says of the scans, found again: the scores that search nothing, and the grade of the clean images."""

from collections.abc import Iterator

from hfdetox.evidence.base import SCORES, Reconstruction, Suspect
from hfdetox.evidence.results import Finding, ScanResult, ScoreResult
from hfdetox.evidence.run import still


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
