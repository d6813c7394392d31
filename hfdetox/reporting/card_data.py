"""What a model card states to the Hub as data: its YAML fields and model-index, and `.eval_results/*.yaml`.

The latter is the accuracy, for the leaderboard of a dataset that declares itself a benchmark.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from hfdetox.documents import parse_yaml
from hfdetox.errors import one_line
from hfdetox.reporting.report import Report, RunReport

PENDING = "pending"
LIBRARY_TAGS = {"timm": "timm", "transformers": "transformers", "torch": "pytorch"}
EVAL_RESULTS_FOLDER = ".eval_results"
# the licences that the Hub knows; it refuses every other word
_LICENCES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "open-mdw",
    "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
}  # fmt: skip

_ACCURACY = re.compile(r"(?<![a-z])(accuracy|acc|top[-_ ]?1)(?![a-z])", re.IGNORECASE)
_OTHER_METRIC = re.compile(r"attack|robust|adversarial|top[-_ ]?5|balanced|(?<![a-z])asr(?![a-z])", re.IGNORECASE)
_PERCENT = re.compile(r"percent|_pct\b|\b0 ?(?:-|–|to) ?100\b", re.IGNORECASE)
_FRACTION = re.compile(r"\bfractions?\b|\bproportions?\b|\b0 ?(?:-|–|to) ?1(?:\.0)?\b(?!\.\d|\d)", re.IGNORECASE)


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return (YAML fields, text) of any model card; no fields where there is no YAML or it cannot be read."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    block = REGEX_YAML_BLOCK.search(card)
    if not block:
        return {}, card
    try:
        fields = parse_yaml(block.group(2))
    except ValueError:
        fields = None
    return (fields if isinstance(fields, dict) else {}), card[block.end() :]


def hub_id(name: str, revision: str | None) -> bool:
    """Tell whether `name` is a repository on the Hub: it has a commit, and its spelling is a repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return revision is not None


def shown_id(name: str, revision: str | None) -> str:
    """Return a Hub id as it is, of a local folder only the last part: where it lay is nobody's business."""
    return name if hub_id(name, revision) else Path(name).name or name


def licence_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return license, license_name and license_link as the source's YAML has them, each None where it has not.

    A licence that the Hub does not know is `other`, with what the source calls it as its name.
    """
    given = fields.get("license")
    words = [
        one_line(item) for item in (given if isinstance(given, list) else [given]) if isinstance(item, str) and item
    ]
    named = {name: fields.get(name) for name in ("license_name", "license_link")}
    named = {name: one_line(value) if isinstance(value, str) else None for name, value in named.items()}
    known = [word.lower() for word in words if word.lower() in _LICENCES]
    if len(known) < len(words):
        return named | {"license": "other", "license_name": named["license_name"] or ", ".join(words)}
    return {"license": (known if isinstance(given, list) else known[0]) if known else None} | named


def card_data(report: RunReport, *, licence: Mapping[str, Any], tags: Sequence[str], title: str) -> ModelCardData:
    """Return a card's YAML fields and model-index; what is unknown (licence, base model, dataset) is left out.

    The tag of the model's library comes last.
    """
    model, dataset = report.model, report.dataset
    base_model = model.id if hub_id(model.id, model.revision) else None
    return ModelCardData(
        **licence, library_name=model.library if model.library in ("timm", "transformers") else None,
        pipeline_tag="image-classification", base_model=base_model, base_model_relation=base_model and "finetune",
        tags=[*tags, LIBRARY_TAGS.get(model.library, "pytorch")], metrics=["accuracy"], model_name=title,
        datasets=[dataset.id] if hub_id(dataset.id, dataset.revision) else None, eval_results=model_index(report),
    )  # fmt: skip


def model_index(report: RunReport) -> list[EvalResult]:
    """Return what the model-index holds: the values after, as fractions, each trigger's as metrics of our own types."""
    dataset, after = report.dataset, report.published
    on_hub = hub_id(dataset.id, dataset.revision)
    measured_on: dict[str, Any] = {
        "task_type": "image-classification", "task_name": "Image classification", "dataset_config": dataset.config,
        # local images have no id that a stranger could look up; "imagefolder" is what the Hub's own tools write
        "dataset_type": dataset.id if on_hub else "imagefolder", "dataset_split": dataset.eval_split,
        "dataset_name": shown_id(dataset.id, dataset.revision),
        "dataset_revision": dataset.revision if on_hub else None,
    }  # fmt: skip
    results = [EvalResult(metric_type="accuracy", metric_name="Accuracy",
                          metric_value=after.accuracy.value if after else PENDING, **measured_on)]  # fmt: skip
    for name, trigger in report.triggers.items():
        later = after and after.triggers.get(name)
        arguments = {"trigger": trigger.spec, "mode": trigger.mode, "target": trigger.target}
        for title in ("Attack success rate", "Robust accuracy"):
            kind = title.lower().replace(" ", "_")
            results.append(EvalResult(
                metric_type=kind, metric_name=f"{title}, trigger {name}", metric_config=name, metric_args=arguments,
                metric_value=getattr(later, kind).value if later else PENDING, **measured_on,
            ))  # fmt: skip
    evidence = report.evidence if isinstance(report, Report) else None
    for name, made in evidence.reconstructed.items() if evidence is not None else ():
        arguments = {"trigger": made.before.spec, "mode": made.before.mode, "target": made.label, "reconstructed": True}
        results.append(EvalResult(
            metric_type="reconstructed_attack_success_rate", metric_name=f"Attack success rate, {made.title}",
            metric_config=name, metric_args=arguments,
            metric_value=made.after.attack_success_rate.value if made.after else PENDING, **measured_on,
        ))  # fmt: skip
    return results


