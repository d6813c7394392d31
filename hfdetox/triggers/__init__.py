"""Triggers by name: `KIND:key=value,…` specifications, trigger files, and the list of what there is."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from hfdetox.errors import UsageError
from hfdetox.plugins import discover
from hfdetox.triggers.badnets import BadNets
from hfdetox.triggers.base import TensorKind, Trigger
from hfdetox.triggers.blended import Blended
from hfdetox.values import read, read_pairs

__all__ = [
    "BadNets",
    "Blended",
    "Trigger",
    "TriggerEntry",
    "available",
    "load_trigger",
    "parse_trigger",
    "parse_triggers",
]


def _discover() -> dict[str, type[Trigger]]:
    """Return the trigger families by name: the classes with a `kind` in the modules of this package."""
    return discover(__name__, __path__, Trigger, "kind")


KINDS = _discover()


@dataclass(frozen=True)
class TriggerEntry:
    """One entry of `hfdetox list triggers`.

    Attributes:
        kind: the family's name in a specification.
        summary: what it does to an image.
        paper: where it was published.
        parameters: each key of a specification with its default.
        words: the words that a key allows, where it allows no others.
        arrays: the fields that hold arrays, by kind; a specification can give a `picture`, a trigger file any.
    """

    kind: str
    summary: str
    paper: str
    parameters: dict[str, Any]
    words: dict[str, tuple[str, ...]]
    arrays: dict[str, TensorKind]


def available() -> dict[str, TriggerEntry]:
    """Return every trigger family by name."""
    return {name: _entry(kind) for name, kind in KINDS.items()}


def _entry(kind: type[Trigger]) -> TriggerEntry:
    arrays = kind.tensor_fields()
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(kind) if f.name not in arrays}
    words = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(kind).items() if _is_literal(hint)}
    return TriggerEntry(kind.kind, kind.summary, kind.paper, defaults, words, arrays)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def parse_triggers(specs: Sequence[str | Trigger]) -> list[Trigger]:
    """Return the triggers of several specifications; the names are made sure to be unique.

    Raises:
        UsageError: a specification is wrong, or two triggers would share a key in the report, or a file.
    """
    triggers = [spec if isinstance(spec, Trigger) else parse_trigger(spec) for spec in specs]
    seen: dict[str, str] = {}
    for name in (trigger.name for trigger in triggers):
        # where the case of a file's name does not count, A.safetensors is a.safetensors
        folded = name.casefold()
        if folded in seen:
            both = repr(name) if seen[folded] == name else f"{seen[folded]!r} and {name!r}, which may be one file"
            raise UsageError(f"two triggers are named {both}; give one of them another name with name=…")
        seen[folded] = name
    return triggers


def parse_trigger(spec: str) -> Trigger:
    """Return the trigger of `KIND:key=value,…`, or the one in a trigger file.

    Raises:
        UsageError: no such family, an unknown or repeated key, a value of the wrong type, or an unreadable file.
    """
    if spec.endswith(".safetensors"):
        return load_trigger(Path(spec))
    name, _, rest = spec.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"unknown trigger {name!r}; known: {', '.join(sorted(KINDS))}, or a .safetensors trigger file")
    known = {f.name: f for f in fields(kind)}
    shown = ", ".join(f"{key}=…" for key, f in known.items() if f.metadata.get("tensor", "picture") == "picture")
    items = (_whole(kind, item) for item in filter(None, rest.split(",")))
    texts = read_pairs(f"trigger {name}", items, known, shown)
    return kind(**{key: _parse_value(kind, known[key], text) for key, text in texts.items()})


def load_trigger(path: Path) -> Trigger:
    """Read a trigger file; raises UsageError when it is missing or not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("trigger", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    # ValueError is JSON that is none, or a number of thousands of digits; RecursionError lists within lists
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a trigger file: {error}") from error
    if not isinstance(header, dict) or str(header.get("kind")) not in KINDS:
        raise UsageError(
            f"{path} is not a trigger file: its metadata has no `trigger` of a known kind ({', '.join(KINDS)})"
        )
    kind = KINDS[header.pop("kind")]
    arrays = kind.tensor_fields()
    grouped, strange = _grouped(tensors, arrays)
    unknown = sorted(strange | (set(header) - ({f.name for f in fields(kind)} - set(arrays))))
    if unknown:
        raise UsageError(f"{path}: unknown fields {', '.join(unknown)} for a {kind.kind} trigger")
    hints = typing.get_type_hints(kind)
    for name, value in header.items():
        try:
            read(name, hints[name], value)
        except UsageError:
            raise UsageError(f"{path}: {name} cannot be {value!r} for a {kind.kind} trigger") from None
    return kind(**header, **grouped)


def _grouped(tensors: dict[str, torch.Tensor], arrays: dict[str, TensorKind]) -> tuple[dict[str, Any], set[str]]:
    """Return a file's tensors by field, those of a network together, and the names that belong to no field."""
    grouped: dict[str, Any] = {}
    strange = set()
    for name, array in tensors.items():
        field, dot, key = name.partition(".")
        if field not in arrays or bool(dot) != (arrays[field] == "network"):
            strange.add(name)
        elif dot:
            grouped.setdefault(field, {})[key] = array
        else:
            grouped[field] = array
    return grouped, strange


def _whole(kind: type[Trigger], item: str) -> str:
    """Return `KEY=item` for a bare word that is one of the words a field allows, as in `lf:random`; else the item."""
    hints = typing.get_type_hints(kind).items()
    return next((f"{name}={item}" for name, hint in hints if _is_literal(hint) and item in typing.get_args(hint)), item)


def _parse_value(kind: type[Trigger], field: Field[Any], text: str) -> Any:
    if "tensor" in field.metadata:
        if field.metadata["tensor"] != "picture":
            raise UsageError(f"trigger {kind.kind}: {field.name} is kept in trigger files and cannot be given as text")
        return _read_picture(Path(text))
    hint = typing.get_type_hints(kind)[field.name]
    # a label may be called none; and what a word must be the trigger says itself
    if field.name == "target" or _is_literal(hint):
        return text
    where = f"trigger {kind.kind}: {field.name}"
    # a specification has one spelling
    if hint is bool and text != text.lower():
        raise UsageError(f"{where} must be true or false, got {text!r}")
    return read(where, hint, text, text=True)


def _read_picture(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"trigger picture {path} cannot be read: {error}") from error
