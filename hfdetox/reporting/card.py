"""The model card: typed data through the templates in `cards/`, validated without the network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hfdetox.errors import UsageError
from hfdetox.evaluation.results import Measurement, Rate, Rating
from hfdetox.evaluation.verdict import MITIGATED_AT_MOST, WORKS_ABOVE, Verdict, percent, run_verdict, trigger_verdicts
from hfdetox.reporting import markdown
from hfdetox.reporting.card_data import (
    LIBRARY_TAGS,
    PENDING,
    card_data,
    hub_id,
    licence_of,
    model_index,
    shown_id,
    split_card,
)
from hfdetox.reporting.report import Report, describe_target

CARD_NAME = "README.md"
SHOWN_LAYERS = 12
TEXT_FIELDS = ("base_model", "base_model_relation", "library_name", "license_name", "license_link", "pipeline_tag")
LIST_FIELDS = ("license", "tags", "datasets", "metrics")


class CardError(UsageError):
    """The card that would be written is not one that the Hub accepts; the message names the field."""


def build_card(
    report: Report, *, source_card: str | None, repo_id: str | None, plots: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """Return the whole README.md of the processed model: YAML, text, and the source card's text below.

    Args:
        report: with `after` (and `before`) None, the numbers read "pending": such a card is validated before training.
        source_card: the source model's README.md as text, or None; only its licence enters the YAML.
        repo_id: where the model will be pushed, used in the code that loads it; None: code for the local folder.
        plots: paths of the PNG files relative to the card, as `plots.draw_plots` returns them.
        labels: the model's label names in its own order; None: targets are shown as indices.

    The result is not validated here: call `validate_card`.
    """
    fields, body = split_card(source_card or "")
    results = report.before.triggers if report.before else {}
    targets = {name: shown_target(r.target, labels) for name, r in results.items()}
    return _render(report, fields, targets, markdown.embed_source(body, _source_url(report)), repo_id, plots)


def retarget_card(card: str, report: Report, *, repo_id: str | None, plots: Sequence[str] = ()) -> str:
    """Return what `build_card` gives for `repo_id`, from a card that it built of the same report for another place.

    Licence, names of the targets and the source's text are taken over from `card`; all else comes from the report.
    """
    fields, body = split_card(card)
    own, *source = re.split(f"^{re.escape(markdown.SOURCE_MARK)}$", body, maxsplit=1, flags=re.MULTILINE)
    targets = written_targets(own, report.before.triggers if report.before else {})
    return _render(report, fields, targets, source[0].strip() if source else "", repo_id, plots)


def written_targets(own: str, triggers: Mapping[str, Any]) -> dict[str, str]:
    """Return the targets (`triggers[name].target`) as the card's own text, written by a template, names them."""
    targets = {}
    for name, trigger in triggers.items():
        # the template writes the target as a code span; what is in one never holds as many backticks as its ends
        written = re.search(rf"^- {re.escape(markdown.code(name))} \(target ((`+).*?(?<!`)\2(?!`)),", own, re.MULTILINE)
        targets[name] = written[1] if written else shown_target(trigger.target, None)
    return targets


def shown_target(target: int | str, labels: Sequence[str] | None) -> str:
    """Return a target as Markdown: its label (its index without `labels`), or what `all-to-all` means."""
    # only names are a stranger's words; `written_targets` finds them by their code span
    words = describe_target(target, labels)
    return markdown.code(words) if isinstance(target, int) else words


def _render(
    report: Report, fields: Mapping[str, Any], targets: Mapping[str, str], source_text: str, repo_id: str | None,
    plots: Sequence[str],
) -> str:  # fmt: skip
    licence = licence_of(fields)
    context = {
        **_measured(report, targets),
        **_described(report, repo_id),
        **licence,
        "report": report,
        "model": report.model,
        "defense": report.defense,
        "environment": report.environment,
        "repo_id": repo_id,
        "library": report.model.library if report.model.library in LIBRARY_TAGS else "torch",
        "plots": {PurePosixPath(path).stem: path for path in plots},
        "source_text": source_text,
        "source_heading": markdown.SOURCE_HEADING,
        "source_mark": markdown.SOURCE_MARK,
    }
    # the source's words are values of the template, never a template themselves
    text = templates().get_template("model_card.md.jinja").render(context)
    results = report.before.triggers if report.before else {}
    data = card_data(
        report.model, report.dataset, licence=licence, tags=["hfdetox", "backdoor-defense", report.defense.name],
        title=_title(report, repo_id), results=model_index(report.dataset, results, report.published),
    )  # fmt: skip
    own, mark, source = text.partition(f"\n{markdown.SOURCE_MARK}\n")
    own = re.sub(r"\n{3,}", "\n\n", own)
    return f"---\n{data.to_yaml()}\n---\n\n{(own + mark + source).strip()}\n"


