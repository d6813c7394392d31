"""Defenses by name: `NAME[:PRESET]` with `KEY=VALUE` overrides, and the list of what there is."""

import json
from collections.abc import Mapping
from dataclasses import fields

from hfdetox.defenses.auto import D3Config
from hfdetox.defenses.base import DefenseConfig
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.values import read_settings, to_text

__all__ = ["DEFENSES", "D3Config", "DefenseConfig", "choose_defense", "describe_defense", "parse_defense"]


DEFENSES: Registry[DefenseConfig] = Registry("defenses", DefenseConfig, "name")


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
    parsed = read_settings(name, kind, overrides or {})
    values = {**kind.presets[preset], **parsed}
    # who names a number of epochs means it
    if "epochs" in parsed and "min_steps" not in parsed:
        values.pop("min_steps", None)
    return kind(**values), preset


def describe_defense(config: DefenseConfig) -> tuple[str, dict[str, str]]:
    """Return the (spec, overrides) from which `parse_defense` makes an equal configuration, if its class is registered.

    Raises:
        UsageError: the class has no name or that of another defense, or a setting that a report cannot hold.
    """
    DEFENSES.holds(type(config))
    try:
        json.dumps(config.settings())
    except (TypeError, ValueError) as error:
        raise UsageError(f"{config.name}: a report cannot hold the settings ({error}): numbers, texts, true, false, "
                         "None and lists of these are known; have settings() return such") from error  # fmt: skip
    base = {f.name: f.default for f in fields(config)} | dict(next(iter(config.presets.values())))
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return config.name, {key.rstrip("_"): to_text(value) for key, value in values.items() if value != base[key]}


def choose_defense(given: object, spec: str, texts: Mapping[str, str], *, resumed: bool) -> tuple[DefenseConfig, str]:
    """Return the configuration of a run with its preset: the object that the caller gave, or what the run has recorded.

    Args:
        given: what the caller asks for; of a resumed run only an object counts, for its class may be nowhere else.
        spec: as recorded, with the settings as `texts`.

    Raises:
        UsageError: the run has recorded another defense than the object, or one that can be had from nowhere.
    """
    if isinstance(given, DefenseConfig):
        if (spec, texts) != describe_defense(given):
            raise UsageError(f"this run's defense is {spec} with {dict(texts)}, and not the object: leave defense out")
        return given, next(iter(given.presets))
    if resumed and spec.partition(":")[0] not in DEFENSES:
        raise UsageError(f"this run's defense {spec} was a Python object of a class that no installed package offers: "
                         "resume it from Python, and pass defense=… again")  # fmt: skip
    return parse_defense(spec, texts)
