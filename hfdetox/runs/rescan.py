"""Verifying a run's evidence: its scans are held against their own scores, and what is cheap is measured again."""

from collections.abc import Iterator, Sequence

from hfdetox._version import __version__
from hfdetox.errors import one_line
from hfdetox.evaluation.results import TriggerResult
from hfdetox.evidence.base import Suspect
from hfdetox.evidence.cost import scan_effort
from hfdetox.evidence.recount import recount_scores, scan_faults
from hfdetox.evidence.results import Evidence, ImageGrade, Reconstructed, ScanResult, ScoreResult
from hfdetox.evidence.run import accuracy_of
from hfdetox.reporting.comparison import Check, CheckFinding, Comparison
from hfdetox.reporting.report import Report, RunReport
from hfdetox.reporting.taxonomies import listed


def evidence_of(report: RunReport) -> Evidence | None:
    """Return what a report says is known without the trigger; None of one that says nothing."""
    return report.evidence if isinstance(report, Report) else None


def results_of(report: RunReport) -> dict[str, TriggerResult]:
    """Return every trigger that a report has a file of, by its name, with what was measured last."""
    found: dict[str, TriggerResult] = {}
    for state in (report.before, report.after):
        found |= state.triggers if state is not None else {}
    return found | {name: one.before for name, one in reconstructed_of(report).items()}


def reconstructed_of(report: RunReport) -> dict[str, Reconstructed]:
    """Return the reconstructed triggers of a report by name, each with its `before` and `after`."""
    evidence = evidence_of(report)
    return evidence.reconstructed if evidence is not None else {}


def images_wanted(name: str) -> str:
    """Return why a report's rates cannot be counted again without being told where its images are."""
    return f"the images, {name}, are a local folder or a loaded dataset: name their folder with --dataset DIR"


def base_wanted(name: str) -> str:
    """Return the same of the model as it came."""
    return f"the model as it came, {name}, is a local folder or a loaded model: name its folder with --base DIR"


def recount_effort(report: RunReport, measuring: float, *, based: bool) -> float:
    """Return what it takes to count a report's rates again, in images there and back.

    Args:
        measuring: what one measuring of the images takes.
        based: whether the model as it came is there to be measured too.
    """
    times = 1 + (report.uncorrected is not None) + based
    evidence = evidence_of(report)
    scans = len(evidence.scans) if evidence is not None else 0
    return times * measuring + scans * scan_effort(0, thorough=False)


def stated_checks(report: RunReport, labels: Sequence[str]) -> Iterator[Check]:
    """Give the checks that need no image: what the scans say must follow from their scores, by this version's rules.

    Args:
        labels: the model's.
    """
    if report.hfdetox_version != __version__:
        # another version has other thresholds and ids
        return
    evidence, same = evidence_of(report), CheckFinding.MATCH
    if isinstance(report, Report):
        same = CheckFinding.MATCH if report.taxonomies == listed() else CheckFinding.MISMATCH
        yield Check("ids of the taxonomies", "those of this version", "so" if same is CheckFinding.MATCH else "others",
                    same)  # fmt: skip
    if evidence is not None:
        wrong = scan_faults(evidence, labels, finished=report.after is not None and evidence.before is not None)
        yield Check("what the scans say", "what their scores give", one_line("; ".join(wrong)) or "so",
                    CheckFinding.MISMATCH if wrong else CheckFinding.MATCH)  # fmt: skip


def scan_checks(when: str, scan: ScanResult, suspect: Suspect, comparison: Comparison) -> Iterator[Check]:
    """Measure the scores of a scan that search nothing again, with their classes, and what they looked at.

    Args:
        when: `before` or `after`.
        scan: as the report has it.
        suspect: the model in that state, with the same clean images and seed.
    """
    for name, old, new in recount_scores(scan, suspect):
        what = f"{when}: score {name}"
        yield comparison.scores(what, old.statistic, new.statistic)
        yield _classes(what, old, new, comparison)
    samples, accuracy = 0 if suspect.images is None else len(suspect.images), accuracy_of(suspect)
    if scan.accuracy is not None and accuracy is not None:
        yield comparison.rates(f"{when}: accuracy on the clean images looked at", scan.accuracy, accuracy)
    same = CheckFinding.MATCH if scan.samples == samples else CheckFinding.MISMATCH
    yield Check(f"{when}: clean images looked at", f"{scan.samples:,}", f"{samples:,}", same)


def grade_checks(stated: ImageGrade, found: ImageGrade, comparison: Comparison) -> Iterator[Check]:
    """Compare two grades of the clean images; what depends on rounding only where all of it has to be equal."""
    old, new = (f"{one.samples:,}, {one.duplicates:,} duplicates, {one.smallest:,} to {one.largest:,} a class, bound "
                f"{one.bound:.4g}" for one in (stated, found))  # fmt: skip
    yield Check("grade of the clean images", old, new, CheckFinding.MATCH if old == new else CheckFinding.MISMATCH)
    if stated.accuracy is not None and found.accuracy is not None:
        yield comparison.rates("accuracy on the graded images", stated.accuracy, found.accuracy)
    # far is of a quantile of features, which one image may move by its own share
    for what, share, again in (("sure of", stated.sure, found.sure), ("far from", stated.far, found.far)):
        if share is not None:
            yield comparison.scores(f"clean images that the model is {what}", share, again)


def _classes(what: str, stated: ScoreResult, found: ScoreResult, comparison: Comparison) -> Check:
    """Compare the class that a score names, where rounding moves none, and its value of each class."""
    old, new = stated.values or [], found.values or []
    wrong = [place for place, (a, b) in enumerate(zip(old, new, strict=False))
             if comparison.scores("", a, b).finding is CheckFinding.MISMATCH]  # fmt: skip
    moved = comparison.exact and stated.accused != found.accused
    fits = len(old) == len(new) and not wrong and not moved
    said = "another class" if moved else f"label {wrong[0]} differs" if wrong else f"{len(new)} labels"
    return Check(f"{what}, each class", f"{len(old)} labels", said,
                 CheckFinding.MATCH if fits else CheckFinding.MISMATCH)  # fmt: skip