def validate_card(text: str) -> None:
    """Check, without the network, what the Hub checks of a card when it is pushed; raises CardError.

    The YAML must parse into the client's ModelCardData with fields of the types the Hub allows, repository ids must be
    spelt like ones, the model-index must parse with a finite number (or "pending") for every metric, no section of
    the text may be empty.
    """
    if not REGEX_YAML_BLOCK.search(text):
        raise CardError("the model card has no YAML block; report this as a bug of hfdetox")
    try:
        data = ModelCard(text).data
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise CardError(
            f"the model card's YAML is not valid: {markdown.one_line(error)}; "
            "check the licence fields of the source model's card"
        ) from error
    for name in TEXT_FIELDS:
        if not isinstance(data.get(name, ""), str):
            raise CardError(f"the model card's field {name} must be text, not {data.get(name)!r}")
    for name in LIST_FIELDS:
        value = data.get(name, [])
        if not (isinstance(value, list) or (name == "license" and isinstance(value, str))) or not all(
            isinstance(item, str) and item for item in value
        ):
            raise CardError(f"the model card's field {name} must be a list of texts, not {value!r}")
    for name in filter(None, [data.get("base_model"), *data.get("datasets", [])]):
        if not hub_id(name, ""):
            raise CardError(f"{name!r} in the model card is not the id of a repository on the Hub")
    for result in data.get("eval_results", []):
        value = result.metric_value
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and value != PENDING:
            raise CardError(f"the model card's metric {result.metric_type!r} must be a finite number, not {value!r}")
    own = re.split(f"^{re.escape(markdown.SOURCE_MARK)}$", text, maxsplit=1, flags=re.MULTILINE)[0]
    if empty := markdown.empty_sections(REGEX_YAML_BLOCK.sub("", own, count=1)):
        raise CardError(f"the model card has a section without text: {empty[0]}; report this as a bug of hfdetox")


def describe_rate(rate: Rate | Rating | None) -> str:
    """Return "94.2 % (942 of 1,000; 92.6–95.6)", a rating without its counts, "pending" for None."""
    if rate is None:
        return PENDING
    counts = f"{rate.successes:,} of {rate.samples:,}; " if isinstance(rate, Rate) else ""
    low, high = rate.interval
    return f"{percent(rate.value)} ({counts}{100 * low:.1f}–{100 * high:.1f})"


@cache
def templates() -> jinja2.Environment:
    """Return the templates of `cards/`, with the filters that show a stranger's words literally."""
    folder = resources.files("hfdetox.cards")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        code=markdown.code,
        cell=markdown.cell,
        text=markdown.text,
        fenced=markdown.fenced,
        pct=percent,
        count=lambda number: f"{number:,}",
        literal=json.dumps,
    )
    return environment


def _title(report: Report, repo_id: str | None) -> str:
    if repo_id:
        return repo_id.split("/")[-1]
    return f"{shown_id(report.model.id, report.model.revision).split('/')[-1]}-detoxed"


def _source_url(report: Report) -> str | None:
    model = report.model
    return f"{constants.ENDPOINT}/{model.id}/{{kind}}/{model.revision}" if hub_id(model.id, model.revision) else None


