"""Attacks by the trigger they implant: their poisoners, the settings of both, and the list of what there is."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hfdetox.attacks.base import AttackContext, Implant, Poisoner, TrainingSettings
from hfdetox.attacks.run import Implanted, run_attack
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.values import read

__all__ = ["ATTACKS", "AttackContext", "Implant", "Implanted", "Poisoner", "TrainingSettings", "parse_attack_settings",
           "poisoner_for", "run_attack"]  # fmt: skip


ATTACKS: Registry[Poisoner] = Registry("attacks", Poisoner, "kind")


def poisoner_for(kind: str, settings: Mapping[str, str]) -> Poisoner:
    """Return the poisoner of a trigger kind with `settings` (texts, as `--set` gives them, of its own fields).

    Raises:
        UsageError: no poisoner for the kind, an unknown key (the known are listed), or a wrong value.
    """
    known = _settings_of(kind)
    _check_keys(settings, known, kind)
    return ATTACKS[kind](**_parsed(ATTACKS[kind], settings))


def parse_attack_settings(
    kinds: Sequence[str], overrides: Mapping[str, str]
) -> tuple[TrainingSettings, dict[str, Poisoner]]:
    """Return the training's settings and the poisoner of each trigger kind, with `overrides` (texts) in place.

    A key that the training and a poisoner, or several poisoners, share goes to all of them.

    Raises:
        UsageError: as `poisoner_for`; an unknown key lists those of the training and of the poisoners in use.
    """
    own = {kind: _settings_of(kind) for kind in kinds}
    training = [f.name for f in fields(TrainingSettings)]
    _check_keys(overrides, [*training, *(key for keys in own.values() for key in keys)], "attack")
    poisoners = {kind: poisoner_for(kind, {key: overrides[key] for key in keys if key in overrides})
               for kind, keys in own.items()}  # fmt: skip
    shared = {key: text for key, text in overrides.items() if key in training}
    return TrainingSettings(**_parsed(TrainingSettings, shared)), poisoners


def _settings_of(kind: str) -> list[str]:
    if kind not in ATTACKS:
        raise UsageError(f"no attack implants a {kind!r} trigger; there is one for {', '.join(sorted(ATTACKS))} "
                         f"(a package adds one by the entry point hfdetox.attacks: {kind})")  # fmt: skip
    return [f.name for f in fields(ATTACKS[kind])]


def _check_keys(settings: Mapping[str, str], known: Sequence[str], what: str) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        has = f"it has {', '.join(dict.fromkeys(known))}" if known else "it has none"
        raise UsageError(f"{what} has no setting {', '.join(unknown)}; {has}")


def _parsed(kind: type[Any], settings: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {key: read(key, hints[key], text, text=True) for key, text in settings.items()}
