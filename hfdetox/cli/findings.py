"""What is said on the terminal of a scan: the scores, what they allow to be said, and what was reconstructed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.cli.console import estimate
from hfdetox.evaluation.verdict import percent
from hfdetox.evidence.results import Evidence, ImageGrade, Reconstructed, Residual, ScanReport, ScanResult
from hfdetox.reporting.markdown import fit_text

NEVER_CLEAN = "no scan can say that a model has no backdoor"


def finding_line(scan: ScanResult, state: str = "scan") -> str:
    """Return what a scan allows to be said, such as "scan before: suspicious, 'cat': patch, blend are above …"."""
    named = f", {scan.label!r}" if scan.label is not None else ""
    errors = scan.combined.errors if scan.combined is not None else "error rates not measured"
    return f"{state}: {scan.finding}{named}: {scan.why} ({errors})"


def scores_table(scans: Mapping[str, ScanResult]) -> Table:
    """Return one row a score and state (such as `before`), with its threshold and how often that is wrong."""
    table = Table(box=SIMPLE, caption=NEVER_CLEAN, caption_justify="left")
    for heading in ("", "score", "above", "names", "finding", "errors of the threshold"):
        table.add_column(heading, justify="right" if heading in ("score", "above") else "left")
    for state, scan in scans.items():
        table.add_section()
        table.add_row(Text(state, style="bold"))
        for name, one in scan.scores.items():
            table.add_row(
                Text(f"  {name}"), "-" if one.statistic is None else f"{one.statistic:.2f}",
                "-" if one.threshold is None else f"{one.threshold.value:g}", Text(fit_text(one.label or "", 19)),
                one.finding, Text(fit_text(one.errors, 72)),
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


def residual_lines(found: Mapping[str, Residual]) -> list[str]:
    """Return a line for each trigger that was tested for being asleep."""
    return [f"gone or asleep, {name}: {percent(one.retuned[0].value)} → {percent(one.retuned[-1].value)} by re-tuning "
            f"with {one.triggered} triggered images, {percent(one.plain[-1].value)} without; half of it is there up to "
            f"{one.reaches:g} of the way from the model as it came" for name, one in found.items()]  # fmt: skip


def grade_line(grade: ImageGrade) -> str:
    """Return how much the clean images can tell, such as "500 clean images: 0.7 % at best; …"."""
    notes = "".join(f"; {note}" for note in grade.notes)
    return f"{grade.samples:,} clean images, which bound a rate at {percent(grade.bound)} at best{notes}"


def evidence_lines(evidence: Evidence | None) -> list[str | Table]:
    """Return what a run found without the attacker's trigger; nothing of a run without a scan."""
    if evidence is None:
        return []
    lines: list[str | Table] = [scores_table(evidence.scans)] if evidence.scans else []
    lines += [finding_line(scan, f"scan {state}") for state, scan in evidence.scans.items()]
    lines += reconstructed_lines(evidence.reconstructed)
    if evidence.scar is not None:
        lines.append(f"scar: {evidence.scar.label!r} is harder to reach now than all others, as a backdoor's old "
                     f"target is ({evidence.scar.errors})")  # fmt: skip
    lines += residual_lines(evidence.residual)
    if evidence.agreement is not None:
        lines.append(f"answers as before: {estimate(evidence.agreement.rate)}")
    return lines


def scan_lines(found: ScanReport) -> list[str | Table]:
    """Return what `hfdetox scan` found."""
    grade = [] if found.images is None else [grade_line(found.images)]
    state = "scan" if found.when == "before" else "scan of a cleaned model"
    return [*grade, scores_table({state: found.scan}), *reconstructed_lines(found.reconstructed),
            finding_line(found.scan, state)]  # fmt: skip
