"""Triggers by name: `KIND:key=value,…` specifications, trigger files, and the list of what there is."""

import typing
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from hfdetox.documents import parse_json
from hfdetox.errors import UsageError, one_line, refusing
from hfdetox.plugins import Registry
from hfdetox.specs import read_pairs, split_items
from hfdetox.triggers.badnets import BadNets
from hfdetox.triggers.base import Trigger
from hfdetox.triggers.blended import Blended
from hfdetox.values import read, shown, words_of

__all__ = ["TRIGGERS", "BadNets", "Blended", "Trigger", "load_trigger", "parse_trigger", "parse_triggers"]


TRIGGERS: Registry[Trigger] = Registry("triggers", Trigger, "kind")


def parse_triggers(specs: Sequence[object]) -> list[Trigger]:
    """Return the triggers of several specifications; the names are made sure to be unique.

    Args:
        specs: texts, or `Trigger` objects, which stay as they are.

    Raises:
        UsageError: a specification is wrong, an object's class has the kind of another one, or two triggers would share
            a key in the report, or a file.
    """
    triggers = [spec if isinstance(spec, Trigger) else parse_trigger(str(spec)) for spec in specs]
    for trigger in triggers:
        TRIGGERS.holds(type(trigger))
    seen: dict[str, str] = {}
    for name in (trigger.name for trigger in triggers):
        # where the case of a file's name does not count, A.safetensors is a.safetensors
        folded = name.casefold()
        if folded in seen:
            both = repr(name) if seen[folded] == name else f"{seen[folded]!r} and {name!r}, which may be one file"
            raise UsageError(f"two triggers are named {both}; give one of them another name with name=…")
        seen[folded] = name
    return triggers


def reload_triggers(files: Sequence[object], given: Sequence[object]) -> list[Trigger]:
    """Return the triggers of a run that goes on, from its trigger files.

    Args:
        given: what the caller names; an object stands for the file with its name, for its class may be nowhere else.

    Raises:
        UsageError: an object is not the one in the file, or a file's kind is not known.
    """
    objects = {trigger.name: trigger for trigger in given if isinstance(trigger, Trigger)}
    paths = [Path(str(file)) for file in files]
    for file in paths:
        if file.stem in objects and objects[file.stem].file_bytes() != file.read_bytes():
            raise UsageError(f"the trigger {file.stem} is not the one that this run began with: leave it out")
    return parse_triggers([objects.get(path.stem, path) for path in paths])


def parse_trigger(spec: str) -> Trigger:
    """Return the trigger of `KIND:key=value,…`, or the one in a trigger file.

    Raises:
        UsageError: no such family, an unknown or repeated key, a value of the wrong type, or an unreadable file.
    """
    if spec.endswith(".safetensors"):
        return load_trigger(Path(spec))
    name, _, rest = spec.partition(":")
    kind = TRIGGERS.get(name)
    if kind is None:
        known = ", ".join(sorted(TRIGGERS))
        raise UsageError(f"unknown trigger {shown(name)}; known: {known}, or a .safetensors trigger file")
    own = {f.name: f for f in fields(kind)}
    listed = ", ".join(f"{key}=…" for key, f in own.items() if f.metadata.get("tensor", "picture") == "picture")
    items = (_whole(kind, item) for item in split_items(f"trigger {name}", rest))
    texts = read_pairs(f"trigger {name}", items, own, listed)
    return kind(**{key: _parse_value(kind, own[key], text) for key, text in texts.items()})


def load_trigger(path: Path) -> Trigger:
    """Read a trigger file; raises UsageError when it is missing or not one."""
    with (
        refusing(f"{one_line(path, 200)} cannot be read as a trigger file"),
        safe_open(str(path), framework="pt") as file,
    ):
        header = parse_json((file.metadata() or {}).get("trigger", "null"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    name = header.pop("kind", None) if isinstance(header, dict) else None
    if not isinstance(name, str):
        raise UsageError(f"{path} is not a trigger file: its metadata has no `trigger` of a known kind")
    if name not in TRIGGERS:
        raise UsageError(f"{path} holds a trigger that is not of a known kind ({', '.join(TRIGGERS)}): install the "
                         f"package that has the entry point {name[:64]!r} in hfdetox.triggers")  # fmt: skip
    kind = TRIGGERS[name]
    grouped, strange = kind.grouped(tensors)
    unknown = sorted(strange | (set(header) - ({f.name for f in fields(kind)} - set(kind.tensor_fields()))))
    if unknown:
        raise UsageError(f"{path}: unknown fields {one_line(', '.join(unknown), 200)} for a {kind.kind} trigger")
    hints = typing.get_type_hints(kind)
    for name, value in header.items():
        try:
            read(name, hints[name], value)
        except UsageError:
            raise UsageError(f"{path}: {name} cannot be {shown(value)} for a {kind.kind} trigger") from None
    with refusing(f"{path} holds no {kind.kind} trigger"):
        return kind(**header, **grouped)


def _whole(kind: type[Trigger], item: str) -> str:
    """Return `KEY=item` for a bare word that is one of the words a field allows, as in `lf:random`; else the item."""
    hints = typing.get_type_hints(kind).items()
    return next((f"{name}={item}" for name, hint in hints if item in words_of(hint)), item)


def _parse_value(kind: type[Trigger], field: Field[Any], text: str) -> Any:
    if "tensor" in field.metadata:
        if field.metadata["tensor"] != "picture":
            raise UsageError(f"trigger {kind.kind}: {field.name} is kept in trigger files and cannot be given as text")
        return _read_picture(Path(text))
    hint = typing.get_type_hints(kind)[field.name]
    # a label may be called none; and what a word must be the trigger says itself
    if field.name == "target" or words_of(hint):
        return text
    where = f"trigger {kind.kind}: {field.name}"
    # a specification has one spelling
    if hint is bool and text != text.lower():
        raise UsageError(f"{where} must be true or false, got {shown(text)}")
    return read(where, hint, text, text=True)


def _read_picture(path: Path) -> torch.Tensor:
    # Pillow raises a dozen types over a damaged file
    with refusing(f"trigger picture {one_line(path, 200)} cannot be read"), Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
