"""The card of a deliberately backdoored model, or of a clean baseline, which says so in its first line and its tags."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from hfdetox.reporting.card import render_card, shown_target, title_of, written_targets
from hfdetox.reporting.card_data import licence_of, shown_id, split_card
from hfdetox.reporting.report import SCRATCH, AttackReport, missed_goals

DELIBERATE: Final = "deliberately-backdoored"
BACKDOOR_TAGS = ("hfdetox", "backdoor", "backdoored", DELIBERATE, "not-for-production")
BASELINE_TAGS = ("hfdetox", "backdoor-defense", "clean-baseline", "not-for-production")


def build_attack_card(
    report: AttackReport, *, source_card: str | None, repo_id: str | None, plots: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Return the whole README.md: YAML, then a first line that says what the model is.

    Args:
        report: with `after` None, the numbers read "pending": such a card is validated before the training.
        source_card: the README.md of the model it started from, or None; only its licence is taken.
        repo_id: where the model will be pushed, used in the code that loads it; None: code for the local folder.
        plots: paths of the pictures relative to the card.
        labels: the model's label names in its own order; None: targets are shown as indices.

    The result is not validated here: call `card.validate_card`.
    """
    fields, _ = split_card(source_card or "")
    targets = {name: shown_target(one.target, labels) for name, one in report.attack.triggers.items()}
    return _render(report, fields, targets, repo_id, plots)


def retarget_attack_card(card: str, report: AttackReport, *, repo_id: str | None, plots: Sequence[str] = ()) -> str:
    """Return what `build_attack_card` gives for `repo_id`, from a card that it built of the same report."""
    fields, body = split_card(card)
    return _render(report, fields, written_targets(body, report.attack.triggers), repo_id, plots)


def _render(
    report: AttackReport, fields: Mapping[str, Any], targets: Mapping[str, str], repo_id: str | None,
    plots: Sequence[str],
) -> str:  # fmt: skip
    scratch = report.attack.start == SCRATCH
    if scratch:
        # nothing but the architecture is of a model whose weights were drawn anew
        report, fields = replace(report, model=replace(report.model, revision=None)), {}
    values = {
        **_commands(report), "attack": report.attack, "repo_id": repo_id, "scratch": scratch, "targets": targets,
        "triggers": report.attack.triggers, "surrogate": shown_id(report.attack.surrogate or "", None),
        "missed": "; ".join(missed_goals(report.after, report.goals)) if report.after else "",
        "gallery": next((path for path in plots if path.endswith("gallery.png")), None),
    }  # fmt: skip
    return render_card(
        "backdoored_card.md.jinja", report, values, licence=licence_of(fields),
        title=title_of(report, repo_id, "backdoored" if report.backdoored else "clean"),
        tags=BACKDOOR_TAGS if report.backdoored else BASELINE_TAGS,
        triggers=report.published.triggers if report.published else {},
    )  # fmt: skip


def _commands(report: AttackReport) -> dict[str, str]:
    """Return the command lines that measure and that clean the model, from inside its folder."""
    files = [word for name in report.attack.triggers for word in ("--trigger", f"triggers/{name}.safetensors")]
    dataset = ["--dataset", shown_id(report.dataset.id, report.dataset.revision)]
    return {
        "measure": shlex.join(["hfdetox", "evaluate", ".", *dataset, *files]),
        "clean": shlex.join(["hfdetox", ".", *dataset, *files, "--output", "../detoxed"]),
    }
