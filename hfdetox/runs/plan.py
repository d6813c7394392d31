"""What a run would do, found out without pulling a model: `--dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfdetox.arguments import takes
from hfdetox.config import DetoxOptions
from hfdetox.data.load import default_dataset
from hfdetox.defenses import parse_defense
from hfdetox.hub.download import read_text_file, resolve, weight_files
from hfdetox.models.loaded import check_links
from hfdetox.runs.folder import RunFolder, check_output
from hfdetox.runs.publish import check_push_allowed
from hfdetox.training.devices import resolve_device, resolve_precision
from hfdetox.triggers import parse_triggers


@takes(DetoxOptions)
def plan(options: DetoxOptions) -> dict[str, Any]:
    """Return what `detoxify` with these arguments would pull, choose, write and push; downloads a card at most.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: what can be known at this point: unknown repositories, wrong settings or triggers, an
            output that exists.
    """
    method, preset = parse_defense(str(options.defense), options.settings)
    parse_triggers(options.triggers)
    kind = resolve_device(options.device)
    planned: dict[str, Any] = {}
    planned["model"], card = _plan_model(str(options.model), options.revision)
    chosen = options.dataset or default_dataset(card)
    local = options.dataset is not None and Path(options.dataset).exists()
    source = None if local else resolve(chosen, repo_type="dataset", revision=options.dataset_revision)
    planned["dataset"] = {
        "id": chosen, "revision": source.sha if source else None, "samples": options.clean_samples,
        "eval_samples": options.eval_samples,
    }  # fmt: skip
    planned["defense"] = {"name": method.name, "preset": preset, **method.settings()}
    planned["triggers"] = list(options.triggers)
    planned["device"], planned["precision"] = kind, resolve_precision(options.precision, kind)
    if options.output is not None:
        check_output(Path(options.output), overwrite=options.overwrite)
        RunFolder.beside(options.output).refuse_existing()
        planned["output"] = str(options.output)
    if options.push_to is not None:
        planned["push_to"] = check_push_allowed(options.push_to, **options.publishing())
    return planned


def _plan_model(model: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    if Path(model).is_dir():
        check_links(Path(model))
        readme = Path(model) / "README.md"
        card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
        return {"id": model, "revision": None, "files": [file.name for file in Path(model).glob("*.safetensors")]}, card
    repo_id, _, at = model.removeprefix("hf_hub:").removeprefix("hf-hub:").partition("@")
    state = resolve(repo_id, revision=revision or at or None)
    planned = {"id": state.id, "revision": state.sha, "files": weight_files(state)}
    return planned, read_text_file(state.id, "README.md", state.sha)
