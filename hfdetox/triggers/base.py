"""What a trigger is: a function from uint8 images to uint8 images that can be named, saved and repeated."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Mode = Literal["native", "input"]


@dataclass(frozen=True, kw_only=True)
class Trigger(ABC):
    """A deterministic map of uint8 images, plus the label an attacker ties to it.

    Attributes:
        name: the key of this trigger in a report; unique within a run.
        target: the attacker's label, a name or an index; None takes the run's `target`.
        mode: `native` acts on the decoded image before any resize, `input` on the image after resize and crop.
    """

    kind: ClassVar[str]

    name: str = ""
    target: str | int | None = None
    mode: Mode = "native"

    @abstractmethod
    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Return triggered copies of `images` (uint8, N×C×H×W, range 0 to 255), same shape, dtype and device."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trigger's own arrays (an embedded picture, a warp), saved beside its parameters."""
        return {}

    def parameters(self) -> dict[str, Any]:
        """Return every field that is plain data, by name, as the trigger file's JSON keeps it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("tensor") is None}

    def spec(self) -> str:
        """Return the `NAME:key=value,…` form that `--trigger` accepts, defaults left out."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)
                   if f.metadata.get("tensor") is None and getattr(self, f.name) not in (f.default, None)
                   and not (f.name == "name" and self.name == self.kind)]
        return f"{self.kind}:{','.join(changed)}" if changed else self.kind

    def save(self, path: Path) -> None:
        """Write the trigger to one `.safetensors` file; its JSON is the metadata key `trigger`."""
        header = json.dumps({"kind": self.kind, **self.parameters()}, sort_keys=True)
        # safetensors refuses a file without tensors in some readers; a zero-length marker keeps every trigger one file
        tensors = self.tensors() or {"empty": torch.zeros(0, dtype=torch.uint8)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata={"trigger": header})


def read_trigger_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the JSON and the tensors of a trigger file; KeyError without the metadata key `trigger`."""
    with safe_open(str(path), framework="pt") as file:
        header = json.loads((file.metadata() or {})["trigger"])
        return header, {name: file.get_tensor(name) for name in file.keys() if name != "empty"}
