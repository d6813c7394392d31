"""Defenses by name: `NAME[:PRESET]` with `KEY=VALUE` overrides, and the list of what there is."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hfdetox.defenses.base import DefenseConfig
from hfdetox.defenses.d3 import D3Config
from hfdetox.errors import UsageError
from hfdetox.plugins import discover
from hfdetox.values import read, to_text, words_of

__all__ = ["D3Config", "DefenseConfig", "DefenseEntry", "available", "parse_defense"]


def _discover() -> dict[str, type[DefenseConfig]]:
    """Return the defenses by name: the classes with a `name` in the modules of this package."""
    return discover(__name__, __path__, DefenseConfig, "name")


DEFENSES = _discover()


@dataclass(frozen=True)
class DefenseEntry:
    """One entry of `hfdetox list defenses`; `parameters` maps each key to its default, the first preset is it.

    `words` has the words that a setting may be.
    """

    name: str
    summary: str
    paper: str
    data: str
    cost: str
    presets: dict[str, dict[str, Any]]
    parameters: dict[str, Any]
    words: dict[str, tuple[str, ...]]


def available() -> dict[str, DefenseEntry]:
    """Return every defense by name."""
    return {
        name: DefenseEntry(
            name, config.summary, config.paper, config.data, config.cost,
            {preset: {k.rstrip("_"): v for k, v in values.items()} for preset, values in config.presets.items()},
            {f.name.rstrip("_"): f.default for f in fields(config)},
            {key.rstrip("_"): words_of(hint) for key, hint in typing.get_type_hints(config).items() if words_of(hint)},
        )
        for name, config in sorted(DEFENSES.items())
    }  # fmt: skip


def parse_defense(spec: str, overrides: Mapping[str, str] | None = None) -> tuple[DefenseConfig, str]:
    """Return the configuration of `NAME[:PRESET]` with `overrides` (texts, as `--set` gives them), and the preset.

    Raises:
        UsageError: unknown defense, preset or key (the known are listed), or a value of the wrong type or range.
    """
    name, _, preset = spec.partition(":")
    kind = DEFENSES.get(name)
    if kind is None:
        raise UsageError(f"unknown defense {name!r}; known: {', '.join(sorted(DEFENSES))}")
    preset = preset or next(iter(kind.presets))
    if preset not in kind.presets:
        raise UsageError(f"{name} has no preset {preset!r}; it has {', '.join(kind.presets)}")
    keys = {f.name.rstrip("_"): f.name for f in fields(kind)}
    unknown = sorted(set(overrides or {}) - set(keys))
    if unknown:
        raise UsageError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(keys)}")
    hints = typing.get_type_hints(kind)
    parsed = {keys[key]: read(key, hints[keys[key]], text, text=True) for key, text in (overrides or {}).items()}
    values = {**kind.presets[preset], **parsed}
    # who names a number of epochs means it
    if "epochs" in parsed and "min_steps" not in parsed:
        values.pop("min_steps", None)
    return kind(**values), preset


def describe_defense(config: DefenseConfig) -> tuple[str, dict[str, str]]:
    """Return the (spec, overrides) from which `parse_defense` makes an equal configuration."""
    base = type(config)()
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return config.name, {
        key.rstrip("_"): to_text(value) for key, value in values.items() if value != getattr(base, key)
    }
