"""What is said on the terminal of a scan: the scores, what they allow to be said, and what was reconstructed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.cli.console import estimate
from hfdetox.evaluation.verdict import percent
from hfdetox.evidence.results import Evidence, ImageGrade, Reconstructed, ScanReport, ScanResult
from hfdetox.reporting.markdown import fit_text

NEVER_CLEAN = "no scan can say that a model has no backdoor"


def finding_line(scan: ScanResult, state: str = "scan") -> str:
    """Return what a scan allows to be said, such as "scan before: suspicious, 'cat': patch, blend are above …"."""
    named = f", {scan.label!r}" if scan.label is not None else ""
    errors = scan.combined.errors if scan.combined is not None else "error rates not measured"
    return f"{state}: {scan.finding}{named}: {scan.why} ({errors})"


def scores_table(scans: Mapping[str, ScanResult], labels: Mapping[int, str] | None = None) -> Table:
    """Return one row a score and state, with its threshold and how often that is wrong.

    Args:
        scans: by state, such as `before` and `after`.
        labels: names of classes by their index; others are shown as indices.
    """
    table = Table(box=SIMPLE, caption=NEVER_CLEAN, caption_justify="left")
    for heading in ("", "score", "above", "names", "finding", "errors of the threshold"):
        table.add_column(heading, justify="right" if heading in ("score", "above") else "left")
    for state, scan in scans.items():
        table.add_section()
        table.add_row(Text(state, style="bold"))
        for name, one in scan.scores.items():
            named = "" if one.accused is None else (labels or {}).get(one.accused, str(one.accused))
            known = one.statistic is not None and one.threshold is not None
            table.add_row(
                Text(f"  {name}"), "-" if one.statistic is None else f"{one.statistic:.2f}",
                "-" if one.threshold is None else f"{one.threshold.value:g}", Text(fit_text(named, 19)), one.finding,
                Text(one.threshold.errors if known and one.threshold is not None else fit_text(one.note, 60)),
            )  # fmt: skip
    return table


def reconstructed_lines(made: Mapping[str, Reconstructed]) -> list[str]:
    """Return a line for each reconstructed trigger, such as "reconstructed patch for 'cat': 97.2 % → 1.8 %"."""
    lines = []
    for one in made.values():
        rates = [state.attack_success_rate for state in (one.before, one.after) if state is not None]
        shown = " → ".join(percent(rate.value) for rate in rates)
        span = " → ".join(f"{100 * rate.interval[0]:.1f}–{100 * rate.interval[1]:.1f}" for rate in rates)
        lines.append(f"{one.title}: {shown} of {rates[0].samples:,} images ({span})")
    return lines


def grade_line(grade: ImageGrade) -> str:
    """Return how much the clean images can tell, such as "500 clean images: 0.7 % at best; …"."""
    notes = "".join(f"; {note}" for note in grade.notes)
    return f"{grade.samples:,} clean images, which bound a rate at {percent(grade.bound)} at best{notes}"


def evidence_lines(evidence: Evidence | None, labels: Mapping[int, str] | None = None) -> list[str | Table]:
    """Return what a run found without the attacker's trigger; nothing of a run without a scan."""
    if evidence is None or evidence.before is None:
        return []
    scans = {"before": evidence.before} | ({"after": evidence.after} if evidence.after else {})
    lines: list[str | Table] = [scores_table(scans, labels)]
    lines += [finding_line(scan, f"scan {state}") for state, scan in scans.items()]
    lines += reconstructed_lines(evidence.reconstructed)
    if evidence.agreement is not None:
        lines.append(f"answers as before: {estimate(evidence.agreement.rate)}")
    return lines


def scan_lines(found: ScanReport) -> list[str | Table]:
    """Return what `hfdetox scan` found."""
    names = {one.label: one.class_name for one in found.reconstructed.values()}
    if found.scan.accused is not None and found.scan.label is not None:
        names[found.scan.accused] = found.scan.label
    grade = [] if found.images is None else [grade_line(found.images)]
    state = "scan" if found.when == "before" else "scan of a cleaned model"
    return [*grade, scores_table({state: found.scan}, names), *reconstructed_lines(found.reconstructed),
            finding_line(found.scan, state)]  # fmt: skip
