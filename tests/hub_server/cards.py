"""The Hub's check of a README's metadata (POST /api/validate-yaml, and again at a commit), as far as hfdetox needs."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.hub_server.info import card_metadata

# The identifiers that the Hub knows; anything else must be "other" with a license_name.
LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "open-mdw",
    "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
}  # fmt: skip
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a README's metadata."""
    try:
        card = card_metadata(text)
    except (yaml.YAMLError, ValueError) as error:
        return [f"Invalid YAML: {error}"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        *_licenses(card),
        *_texts(card, "tags"),
        *_ids(card, "datasets"),
        *_ids(card, "base_model"),
    ]
    for name in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(card.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if card.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    if "model-index" in card and repo_type == "model":
        errors += _model_index(card["model-index"])
    return errors, []


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _licenses(card: dict[str, Any]) -> list[str]:
    return [
        f'"license" must be one of the known ones, not {v!r}' for v in _listed(card.get("license")) if v not in LICENSES
    ]


def _texts(card: dict[str, Any], name: str) -> list[str]:
    value = card.get(name, [])
    if value is not None and not isinstance(value, list):
        return [f'"{name}" must be an array']
    return [f'"{name}[{n}]" must be a string' for n, item in enumerate(value or []) if not isinstance(item, str)]


def _ids(card: dict[str, Any], name: str) -> list[str]:
    return [
        f'"{name}[{n}]" must be a valid repo id, not {item!r}'
        for n, item in enumerate(_listed(card.get(name)))
        if not isinstance(item, str) or not REPO_ID.fullmatch(item)
    ]


def _model_index(value: Any) -> list[str]:
    if not isinstance(value, list):
        return ['"model-index" must be an array']
    errors = []
    for m, model in enumerate(value):
        place = f"model-index[{m}]"
        if not isinstance(model, dict) or not isinstance(model.get("results"), list):
            errors.append(f'"{place}.results" is required')
            continue
        if not model.get("name"):
            errors.append(f'"{place}.name" is required')
        for r, result in enumerate(model["results"]):
            errors += _result(result, f"{place}.results[{r}]")
    return errors


def _result(result: Any, place: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{place}" must be of type object']
    wanted = {"task": ("type",), "dataset": ("name", "type")}
    errors = [
        f'"{place}.{part}.{key}" is required'
        for part, keys in wanted.items()
        for key in keys
        if not isinstance(result.get(part), dict) or not result[part].get(key)
    ]
    metrics = result.get("metrics")
    if not isinstance(metrics, list):
        return [*errors, f'"{place}.metrics" is required']
    for n, metric in enumerate(metrics):
        errors += [f'"{place}.metrics[{n}].{key}" is required' for key in ("type", "value") if metric.get(key) is None]
    return errors
