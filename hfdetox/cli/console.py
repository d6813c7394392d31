"""What is said on the terminal: tables of rates with the lines around them, and what was written when interrupted."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.data.info import DatasetInfo
from hfdetox.evaluation.results import AccuracyLoss, Measurement, Rate, Rating, Visibility
from hfdetox.evaluation.verdict import describe_loss, describe_visibility, percent, points
from hfdetox.files import REPORT_NAMES
from hfdetox.models.info import ModelInfo
from hfdetox.reporting.markdown import fit_text
from hfdetox.reporting.report import SCRATCH, AttackReport, Report, describe_target, missed_goals

if TYPE_CHECKING:
    from hfdetox.plugins import Entry


def estimate(number: Rate | Rating) -> str:
    """Return a rate or rating with its 95 % interval, such as `93.1 % (92.6–93.6)`."""
    low, high = number.interval
    return f"{percent(number.value)} ({100 * low:.1f}–{100 * high:.1f})"


def measurement_table(
    states: Mapping[str, Measurement], notes: Mapping[str, Mapping[str, str]] | None = None,
    loss: AccuracyLoss | None = None,
) -> Table:  # fmt: skip
    """Return one column a state (such as before and after), one row a rate.

    Args:
        states: at least one measurement by its heading; all of the same triggers and images.
        notes: by trigger name, rows of text to put under the last state.
        loss: what the last state lost in accuracy.
    """
    blanks = [""] * (len(states) - 1)
    first = next(iter(states.values()))
    table = Table(box=SIMPLE, caption="in brackets: 95 % interval", caption_justify="left")
    table.add_column("")
    for heading in states:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    table.add_row("accuracy", *(estimate(s.accuracy) for s in states.values()), f"{first.accuracy.samples:,}")
    if all(state.classes is not None for state in states.values()):
        worst = (estimate(state.classes.worst) for state in states.values() if state.classes is not None)
        table.add_row("worst class", *worst, "")
    if loss is not None:
        table.add_row("points lost", *blanks, f"{points(loss.value)} ({' to '.join(map(points, loss.interval))})", "")
        table.add_row("verdict", *blanks, loss.verdict, "")
    table.add_row("loss", *(f"{s.loss:.3f}" for s in states.values()), "")
    for name, trigger in first.triggers.items():
        results = [state.triggers[name] for state in states.values()]
        count = f"{trigger.attack_success_rate.samples:,}"
        table.add_section()
        # Text, not markup: a trigger may be named "[red]"
        table.add_row(Text(name, style="bold"))
        if isinstance(trigger.target, str):
            table.add_row(f"  {describe_target(trigger.target)}")
        table.add_row("  attack success", *(estimate(r.attack_success_rate) for r in results), count)
        table.add_row("  robust accuracy", *(estimate(r.robust_accuracy) for r in results), count)
        if without := [r.accuracy_without for r in results if r.accuracy_without]:
            table.add_row("    without it", *map(estimate, without), count)
        if found := [r.destination for r in results if r.destination]:
            # of a long name the first letters, and of each state its own class
            table.add_row("  largest class", *(Text(fit_text(one.name, 19)) for one in found))
            table.add_row("    its share", *(estimate(one.rate) for one in found))
            table.add_row("    without it", *(estimate(one.without) for one in found))
        for label, note in (notes or {}).get(name, {}).items():
            table.add_row(f"  {label}", *blanks, Text(note))
    return table


def report_table(report: Report) -> Table:
    """Return the before/after table of a finished run, with what may be said about each trigger."""
    states = {"before": report.before, "after": report.after}
    ratings = report.defense_effectiveness_rating or {}
    notes: dict[str, dict[str, str]] = {}
    for name, verdict in report.verdicts.items():
        rating = {"DER": estimate(ratings[name])} if name in ratings else {}
        notes[name] = {**rating, "verdict": str(verdict)}
    known = {heading: state for heading, state in states.items() if state is not None}
    return measurement_table(known, notes, report.accuracy_loss)


def rejection(report: Report) -> list[str]:
    """Return the first line of a run that cost too much accuracy, none of others."""
    return [f"REJECTED: {describe_loss(report.rejected)}"] if report.rejected else []


def attack_lines(report: AttackReport) -> list[str]:
    """Return the lines above an attack's table: what was trained on which images, how fast, and its success."""
    attack, missed = report.attack, missed_goals(report.after, report.goals) if report.after else []
    what = f"backdoor in {report.model.id}" if report.backdoored else f"clean baseline of {report.model.id}"
    start = "from scratch" if attack.start == SCRATCH else f"from {at_revision(attack.start, report.model.revision)}"
    lines = [
        f"{what} ({report.model.library} {report.model.architecture}), {start}, {_images(report.dataset)}",
        f"{attack.epochs} epochs, {attack.seconds:,.0f} s, {attack.images_per_second:,.0f} images/s, "
        + ("float32" if attack.precision == "no" else attack.precision)
        + (", stopped early: the goals are reached" if attack.stopped_early else ""),
    ]
    if report.before is not None:
        lines.append(f"accuracy before: {estimate(report.before.accuracy)}")
    # a baseline of which nothing was asked cannot fail
    if missed:
        lines.append(f"{'THE ATTACK DID NOT SUCCEED' if report.backdoored else 'NOT REACHED'}: {'; '.join(missed)}")
    elif report.backdoored:
        lines.append("the attack succeeded")
    return lines