def _described(report: Report, repo_id: str | None) -> dict[str, Any]:
    """Return the template's values that do not depend on any measurement."""
    model, dataset, command = report.model, report.dataset, report.environment.command
    revisions = {"--revision": model.revision, "--dataset-revision": dataset.revision}
    pins = [
        f"{option} {revision}"
        for option, revision in revisions.items()
        if revision and not re.search(rf"(^|\s){option}[ =]", command)
    ]
    return {
        "title": _title(report, repo_id),
        "model_id": shown_id(model.id, model.revision),
        "dataset_id": shown_id(dataset.id, dataset.revision),
        "pins": " ".join(pins) if command else "",
        "shown_layers": report.defense.layers[:SHOWN_LAYERS],
        "method": _method(report),
        "hidden_layers": max(0, len(report.defense.layers) - SHOWN_LAYERS),
        "parameters": [
            (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
            for name, value in report.defense.parameters.items()
        ],
        "works_above": WORKS_ABOVE,
        "mitigated_at_most": MITIGATED_AT_MOST,
    }


def _method(report: Report) -> str:
    """Return the defense's own words for what was done, general ones for one that has none."""
    general = f"The defense {markdown.code(report.defense.name)} changed the model with the help of "
    return report.defense.description or f"{general}{report.dataset.described()}."


def _measured(report: Report, targets: Mapping[str, str]) -> dict[str, Any]:
    """Return the template's summary sentence, table and triggers with their verdicts."""
    before, results = report.before, report.before.triggers if report.before else {}
    # what anybody finds who loads the model as its library does; what hfdetox makes of it stands beside it
    states = {"Before": before, "After": report.published}
    if report.uncorrected:
        states = {"Before": before, "After, uncorrected": report.uncorrected, "After, with hfdetox": report.after}
    plain, corrected = trigger_verdicts(before, report.published), trigger_verdicts(before, report.after)
    triggers = [
        {"name": name, "result": result, "target": targets[name], "verdict": plain[name], "corrected": corrected[name]}
        for name, result in results.items()
    ]
    return {
        "summary": _summary(report),
        "columns": list(states),
        "rows": _rows(report, list(states.values())),
        "triggers": triggers,
        "all_to_all": any(isinstance(result.target, str) for result in results.values()),
        "unchanged": any(entry.get("unchanged") == 1 for entry in report.history),
    }


def _summary(report: Report) -> str:
    if report.before is None or report.after is None:
        return "**Its numbers are still pending.**"
    if report.uncorrected is None:
        return _change(report, report.after)
    return (
        f"Loaded with its own library: {_change(report, report.uncorrected)} "
        f"Loaded with hfdetox, which applies a correction: {_change(report, report.after)}"
    )


def _change(report: Report, after: Measurement) -> str:
    old, new = report.before.accuracy.value if report.before else 0.0, after.accuracy.value
    points = f"{100 * (new - old):+.1f}".replace("-", "−")
    accuracy = f"Accuracy went from {percent(old)} to {percent(new)} ({points} points)."
    verdict = run_verdict(report.before, after)
    if verdict is None:
        known = "given to measure with" if report.defense.trigger_given else "known"
        return f"**No trigger was {known}, so no backdoor was measured.** {accuracy}"
    words = {
        Verdict.MITIGATED: "**Mitigated** for every trigger that worked before, out of those measured.",
        Verdict.REDUCED: "**Reduced, not mitigated**, for at least one of the triggers measured.",
        Verdict.NOT_MITIGATED: "**Not mitigated** for at least one of the triggers measured.",
        Verdict.INCONCLUSIVE: "**Inconclusive** for at least one of the triggers measured: too few images, or too weak "
        "an effect, to tell whether it worked.",
        Verdict.NO_EVIDENCE: "**No evidence found**: none of the triggers measured worked, before or after.",
    }
    return f"{words[verdict]} {accuracy}"


def _rows(report: Report, states: Sequence[Measurement | None]) -> list[list[str]]:
    """Return the table's rows: a name, and a cell for each state."""
    before, ratings = report.before, report.defense_effectiveness_rating or {}

    def row(name: str, rate: Callable[[Measurement], Rate | None]) -> list[str]:
        return [name, *(describe_rate(rate(state) if state else None) for state in states)]

    def rating(of: str, name: str) -> list[str]:
        return [of, *["–"] * (len(states) - 1), describe_rate(ratings.get(name))]

    rows = [row("Accuracy (ACC)", lambda state: state.accuracy)]
    if before and before.classes and len(before.classes.accuracies) > 1:
        # the worst class is what an average hides
        rows.append(row("Accuracy of the worst class", lambda state: state.classes.worst if state.classes else None))
    rows.append(["Loss (mean cross-entropy)", *(f"{state.loss:.3f}" if state else PENDING for state in states)])
    triggers = before.triggers if before else {}
    for name in triggers:
        shown = markdown.cell(name)
        rows += [
            row(f"ASR of {shown}", partial(_of, trigger=name, rate="attack_success_rate")),
            row(f"RA of {shown}", partial(_of, trigger=name, rate="robust_accuracy")),
            rating(f"DER of {shown}", name),
        ]
    return [*rows, rating("DER, mean", "mean")] if len(triggers) > 1 else rows


def _of(state: Measurement, trigger: str, rate: str) -> Rate | None:
    return getattr(state.triggers[trigger], rate) if trigger in state.triggers else None
