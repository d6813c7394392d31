"""What a run would do, found out without pulling a model: `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfdetox.config import DEFAULT_DEFENSE
from hfdetox.data.load import default_dataset
from hfdetox.defenses import parse_defense
from hfdetox.hub.download import read_text_file, resolve, weight_files
from hfdetox.runs.folder import RunFolder, check_output
from hfdetox.runs.publish import check_push_allowed
from hfdetox.training.devices import resolve_device, resolve_precision
from hfdetox.triggers import parse_triggers


def plan(
    model: str, *,
    dataset: str | None = None, dataset_revision: str | None = None, samples: int | float = 0.05,
    eval_samples: int | None = None, defense: str = DEFAULT_DEFENSE, settings: Mapping[str, str] | None = None,
    triggers: Sequence[str] = (), device: str = "auto", precision: str = "auto", revision: str | None = None,
    output: str | Path | None = None, push_to: str | None = None, private: bool = False, create_pr: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return what `detoxify` with these arguments would pull, choose, write and push; downloads a card at most.

    Raises what can be known at this point: unknown repositories, wrong settings or triggers, an output that exists.
    """
    method, preset = parse_defense(defense, dict(settings or {}))
    parse_triggers(triggers)
    kind = resolve_device(device)
    planned: dict[str, Any] = {}
    planned["model"], card = _plan_model(model, revision)
    chosen = dataset or default_dataset(card)
    local = dataset is not None and Path(dataset).exists()
    source = None if local else resolve(chosen, repo_type="dataset", revision=dataset_revision)
    planned["dataset"] = {
        "id": chosen, "revision": source.sha if source else None, "samples": samples, "eval_samples": eval_samples,
    }  # fmt: skip
    planned["defense"] = {"name": method.name, "preset": preset, **method.settings()}
    planned["triggers"] = list(triggers)
    planned["device"], planned["precision"] = kind, resolve_precision(precision, kind)
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
        RunFolder.beside(output).refuse_existing()
        planned["output"] = str(output)
    if push_to is not None:
        planned["push_to"] = check_push_allowed(push_to, private=private, create_pr=create_pr, overwrite=overwrite)
    return planned


def _plan_model(model: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    if Path(model).is_dir():
        readme = Path(model) / "README.md"
        card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
        return {"id": model, "revision": None, "files": [file.name for file in Path(model).glob("*.safetensors")]}, card
    repo_id, _, at = model.removeprefix("hf_hub:").removeprefix("hf-hub:").partition("@")
    state = resolve(repo_id, revision=revision or at or None)
    planned = {"id": state.id, "revision": state.sha, "files": weight_files(state)}
    return planned, read_text_file(state.id, "README.md", state.sha)
