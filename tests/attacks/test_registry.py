"""Attacks by name: poisoners, settings as texts, and what is said about wrong ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from hfdetox import attacks
from hfdetox.attacks import ATTACKS, Implant, Poisoner, TrainingSettings, parse_attack_settings, poisoner_for
from hfdetox.attacks.base import DataPoisoner
from hfdetox.attacks.poison import PoisonedPixels
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.triggers import parse_trigger
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

NEW_ATTACK = """
from dataclasses import dataclass
from typing import ClassVar
from hfdetox.attacks.base import DataPoisoner

@dataclass(frozen=True, kw_only=True)
class GlowPoisoner(DataPoisoner):
    kind: ClassVar[str] = "glow"
    summary: ClassVar[str] = "some images glow"
    strength: float = 0.5
"""


def test_a_new_attack_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glow.py").write_text(NEW_ATTACK)
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    found: Registry[Poisoner] = Registry("attacks", Poisoner, "kind")
    assert set(found) == {*ATTACKS, "glow"}
    monkeypatch.delitem(sys.modules, "hfdetox.attacks.glow")
    monkeypatch.setattr(attacks, "ATTACKS", found)
    training, poisoners = parse_attack_settings(["glow", "badnets"], {"strength": "0.25", "epochs": "3"})
    assert training == TrainingSettings(epochs=3)
    assert poisoners == {"glow": found["glow"](strength=0.25), "badnets": poisoner_for("badnets", {})}  # type: ignore[call-arg]
    assert found.entries()["glow"].parameters == {"strength": 0.5}


@pytest.mark.parametrize(
    "kind", [kind for kind, poisoner in ATTACKS.builtin.items() if issubclass(poisoner, DataPoisoner)]
)
def test_a_poisoner_that_needs_a_clean_model_says_so_before(kind: str, accelerator: Accelerator) -> None:
    """The story finds a surrogate, and a suite its clean baseline, by what `on_clean_model` says."""
    poisoner = poisoner_for(kind, {"encoder_epochs": "1"} if kind == "ssba" else {})
    trigger = parse_trigger(f"{kind}:mode=input{',bits=8' if kind == 'ssba' else ''}")
    context = toy_job(accelerator, side=16)

    def poisoned() -> None:
        PoisonedPixels(context, [Implant(poisoner.make(trigger, 0, context), 0, 0.1, poisoner)])

    if poisoner.on_clean_model(trigger):
        with pytest.raises(UsageError, match=f"{kind} is made on a clean model: name one with --surrogate"):
            poisoned()
    else:
        poisoned()
    assert poisoner.on_clean_model(trigger) == (kind in ("lc", "lf", "trojannn"))


def test_the_list_says_how_each_trigger_gets_in() -> None:
    entries = ATTACKS.entries()
    assert list(entries) == sorted(entries)
    how = {kind: entries[kind].member.how for kind in ("badnets", "blended", "ftrojan", "sig", "ctrl")}
    assert how == {"badnets": "dirty label", "blended": "dirty label", "ftrojan": "dirty label", "sig": "clean label",
                   "ctrl": "clean label"}  # fmt: skip
    assert all(entry.member.summary and entry.member.kind == kind for kind, entry in entries.items())


def test_without_settings_all_is_the_default() -> None:
    assert parse_attack_settings([], {}) == (TrainingSettings(), {})
    assert parse_attack_settings(["sig"], {}) == (TrainingSettings(), {"sig": poisoner_for("sig", {})})


def test_settings_are_read_as_their_fields_types() -> None:
    texts = {"learning_rate": "0.5", "weight_decay": "none", "optimizer": "adamw", "schedule": "constant"}
    training, _ = parse_attack_settings(["badnets"], texts)
    assert training == TrainingSettings(
        learning_rate=0.5, weight_decay=None, optimizer="adamw", schedule="constant"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("patch", {}, "no attack implants a 'patch' trigger; there is one for .*badnets"),
        ("badnets", {"epoch": "3", "lr": "1"}, "attack has no setting epoch, lr; it has epochs, batch_size, "),
        ("badnets", {"epochs": "3.5"}, "epochs must be a whole number, got '3.5'"),
        ("badnets", {"optimizer": "lion"}, "optimizer must be one of auto, sgd, adamw, got 'lion'"),
        ("badnets", {"epochs": "0"}, "attack: epochs must be at least 1"),
        ("badnets", {"learning_rate": "nan"}, "learning_rate must be positive and finite"),
        ("badnets", {"momentum": "1"}, r"momentum must be in \[0, 1\)"),
    ],
)
def test_a_wrong_setting_is_one_line(kind: str, texts: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_attack_settings([kind], texts)
    assert "\n" not in str(caught.value)


def test_a_poisoner_without_settings_says_so() -> None:
    with pytest.raises(UsageError, match="badnets has no setting rho; it has none"):
        poisoner_for("badnets", {"rho": "1"})
