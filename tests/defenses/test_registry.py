"""Defenses by name: presets, settings as texts, and what is said about a wrong one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hfdetox import defenses
from hfdetox.defenses import DEFENSES, D3Config, describe_defense, parse_defense
from hfdetox.defenses.base import DefenseConfig
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry

NEW_DEFENSE = """
from dataclasses import dataclass
from typing import ClassVar
from hfdetox.defenses.base import TuningConfig

@dataclass(frozen=True, kw_only=True)
class TuneConfig(TuningConfig):
    name: ClassVar[str] = "tune"
    summary: ClassVar[str] = "plain fine-tuning"
    paper: ClassVar[str] = "none"
    data: ClassVar[str] = "clean images with labels"
    cost: ClassVar[str] = "1"
    card_text: ClassVar[str] = "Fine-tuned on {images}."
    presets: ClassVar = {"plain": {}}

    def phases(self, network):
        return []
"""


def test_a_new_defense_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tune.py").write_text(NEW_DEFENSE)
    monkeypatch.setattr(defenses, "__path__", [*defenses.__path__, str(tmp_path)])
    found: Registry[DefenseConfig] = Registry("defenses", DefenseConfig, "name")
    assert set(found) == {*DEFENSES, "tune"}
    monkeypatch.delitem(sys.modules, "hfdetox.defenses.tune")
    monkeypatch.setattr(defenses, "DEFENSES", found)
    config, preset = parse_defense("tune", {"epochs": "3"})
    assert (config.name, preset, config.epochs) == ("tune", "plain", 3)


def test_every_defense_has_words_for_the_card() -> None:
    for name in DEFENSES.builtin:
        said = parse_defense(name)[0].describe("2,500 trusted images")
        assert "2,500 trusted images" in said
        assert "{" not in said


def test_a_bare_name_takes_the_first_preset() -> None:
    assert parse_defense("d3") == (D3Config(), "paper")
    assert parse_defense("d3:paper") == (D3Config(), "paper")
    assert parse_defense("d3:code") == (D3Config(lambda_=0.5), "code")


def test_who_names_the_epochs_gets_them() -> None:
    def length(**settings: str) -> tuple[int, int]:
        config, _ = parse_defense("d3:auto", settings)
        assert isinstance(config, D3Config)
        return config.epochs, config.min_steps

    assert length() == (20, 200)
    assert length(epochs="3") == (3, 0)
    assert length(epochs="3", min_steps="50") == (3, 50)
    assert length(min_steps="50") == (20, 50)


@pytest.mark.parametrize(
    ("key", "text", "field", "value"),
    [
        ("lambda", "2.5", "lambda_", 2.5),
        ("lambda", "3", "lambda_", 3.0),
        ("epochs", "7", "epochs", 7),
        ("layers", "head,layer4.*", "layers", ("head", "layer4.*")),
        ("layers", "head", "layers", ("head",)),
        ("initialization", "far", "initialization", "far"),
        ("augmentation", "none", "augmentation", "none"),
        ("freeze_norm", "False", "freeze_norm", False),
        ("freeze_norm", "true", "freeze_norm", True),
        ("max_grad_norm", "1", "max_grad_norm", 1.0),
        ("max_grad_norm", "none", "max_grad_norm", None),
    ],
)
def test_settings_are_read_as_their_fields_types(key: str, text: str, field: str, value: Any) -> None:
    config, _ = parse_defense("d3", {key: text})
    read = getattr(config, field)
    assert read == value
    assert type(read) is type(value)


def test_settings_go_over_the_preset() -> None:
    config, preset = parse_defense("d3:code", {"lambda": "4", "epochs": "2"})
    assert (config, preset) == (D3Config(lambda_=4.0, epochs=2), "code")


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("d4", {}, "unknown defense 'd4'; known: .*d3"),
        ("d3:fast", {}, "d3 has no preset 'fast'; it has paper, code, auto"),
        ("d3", {"lamda": "1", "eps": "1"}, "d3 has no setting eps, lamda; it has epochs, .*lambda, epsilon"),
        ("d3", {"lambda_": "1"}, "no setting lambda_;"),
        ("d3", {"epochs": "2.5"}, "epochs must be a whole number, got '2.5'"),
        ("d3", {"epsilon": "small"}, "epsilon must be a number or auto, got 'small'"),
        ("d3", {"max_grad_norm": "off"}, "max_grad_norm must be a number, got 'off'"),
        ("d3", {"freeze_norm": "yes"}, "freeze_norm must be true or false, got 'yes'"),
        (
            "d3",
            {"initialization": "zero"},
            "initialization must be one of near, middle, far, noise, random, got 'zero'",
        ),
        ("d3", {"augmentation": "mixup"}, "augmentation must be one of auto, none, flip, crop"),
        ("d3", {"epochs": "0"}, "d3: epochs must be at least 1, got 0"),
        ("d3", {"batch_size": "1"}, "d3: batch_size must be at least 2, got 1"),
        ("d3", {"gradient_accumulation_steps": "0"}, "gradient_accumulation_steps must be at least 1"),
        ("d3", {"learning_rate": "0"}, "learning_rate must be positive"),
        ("d3", {"learning_rate": "nan"}, "learning_rate must be positive"),
        ("d3", {"learning_rate": "inf"}, "learning_rate must be positive"),
        ("d3", {"momentum": "1"}, r"d3: momentum must be in \[0, 1\), got 1.0"),
        ("d3", {"max_grad_norm": "0"}, "d3: max_grad_norm must be positive, or none, got 0.0"),
        ("d3", {"lambda": "0"}, "lambda must be positive"),
        ("d3", {"lambda": "nan"}, "lambda must be positive"),
        ("d3", {"lambda": "inf"}, "lambda must be positive"),
        ("d3", {"epsilon": "-0.1"}, "epsilon must be at least 0"),
        ("d3", {"epsilon": "nan"}, "epsilon must be at least 0"),
        ("d3", {"epsilon": "inf"}, "epsilon must be at least 0"),
    ],
)
def test_a_wrong_defense_says_what_is_wrong_and_what_there_is(
    spec: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_defense(spec, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        D3Config(),
        D3Config(lambda_=0.5),
        D3Config(lambda_=1 / 3, epsilon=1e-05, epochs=3, layers=("head", "layer4.*"), initialization="noise"),
        D3Config(freeze_norm=False, max_grad_norm=0.1, augmentation="crop", momentum=0.0),
    ],
)
def test_a_configuration_survives_as_text(config: D3Config) -> None:
    spec, settings = describe_defense(config)
    assert all(isinstance(text, str) for text in settings.values())
    assert parse_defense(spec, settings)[0] == config


@pytest.mark.parametrize(("name", "value"), [("initialization", "zero"), ("augmentation", "Crop")])
def test_python_callers_get_the_same_check_of_words(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"d3: {name} must be one of .*, got '{value}'"):
        D3Config(**{name: value})  # type: ignore[arg-type]


def test_settings_for_the_report_are_json_and_named_as_set_names_them() -> None:
    settings = D3Config(lambda_=0.5).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["lambda"], settings["layers"], settings["max_grad_norm"]) == (0.5, ["head"], None)
    assert "lambda_" not in settings


def test_the_list_names_presets_and_defaults() -> None:
    entry = DEFENSES.entries()["d3"]
    assert list(entry.member.presets) == ["paper", "code", "auto", "auto-1"]
    assert (entry.member.presets["paper"], entry.member.presets["code"]) == ({}, {"lambda_": 0.5})
    assert entry.parameters["lambda"] == 10.0
    assert entry.parameters["layers"] == ("head",)
    assert "2411.09585" in entry.member.paper
    assert entry.package is None
    assert set(entry.parameters) == set(D3Config().settings())
