"""The YAML fields of a model card: licence, tags, dataset and results as the Hub's own types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from hfdetox.data.info import DatasetInfo
from hfdetox.evaluation.results import Measurement, Rate, TriggerResult
from hfdetox.models.info import ModelInfo
from hfdetox.values import load_yaml

PENDING = "pending"
LIBRARY_TAGS = {"timm": "timm", "transformers": "transformers", "torch": "pytorch"}


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return (YAML fields, text) of any model card; no fields where there is no YAML or it cannot be read."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    block = REGEX_YAML_BLOCK.search(card)
    if not block:
        return {}, card
    try:
        fields = load_yaml(block.group(2))
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
    """Return license, license_name and license_link as the source's YAML has them, each None where it has not."""
    licence = fields.get("license")
    if isinstance(licence, list):
        licence = [item for item in licence if isinstance(item, str)]
    elif not isinstance(licence, str):
        licence = None
    named = {name: fields.get(name) for name in ("license_name", "license_link")}
    return {
        "license": licence or None,
        **{name: value if isinstance(value, str) else None for name, value in named.items()},
    }


def card_data(
    model: ModelInfo, dataset: DatasetInfo, *, licence: Mapping[str, Any], tags: Sequence[str], title: str,
    results: list[EvalResult],
) -> ModelCardData:  # fmt: skip
    """Return a card's YAML fields; what is unknown (licence, a base model or dataset on the Hub) is left out.

    The tag of the model's library comes last.
    """
    base_model = model.id if hub_id(model.id, model.revision) else None
    library = model.library if model.library in ("timm", "transformers") else None
    return ModelCardData(
        **licence,
        library_name=library,
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        tags=[*tags, LIBRARY_TAGS.get(model.library, "pytorch")],
        datasets=[dataset.id] if hub_id(dataset.id, dataset.revision) else None,
        metrics=["accuracy"],
        model_name=title,
        eval_results=results,
    )


def model_index(
    dataset: DatasetInfo, triggers: Mapping[str, TriggerResult], after: Measurement | None
) -> list[EvalResult]:
    """Return what the model-index holds: the values after, as fractions, each trigger's as metrics of our own types."""
    on_hub = hub_id(dataset.id, dataset.revision)

    def result(kind: str, title: str, rate: Rate | None, **extra: Any) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            # local images have no id that a stranger could look up; "imagefolder" is what the Hub's own tools write
            dataset_type=dataset.id if on_hub else "imagefolder",
            dataset_name=shown_id(dataset.id, dataset.revision),
            dataset_config=dataset.config,
            dataset_split=dataset.eval_split,
            dataset_revision=dataset.revision if on_hub else None,
            metric_type=kind,
            metric_name=title,
            metric_value=PENDING if rate is None else rate.value,
            **extra,
        )

    results = [result("accuracy", "Accuracy", after.accuracy if after else None)]
    for name, trigger in triggers.items():
        later = after.triggers.get(name) if after else None
        extra = {
            "metric_config": name,
            "metric_args": {"trigger": trigger.spec, "mode": trigger.mode, "target": trigger.target},
        }
        results += [
            result(
                "attack_success_rate",
                f"Attack success rate, trigger {name}",
                later.attack_success_rate if later else None,
                **extra,
            ),
            result(
                "robust_accuracy", f"Robust accuracy, trigger {name}", later.robust_accuracy if later else None, **extra
            ),
        ]
    return results
