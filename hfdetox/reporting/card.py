"""The model cards: typed data through the templates in `cards/`, validated without the network.

The card of a deliberately backdoored model, or of a clean baseline, says so in its first line and its tags.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Final

import jinja2
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hfdetox.errors import UsageError, one_line
from hfdetox.evaluation import verdict as judging
from hfdetox.evaluation.results import Rate, Rating
from hfdetox.reporting import markdown
from hfdetox.reporting.card_data import LIBRARY_TAGS, PENDING, card_data, hub_id, licence_of, shown_id, split_card
from hfdetox.reporting.report import SCRATCH, AttackReport, Report, RunReport, describe_target, missed_goals

CARD_NAME = "README.md"
DELIBERATE: Final = "deliberately-backdoored"
BACKDOOR_TAGS = ("hfdetox", "backdoor", "backdoored", DELIBERATE, "not-for-production")
BASELINE_TAGS = ("hfdetox", "backdoor-defense", "clean-baseline", "not-for-production")
TEXT_FIELDS = ("base_model", "base_model_relation", "library_name", "license_name", "license_link", "pipeline_tag")
LIST_FIELDS = ("license", "tags", "datasets", "metrics")
LONGEST_NAME = 60  # letters of a class's name
_SOURCE_MARK = re.compile(f"^{re.escape(markdown.SOURCE_MARK)}$", re.MULTILINE)


class CardError(UsageError):
    """The card that would be written is not one that the Hub accepts; the message names the field."""


def build_card(
    report: RunReport, *, source_card: str | None, repo_id: str | None, plots: Sequence[str] = (),
    labels: Sequence[str] | None = None, on_leaderboard: bool = False,
) -> str:  # fmt: skip
    """Return the whole README.md of a model that was cleaned or attacked: YAML, and text.

    Args:
        report: with `after` (and `before`) None, the numbers read "pending": such a card is validated before training.
        source_card: the source model's README.md as text, or None; only its licence enters the YAML, and its text
            stands below the card of a cleaned model.
        repo_id: where the model will be pushed, used in the code that loads it; None: code for the local folder.
        plots: paths of the PNG files relative to the card.
        labels: the model's label names in its own order; None: targets are shown as indices.
        on_leaderboard: whether a file beside it states the accuracy for the dataset's leaderboard (`eval_results`).

    The result is not validated here: call `validate_card`.
    """
    fields, body = split_card(source_card or "")
    targets = {name: shown_target(one.target, labels) for name, one in report.triggers.items()}
    source = markdown.embed_source(body, _source_url(report)) if isinstance(report, Report) else ""
    return _render(report, fields, targets, source, repo_id, plots, on_leaderboard=on_leaderboard)


def retarget_card(card: str, report: RunReport, *, repo_id: str | None, plots: Sequence[str] = ()) -> str:
    """Return what `build_card` gives for `repo_id`, from a card that it built of the same report for another place.

    Licence, names of the targets, whether it is on a leaderboard and the source's text are taken over from `card`; all
    else comes from the report.
    """
    fields, body = split_card(card)
    own, *source = _SOURCE_MARK.split(body, maxsplit=1)
    return _render(report, fields, written_targets(own, report.triggers), "".join(source).strip(), repo_id, plots,
                   on_leaderboard=names_leaderboard(card, report))  # fmt: skip


def names_leaderboard(card: str, report: RunReport) -> bool:
    """Return whether a card's own text says that the accuracy is stated for the dataset's leaderboard too."""
    return _whole_leaderboard(report) in _SOURCE_MARK.split(card, maxsplit=1)[0]


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
    return markdown.code(markdown.fit_text(words, LONGEST_NAME)) if isinstance(target, int) else words


def _render(
    report: RunReport, fields: Mapping[str, Any], targets: Mapping[str, str], source_text: str, repo_id: str | None,
    plots: Sequence[str], *, on_leaderboard: bool,
) -> str:  # fmt: skip
    if isinstance(report, AttackReport) and report.attack.start == SCRATCH:
        # nothing but the architecture is of a model whose weights were drawn anew
        report, fields = replace(report, model=replace(report.model, revision=None)), {}
    tags: tuple[str, ...]
    if isinstance(report, AttackReport):
        template, values = "backdoored_card.md.jinja", _attack_values(report)
        suffix, tags = ("backdoored", BACKDOOR_TAGS) if report.backdoored else ("clean", BASELINE_TAGS)
    else:
        assert isinstance(report, Report)
        template, values = "model_card.md.jinja", _defense_values(report)
        suffix, tags = "detoxed", ("hfdetox", "backdoor-defense", report.defense.name)
    model, dataset, licence = report.model, report.dataset, licence_of(fields)
    model_id = shown_id(model.id, model.revision)
    title = (repo_id or f"{model_id.rpartition(':')[2]}-{suffix}").split("/")[-1]
    text = templates().get_template(template).render(
        values, **licence, title=title, repo_id=repo_id, report=report, model=model, environment=report.environment,
        library=model.library if model.library in LIBRARY_TAGS else "torch", model_id=model_id,
        dataset_id=shown_id(dataset.id, dataset.revision), triggers=report.triggers, targets=targets,
        plots={PurePosixPath(path).stem: path for path in plots},
        whole_leaderboard=_whole_leaderboard(report) if on_leaderboard else None,
        hidden=hub_id(model.id, model.revision),
        # the source's words are values of the template, never a template themselves
        source_text=source_text, source_heading=markdown.SOURCE_HEADING, source_mark=markdown.SOURCE_MARK,
    )  # fmt: skip
    own, mark, source = text.partition(f"\n{markdown.SOURCE_MARK}\n")
    own = re.sub(r"\n{3,}", "\n\n", own)
    data = card_data(report, licence=licence, tags=tags, title=title)
    return f"---\n{data.to_yaml()}\n---\n\n{(own + mark + source).strip()}\n"


def _defense_values(report: Report) -> dict[str, Any]:
    before, command = report.before, report.environment.command
    # what anybody finds who loads the model as its library does; what hfdetox makes of it stands beside it
    states = {"Before": before, "After": report.published}
    if report.uncorrected:
        states = {"Before": before, "After, uncorrected": report.uncorrected, "After, with hfdetox": report.after}
    revisions = {"--revision": report.model.revision, "--dataset-revision": report.dataset.revision}
    pins = [f"{option} {revision}" for option, revision in revisions.items()
            if command and revision and not re.search(rf"(^|\s){option}[ =]", command)]  # fmt: skip
    return {"defense": report.defense, "states": states, "pins": " ".join(pins),
            "judged": judging.trigger_verdicts(before, report.published, report.accuracy_loss),
            "corrected": report.verdicts}  # fmt: skip


def _attack_values(report: AttackReport) -> dict[str, Any]:
    # the commands that measure and that clean the model, from inside its folder
    files = [word for name in report.triggers for word in ("--trigger", f"triggers/{name}.safetensors")]
    dataset = ["--dataset", shown_id(report.dataset.id, report.dataset.revision)]
    return {
        "measure": shlex.join(["hfdetox", "evaluate", ".", *dataset, *files]),
        "clean": shlex.join(["hfdetox", ".", *dataset, *files, "--output", "../detoxed"]),
        "attack": report.attack, "scratch": report.attack.start == SCRATCH,
        "surrogate": shown_id(report.attack.surrogate or "", None),
        "missed": "; ".join(missed_goals(report.after, report.goals)) if report.after else "",
    }  # fmt: skip


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
            f"the model card's YAML is not valid: {one_line(error)}; "
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
    own = _SOURCE_MARK.split(text, maxsplit=1)[0]
    if empty := markdown.empty_sections(REGEX_YAML_BLOCK.sub("", own, count=1)):
        raise CardError(f"the model card has a section without text: {empty[0]}; report this as a bug of hfdetox")


def describe_rate(rate: Rate | Rating | None) -> str:
    """Return "94.2 % (942 of 1,000; 92.6–95.6)", a rating without its counts, "pending" for None."""
    if rate is None:
        return PENDING
    counts = f"{rate.successes:,} of {rate.samples:,}; " if isinstance(rate, Rate) else ""
    low, high = rate.interval
    return f"{judging.percent(rate.value)} ({counts}{100 * low:.1f}–{100 * high:.1f})"


def signed(number: float | None) -> str:
    """Return a number with its sign and one decimal, such as "−5.3", an infinite one (None) as "∞"."""
    return "∞" if number is None else f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")


@cache
def templates() -> jinja2.Environment:
    """Return the templates of `cards/`, with the filters that show a stranger's words literally."""
    folder = resources.files("hfdetox.cards")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        code=markdown.code, cell=markdown.cell, text=markdown.text, fenced=markdown.fenced, pct=judging.percent,
        name=partial(markdown.fit_text, letters=LONGEST_NAME), rate=describe_rate, signed=signed, count="{:,}".format,
        literal=json.dumps, json=partial(json.dumps, ensure_ascii=False, default=str),
    )  # fmt: skip
    environment.globals.update(judging=judging)
    return environment


def _source_url(report: Report) -> str | None:
    model = report.model
    return f"{constants.ENDPOINT}/{model.id}/{{kind}}/{model.revision}" if hub_id(model.id, model.revision) else None


def _whole_leaderboard(report: RunReport) -> str:
    """Return the view of the dataset's leaderboard, as JSON, that has the models with a base model too.

    It is that of `HfApi.get_dataset_leaderboard(…, base_model_only=False)`; what the page's address is for it is not
    documented.
    """
    return f"{constants.ENDPOINT}/api/datasets/{report.dataset.id}/leaderboard?base_model=false"
