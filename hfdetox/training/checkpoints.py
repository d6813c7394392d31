"""Checkpoints of a run: tensors in safetensors, the rest in JSON, never a pickle.

Random states are not kept: the engine seeds every epoch from the run's seed, so a resumed epoch draws what the
uninterrupted one would have drawn.
"""

import json
import shlex
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hfdetox.errors import RunError, refusing
from hfdetox.files import replace_folder

FORMAT = 1
CHECKPOINT_FILES = (_RECORD, _TENSORS) = ("record.json", "tensors.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What the end of an epoch leaves: `tensors` by dotted name, `record` as plain JSON."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under `prefix.`, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}


class CheckpointStore:
    """One checkpoint in a folder; a new one replaces the old in one rename, so that a kill leaves a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoint"

    def save(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write a checkpoint; raises RunError when the disk is full or the folder cannot be written."""
        fresh, old = self.folder.with_name("checkpoint.new"), self.folder.with_name("checkpoint.old")
        advice = shlex.join(["hfdetox", "--resume", str(self.folder.parent)])
        with refusing(f"cannot write the checkpoint in {self.folder.parent}", f"; free some space, then: {advice}",
                      RunError):  # fmt: skip
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            # safetensors refuses views that share memory
            flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(flat, fresh / _TENSORS)
            (fresh / _RECORD).write_text(json.dumps({"format": FORMAT, **record}), encoding="utf-8")
            # while there is no new one in its place, a kill must leave the old one
            if self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            replace_folder(fresh, self.folder, old)
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> Checkpoint | None:
        """Return the last whole checkpoint, or None; raises RunError when it is damaged or of another format."""
        # a kill between the two renames leaves only the old one
        folder = next((f for f in (self.folder, self.folder.with_name("checkpoint.old")) if f.exists()), None)
        if folder is None:
            return None
        with refusing(f"the checkpoint in {folder} cannot be read", "; start again without --resume", RunError):
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise RunError(f"the checkpoint in {folder} is of another hfdetox version; start again without --resume")
        return Checkpoint(tensors, record)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors (by `index.name`) and plain values."""
    states = optimizer.state_dict()["state"].items()
    flat = {f"{index}.{name}": value for index, values in states for name, value in values.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    return tensors, {key: value for key, value in flat.items() if key not in tensors}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor],
                   plain: Mapping[str, Any]) -> None:  # fmt: skip
    """Put back what `optimizer_tensors` took; the parameter groups keep their own settings."""
    state: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in {**tensors, **plain}.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