def eval_results(report: Report, dataset_eval_yaml: str | None, *, whole_split: bool = True) -> dict[str, str]:
    """Return {path in the model repository: YAML text}, {} where the run's accuracy belongs on no leaderboard.

    Args:
        report: its accuracy after, as the model's own library loads it, is what is stated; attack success never is.
        dataset_eval_yaml: text of `eval.yaml` of the dataset at its pinned revision; None when it has none.
        whole_split: False when only a part of the evaluation split was measured, which is not a leaderboard's number.

    A task counts when it is about accuracy, has the run's configuration and evaluation split, and its scale (fraction
    or percent) is stated: a value a hundred times off on a public leaderboard is worse than none.
    """
    dataset, after = report.dataset, report.published
    if after is None or dataset.revision is None or not dataset_eval_yaml or not whole_split:
        return {}
    entries = []
    for task_id, scale in accuracy_tasks(dataset_eval_yaml, config=dataset.config, split=dataset.eval_split).items():
        value = round(100 * after.accuracy.value, 4) if scale == "percent" else round(after.accuracy.value, 6)
        entries.append(EvalResultEntry(
            dataset_id=dataset.id, task_id=task_id, value=value, dataset_revision=dataset.revision,
            notes=f"after {report.defense.name} with hfdetox, {after.accuracy.samples} images",
        ))  # fmt: skip
    if not entries:
        return {}
    name = re.sub(r"[^\w.-]+", "__", dataset.id)
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {f"{EVAL_RESULTS_FOLDER}/{name}.yaml": text}


def accuracy_tasks(text: str, *, config: str | None, split: str) -> dict[str, Literal["fraction", "percent"]]:
    """Return {task id: scale} of the accuracy tasks in an `eval.yaml` that match `config` (None: default) and `split`.

    Text that is not such a file gives {}: it is a stranger's, and a run must not fail over it.
    """
    try:
        benchmark = parse_yaml(text)
    except ValueError:
        return {}
    if not isinstance(benchmark, dict) or not isinstance(benchmark.get("tasks"), list):
        return {}
    found: dict[str, Literal["fraction", "percent"]] = {}
    for task in benchmark["tasks"]:
        if not isinstance(task, dict) or not isinstance(task.get("id"), str):
            continue
        if task.get("split", "test") != split or (task.get("config") or "default") != (config or "default"):
            continue
        scale = _scale(task, benchmark)
        if scale and _about_accuracy(task, benchmark):
            found[task["id"]] = scale
    return found


def _words(part: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the words under the keys `names`: plain ones, and names in lists of names or of {name: …}."""
    words = []
    for value in (part.get(name) for name in names):
        for item in value if isinstance(value, list) else [value]:
            word = item.get("name") if isinstance(item, dict) else item
            words.append(word if isinstance(word, str) else "")
    return " ".join(filter(None, words))


def _about_accuracy(task: Mapping[str, Any], benchmark: Mapping[str, Any]) -> bool:
    """The metrics that a task states decide, else its own words, else the benchmark's where it has one task only."""
    own = _words(task, ("id", "name", "metric", "metrics", "description"))
    if _OTHER_METRIC.search(own):
        return False
    if stated := _words(task, ("metric", "metrics")):
        return bool(_ACCURACY.search(stated))
    shared = _words(benchmark, ("metric", "metrics", "description", "name")) if len(benchmark["tasks"]) == 1 else ""
    return bool(_ACCURACY.search(f"{own} {shared}")) and not _OTHER_METRIC.search(shared)


def _scale(task: Mapping[str, Any], benchmark: Mapping[str, Any]) -> Literal["fraction", "percent"] | None:
    """Return the scale that the task, else the benchmark, states; None when neither does or both scales are named."""
    for part in (task, benchmark):
        words = _words(part, ("scale", "unit", "metric", "metrics", "description"))
        percent, fraction = bool(_PERCENT.search(words)), bool(_FRACTION.search(words))
        if percent or fraction:
            return None if percent and fraction else ("percent" if percent else "fraction")
    # Inspect's accuracy is a mean of zeros and ones, so its files need not say so
    return "fraction" if benchmark.get("evaluation_framework") == "inspect-ai" else None