def attack_table(report: AttackReport) -> Table:
    """Return the table of a finished attack: rates, how visible each trigger is, and its cross accuracy."""
    notes: dict[str, dict[str, str]] = {}
    for name, one in report.attack.triggers.items():
        poisoned = one.recipe.replace("-", " ")
        if one.poisoned_images is not None:
            poisoned = f"{one.poisoned_images:,} images, {poisoned}"
        seen = {}
        if one.max_change is not None and one.changed is not None:
            seen = describe_visibility(Visibility(one.psnr, one.max_change, one.changed))
        cross = {"cross accuracy": estimate(one.cross_accuracy)} if one.cross_accuracy else {}
        notes[name] = {"poisoned": poisoned, **cross, **seen}
    return measurement_table({"after": report.after} if report.after else {}, notes)


def title(model: ModelInfo, dataset: DatasetInfo) -> str:
    """Return the line above a run's table: which model, which images."""
    return f"{at_revision(model.id, model.revision)} ({model.library} {model.architecture}), {_images(dataset)}"


def at_revision(name: str, revision: str | None) -> str:
    """Return `name` with the first 12 digits of its commit, if it has one."""
    return f"{name}@{revision[:12]}" if revision else name


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return a dry run's answers, one line each; what was not asked for is left out."""
    asked = {
        key: {name: part for name, part in value.items() if part is not None} if isinstance(value, Mapping) else value
        for key, value in plan.items()
    }
    return [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in asked.items() if value not in (None, [], {})]


def settings_table(parameters: Mapping[str, Any]) -> Table:
    """Return settings with their defaults."""
    table = Table(box=SIMPLE)
    table.add_column("setting", no_wrap=True)
    table.add_column("default")
    for name, default in parameters.items():
        table.add_row(Text(name), Text("-" if default in (None, "", ()) else _plain(default)))
    return table


def entry_lines(name: str, entry: Entry[Any]) -> list[str | Table]:
    """Return what `hfdetox list` says of a member: what it is, where it is from, its presets and its settings."""
    member = entry.member
    source = member.how if hasattr(member, "how") else member.paper
    lines: list[str | Table] = [f"{name}: {member.summary} ({source})"]
    if entry.package:
        lines = [f"{lines[0]}, from {entry.package}"]
    if hasattr(member, "names_class"):
        needs = "clean images" if member.needs_images else "no images"
        lines.append(f"needs {needs}; when: {member.when}; cost: {member.cost}")
    if hasattr(member, "presets"):
        lines.append(f"needs {member.data}; cost, relative to plain fine-tuning: {member.cost}")
        lines.append("; ".join(preset_line(name, *preset) for preset in member.presets.items()))
    return [*lines, entry_table(entry)] if entry.parameters else lines


def entry_table(entry: Entry[Any]) -> Table:
    """Return a member's settings with their defaults and the other words that one may be, and what its files hold."""
    tensors = entry.member.tensor_fields() if hasattr(entry.member, "tensor_fields") else {}
    held = {
        name: f"none; {name}=FILE.png gives one" if kind == "picture" else "kept in the trigger file"
        for name, kind in tensors.items()
    }
    truths = {name: str(value).lower() for name, value in entry.parameters.items() if isinstance(value, bool)}
    choices = {
        name: f"{entry.parameters[name]} (or {', '.join(word for word in words if word != entry.parameters[name])})"
        for name, words in entry.words.items()
    }
    return settings_table(entry.parameters | choices | truths | held)


def preset_line(name: str, preset: str, values: Mapping[str, Any]) -> str:
    """Return what `--defense NAME:PRESET` changes, such as `d3:code sets lambda=0.5`."""
    known = {key.rstrip("_"): value for key, value in values.items()}
    return f"{name}:{preset} " + (f"sets {_plain(known)}" if known else "is these defaults")


def _images(dataset: DatasetInfo) -> str:
    name = at_revision(dataset.id, dataset.revision)
    return f"{dataset.clean_samples:,} clean images of {name}, measured on {dataset.eval_samples:,} others"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


def written(output: Path | None) -> tuple[int, int] | None:
    """Return what tells the result in `output` from one written later, None where there is none."""
    for path in [output / name for name in REPORT_NAMES] if output is not None else []:
        with contextlib.suppress(OSError):
            return path.stat().st_ino, path.stat().st_mtime_ns
    return None


def output_of(run_folder: Path | None) -> Path | None:
    """Return the output folder that a run folder belongs to."""
    return run_folder and run_folder.with_name(run_folder.name.removesuffix(".run"))


def attack_advice(output: Path | None, earlier: tuple[int, int] | None) -> str:
    """Return whether anything of an interrupted attack was written; `earlier` is what `written` gave before it."""
    return _whole(output, earlier) or "nothing was written: give the same command again to start anew"


def resume_advice(run_folder: Path | None, *, earlier: tuple[int, int] | None = None) -> str:
    """Return how to go on with the run in `run_folder`, that only the push was left, or that it had not begun.

    Args:
        earlier: what `written` gave before the run.
    """
    if run_folder is not None and run_folder.is_dir():
        return f"resume with: {shlex.join(['hfdetox', '--resume', str(run_folder)])}"
    return _whole(output_of(run_folder), earlier) or "the run had not begun, and nothing was written"


def _whole(output: Path | None, earlier: tuple[int, int] | None) -> str:
    if output is None or written(output) in (None, earlier):
        return ""
    return f"the result in {output} is whole; publish it with: {shlex.join(['hfdetox', 'push', str(output)])} REPO"
