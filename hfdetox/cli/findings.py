"""What is said on the terminal of a scan: the scores, what they allow to be said, and what was reconstructed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.cli.console import estimate
from hfdetox.evaluation.verdict import percent
from hfdetox.evidence.results import Evidence, Reconstructed, Residual, ScanReport, ScanResult, ScoreResult
from hfdetox.reporting.markdown import fit_text

NEVER_CLEAN = ("no scan can say that a model has no backdoor; the rates are of small networks, one in five of them "
               "pretrained on ImageNet, and say little of larger ones")  # fmt: skip


def finding_line(scan: ScanResult, state: str = "scan") -> str:
    """Return what a scan allows to be said, such as "scan before: suspicious, 'cat': patch, blend are above …"."""
    named = f", {scan.label!r}" if scan.label is not None else ""
    errors = scan.combined.errors if scan.combined is not None else "error rates not measured"
    return f"{state}: {scan.finding}{named}: {scan.why} ({errors})"


def scores_table(scans: Mapping[str, ScanResult]) -> Table:
    """Return one row a score and state (such as `before`), with its threshold and how often that is wrong."""
    table = Table(box=SIMPLE, caption=NEVER_CLEAN, caption_justify="left", padding=(0, 1, 0, 0))
    for heading in ("", "score", "above", "names", "finding", "false alarms", "finds"):
        number = heading in ("score", "above")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number or not heading)
    for state, scan in scans.items():
        table.add_section()
        table.add_row(Text(state, style="bold"))
        for name, one in scan.scores.items():
            table.add_row(
                Text(name), "-" if one.statistic is None else f"{one.statistic:.2f}",
                "-" if one.threshold is None else f"{one.threshold.value:.3g}", Text(fit_text(one.label or "", 19)),
                Text(f"{one.finding}: {fit_text(one.note, 72)}" if one.note else one.finding), *error_cells(one),
            )  # fmt: skip
    return table


def error_cells(found: ScoreResult) -> tuple[str, str]:
    """Return how often a score's threshold was wrong, such as "1/35, 0–15 %" and "7/12, 28–85 %"."""
    if found.statistic is None or found.threshold is None:
        return "", ""
    if not found.threshold.measured:
        return "not measured", "not measured"
    rates = (found.threshold.false_alarms, found.threshold.found)
    first, second = ("not measured" if one is None else f"{one.successes}/{one.samples}, {100 * one.interval[0]:.0f}–"
                     f"{100 * one.interval[1]:.0f} %" for one in rates)  # fmt: skip
    return first, second


def reconstructed_lines(made: Mapping[str, Reconstructed]) -> list[str]:
    """Return a line for each reconstructed trigger, such as "reconstructed patch for 'cat': 97.2 % → 1.8 %"."""
    lines = []
    for one in made.values():
        rates = [state.attack_success_rate for state in (one.before, one.after) if state is not None]
        shown = " → ".join(percent(rate.value) for rate in rates)
        span = " → ".join(f"{100 * rate.interval[0]:.1f}–{100 * rate.interval[1]:.1f}" for rate in rates)
        lines.append(f"{one.title}: {shown} of {rates[0].samples:,} images ({span})")
    return lines


def residual_lines(found: Mapping[str, Residual], made: Mapping[str, Reconstructed]) -> list[str]:
    """Return a line for each trigger that was tested for being asleep."""
    names = {name: made[name].title if name in made else name for name in found}
    return [
        f"gone or asleep, {names[name]}: {percent(one.retuned[0].value)} → {percent(one.retuned[-1].value)} by "
        f"re-tuning with {one.triggered} triggered images, {percent(one.plain[-1].value)} without; half of it is there "
        f"up to {one.reaches:g} of the way from the model as it came"
        for name, one in found.items()
    ]


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
    lines += residual_lines(evidence.residual, evidence.reconstructed)
    if evidence.agreement is not None:
        lines.append(f"answers as before: {estimate(evidence.agreement.rate)}")
    return lines


def scan_lines(found: ScanReport) -> list[str | Table]:
    """Return what `hfdetox scan` found."""
    grade = [] if found.images is None else [found.images.described]
    state = "scan" if found.when == "before" else "scan of a cleaned model"
    return [*grade, scores_table({state: found.scan}), *reconstructed_lines(found.reconstructed),
            finding_line(found.scan, state)]  # fmt: skip
