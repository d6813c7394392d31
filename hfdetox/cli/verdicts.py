"""What is said on the terminal by the commands that judge: `hfdetox verify` and `hfdetox gate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.cli.console import at_revision
from hfdetox.cli.findings import finding_line, reconstructed_lines, scores_table

if TYPE_CHECKING:
    from hfdetox.reporting.gate_facts import GateResult
    from hfdetox.verifying import Verification


def verification_lines(found: Verification) -> list[str | Table]:
    """Return what `hfdetox verify` found: a row a file or number, what could not be recomputed, and the verdict."""
    table = Table(box=SIMPLE)
    for heading in ("", "stated", "found", ""):
        table.add_column(heading)
    for check in found.checks:
        reason = f"{check.finding}: {check.why}" if check.why else str(check.finding)
        style = "bold red" if check.finding == "mismatch" else ""
        table.add_row(*(Text(one, style=style) for one in (check.what, check.stated, check.found, reason)))
    lines: list[str | Table] = [f"{at_revision(found.source, found.revision)}:", table]
    lines += [f"not recomputed: {what}: {why}" for what, why in found.missing.items()]
    lines.append(f"never recomputed: {', '.join(found.unchecked)}")
    same = "same processor model, threads and versions: counts have to be equal"
    lines.append(f"within 2 of 10,000, at least 1: {'; '.join(found.differing)}" if found.differing else same)
    wrong = "; ".join(check.what for check in found.mismatches)
    counted = f"{len(found.checks)} checks"
    lines.append(f"{found.verdict.upper()}: {wrong}" if wrong else f"{found.verdict}: {counted}"
                 + (", not all could be recomputed" if found.missing else ""))  # fmt: skip
    return lines


def gate_lines(found: GateResult) -> list[str | Table]:
    """Return the one screen of `hfdetox gate`: the model, what each score found, the reasons, and the verdict."""
    model = found.model
    images = f"images of {at_revision(found.dataset, found.dataset_revision)}" if found.dataset else "without images"
    lines: list[str | Table] = [f"{at_revision(model.id, model.revision)} at the gate, {images}"]
    if found.verified is not None:
        lines.append(f"hfdetox verify: {found.verified}")
    for when, scan in (("scan", found.scan), ("scan after cleaning", found.rescan)):
        if scan is not None:
            lines += [scores_table({when: scan}), finding_line(scan, when)]
    lines += reconstructed_lines(found.reconstructed)
    lines += [f"{reason.verdict}: {reason.text} ({reason.rule})" for reason in found.reasons]
    return [*lines, f"verdict: {found.verdict.upper()} (exit status {found.status})"]
