"""Attacks by the trigger they implant: their poisoners, the settings of both, and the list of what there is."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from hfdetox.attacks.base import AttackContext, Implant, Poisoner, TrainingSettings
from hfdetox.attacks.run import Implanted, run_attack
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.values import check_keys, read_settings

__all__ = ["ATTACKS", "AttackContext", "Implant", "Implanted", "Poisoner", "TrainingSettings", "parse_attack_settings",
           "poisoner_for", "run_attack"]  # fmt: skip


ATTACKS: Registry[Poisoner] = Registry("attacks", Poisoner, "kind")


def poisoner_for(kind: str, settings: Mapping[str, str]) -> Poisoner:
    """Return the poisoner of a trigger kind with `settings` (texts, as `--set` gives them, of its own fields).

    Raises:
        UsageError: no poisoner for the kind, an unknown key (the known are listed), or a wrong value.
    """
    if kind not in ATTACKS:
        raise UsageError(f"no attack implants a {kind!r} trigger; there is one for {', '.join(sorted(ATTACKS))} "
                         f"(a package adds one by the entry point hfdetox.attacks: {kind})")  # fmt: skip
    return ATTACKS[kind](**read_settings(kind, ATTACKS[kind], settings))


def parse_attack_settings(
    kinds: Sequence[str], overrides: Mapping[str, str]
) -> tuple[TrainingSettings, dict[str, Poisoner]]:
    """Return the training's settings and the poisoner of each trigger kind, with `overrides` (texts) in place.

    A key that the training and a poisoner, or several poisoners, share goes to all of them.

    Raises:
        UsageError: as `poisoner_for`; an unknown key lists those of the training and of the poisoners in use.
    """
    owners: dict[str, TrainingSettings | Poisoner] = {"": TrainingSettings()}
    owners |= {kind: poisoner_for(kind, {}) for kind in kinds}
    keys = {name: [f.name for f in fields(owner)] for name, owner in owners.items()}
    check_keys("attack", overrides, dict.fromkeys(key for names in keys.values() for key in names))
    own = {name: {key: overrides[key] for key in names if key in overrides} for name, names in keys.items()}
    training = TrainingSettings(**read_settings("attack", TrainingSettings, own.pop("")))
    return training, {kind: poisoner_for(kind, texts) for kind, texts in own.items()}
