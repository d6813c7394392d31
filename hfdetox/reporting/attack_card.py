"""The card of a deliberately backdoored model, or of a clean baseline, which says so in its first line and its tags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from hfdetox.reporting.attack_report import SCRATCH, AttackReport, ImplantedTrigger, missed_goals
from hfdetox.reporting.card import describe_rate, shown_target, templates, written_targets
from hfdetox.reporting.card_data import LIBRARY_TAGS, PENDING, card_data, licence_of, model_index, shown_id, split_card

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
    # nothing but the architecture is of a model whose weights were drawn anew
    model = replace(report.model, revision=None) if scratch else report.model
    licence = licence_of({} if scratch else fields)
    title = _title(report, repo_id)
    context = {
        **licence, **_commands(report), "title": title, "report": report, "model": model, "attack": report.attack,
        "environment": report.environment, "repo_id": repo_id, "scratch": scratch,
        "library": model.library if model.library in LIBRARY_TAGS else "torch",
        "model_id": shown_id(model.id, model.revision),
        "dataset_id": shown_id(report.dataset.id, report.dataset.revision),
        "surrogate": shown_id(report.attack.surrogate or "", None),
        "accuracy": describe_rate(report.after.accuracy if report.after else None),
        "uncorrected": report.uncorrected and describe_rate(report.uncorrected.accuracy),
        "accuracy_before": describe_rate(report.before.accuracy) if report.before else None,
        "missed": "; ".join(missed_goals(report.after, report.goals)) if report.after else "",
        "triggers": [_row(report, name, one, targets[name]) for name, one in report.attack.triggers.items()],
        "gallery": next((path for path in plots if path.endswith("gallery.png")), None),
    }  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", templates().get_template("backdoored_card.md.jinja").render(context))
    results = report.published.triggers if report.published else {}
    data = card_data(model, report.dataset, licence=licence, title=title,
                     tags=BACKDOOR_TAGS if report.backdoored else BASELINE_TAGS,
                     results=model_index(report.dataset, results, report.published))  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _title(report: AttackReport, repo_id: str | None) -> str:
    if repo_id:
        return repo_id.split("/")[-1]
    name = shown_id(report.model.id, report.model.revision).split("/")[-1].rpartition(":")[2]
    return f"{name}-{'backdoored' if report.backdoored else 'clean'}"


def _row(report: AttackReport, name: str, one: ImplantedTrigger, target: str) -> dict[str, Any]:
    result = report.after.triggers.get(name) if report.after else None
    return {
        "name": name, "target": target, "mode": one.mode, "spec": one.spec, "file_sha256": one.file_sha256,
        "recipe": one.recipe.replace("-", " "), "ratio": one.poison_ratio, "poisoned": one.poisoned_images,
        "success": describe_rate(result.attack_success_rate if result else None),
        "robust": describe_rate(result.robust_accuracy if result else None),
        "cross": describe_rate(one.cross_accuracy) if one.cross_accuracy else "–",
        "psnr": f"{one.psnr:.1f} dB" if one.psnr is not None else PENDING if report.after is None else "–",
        "max_change": str(one.max_change) if one.max_change is not None else PENDING if report.after is None else "–",
    }  # fmt: skip


def _commands(report: AttackReport) -> dict[str, str]:
    """Return the command lines that measure and that clean the model, from inside its folder."""
    files = [word for name in report.attack.triggers for word in ("--trigger", f"triggers/{name}.safetensors")]
    dataset = ["--dataset", shown_id(report.dataset.id, report.dataset.revision)]
    return {
        "measure": shlex.join(["hfdetox", "evaluate", ".", *dataset, *files]),
        "clean": shlex.join(["hfdetox", ".", *dataset, *files, "--output", "../detoxed"]),
    }
