"""Classes that nobody has registered: a defense, a trigger and an attack, passed to the Python API as objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox import DetoxResult, UsageError, detoxify, evaluate, implant
from hfdetox.attacks import Implant, run_attack
from hfdetox.attacks.base import DataPoisoner
from hfdetox.defenses.base import TuningConfig, clean_terms, trained_parameters
from hfdetox.models.network import Network
from hfdetox.reporting.report import Report
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase
from hfdetox.triggers import BadNets, Trigger, load_trigger
from tests.attacks.toy_jobs import toy_job
from tests.colours import train_on_colours
from tests.tiny_training import _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

TUNING: dict[str, Any] = {"epochs": 3, "batch_size": 16, "learning_rate": 0.001, "augmentation": "none"}


@dataclass(frozen=True, kw_only=True)
class OwnConfig(TuningConfig):
    """Fine-tuning that can be made to fail in its second epoch; one setting has no default."""

    name = "own"
    fails: ClassVar[bool] = False

    strength: float
    layers: tuple[str, ...] = ()

    def phases(self, network: Network) -> list[Phase | Pass]:
        def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return {**clean_terms(model, batch), "strength": torch.tensor(self.strength)}

        def stop(entry: Any) -> bool:
            if type(self).fails and entry["epoch"] == 2:
                raise KeyboardInterrupt
            return False

        return [self.phase(name="own", parameters=trained_parameters(network), loss=loss, stop=stop)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted(Trigger):
    """The negative, where a mask is 1."""

    kind = "inverted"

    mask: torch.Tensor = field(default_factory=lambda: torch.ones(1), metadata={"tensor": "array"})

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return 255 - images if self.mask.any() else images


@dataclass(frozen=True, kw_only=True)
class InvertedPoisoner(DataPoisoner):
    """Some images are negatives."""

    kind = "inverted"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a model of colours, and one with the colours."""
    return train_on_colours(tmp_path_factory.mktemp("own"))


@pytest.fixture
def run(model: tuple[Path, Path], tmp_path: Path) -> Callable[..., DetoxResult]:
    """`run(defense=…, …)` cleans the model into the folder `out`."""

    def call(**arguments: Any) -> DetoxResult:
        given: dict[str, Any] = {"samples": 48, "eval_samples": 30, "device": "cpu", "precision": "no",
                                 "output": tmp_path / "out", "progress": False}  # fmt: skip
        if "resume" not in arguments:
            given |= {"model": model[0], "dataset": model[1]}
        return detoxify(**{**given, **arguments})

    return call


def test_a_defense_of_the_callers_own_class_runs_and_is_recorded(
    run: Callable[..., DetoxResult], tmp_path: Path
) -> None:
    result = run(defense=OwnConfig(strength=0.25, layers=("head",), **TUNING), keep_run=True)
    assert [entry["strength"] for entry in result.report.history] == [0.25] * 3
    recorded = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert recorded["defense"] == "own"
    assert recorded["settings"] == {"strength": "0.25", "layers": "head", "epochs": "3", "batch_size": "16",
                                    "learning_rate": "0.001", "augmentation": "none"}  # fmt: skip
    report = Report.load(tmp_path / "out").defense
    assert (report.name, report.preset, report.parameters["strength"]) == ("own", None, 0.25)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The defense `own` changed the model with the help of 48 trusted images." in card
    assert "strength" in card
    # no command can name the class
    assert result.report.environment.command == ""


def test_a_stopped_run_needs_its_object_again(
    run: Callable[..., DetoxResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, resume = OwnConfig(strength=0.5, **TUNING), tmp_path / "out.run"
    triggers = [Inverted(target="red"), BadNets(target="red")]
    monkeypatch.setattr(OwnConfig, "fails", True)
    with pytest.raises(KeyboardInterrupt):
        run(defense=own, triggers=triggers)
    monkeypatch.setattr(OwnConfig, "fails", False)
    for given, said in (
        ({"triggers": triggers}, "this run's defense own was a Python object of a class that no installed package"),
        ({"triggers": triggers, "defense": replace(own, strength=0.4)}, "this run's defense is own with {.*'0.5'.*}"),
        ({"triggers": triggers, "defense": replace(own, epochs=2)}, "and not the object: leave defense out"),
        ({"defense": own}, "holds a trigger that is not of a known kind .* the entry point 'inverted'"),
        ({"defense": own, "triggers": [Inverted(target="blue")]}, "the trigger inverted is not the one that this run"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            run(resume=resume, **given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    result = run(resume=resume, defense=own, triggers=triggers[:1])
    assert [entry["epoch"] for entry in result.report.history] == [1, 2, 3]
    whole = run(defense=own, triggers=triggers, output=tmp_path / "whole")
    assert result.report.after == whole.report.after
    assert result.report.output.weights_sha256 == whole.report.output.weights_sha256


def test_an_object_that_cannot_be_recorded_is_refused_before_anything_is_pulled() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Impostor(OwnConfig):
        name = "d3"

    @dataclass(frozen=True, kw_only=True)
    class Held(OwnConfig):
        name = "held"
        kept: Any = frozenset({1})

    @dataclass(frozen=True, kw_only=True)
    class Nameless(OwnConfig):
        name = ""

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Patch(Inverted):
        kind = "badnets"

    for arguments, said in (
        ({"defense": Impostor(strength=1.0)}, "Impostor calls itself 'd3', which is the name of another defense"),
        ({"defense": Held(strength=1.0)}, "held: a report cannot hold the settings"),
        ({"defense": Nameless(strength=1.0)}, "has no name: give the class the attribute `name`"),
        ({"triggers": [Patch()]}, "Patch calls itself 'badnets', which is the name of another trigger"),
    ):
        with pytest.raises(UsageError, match=said):
            detoxify("org/nowhere", **arguments)  # type: ignore[arg-type]


def test_a_trigger_of_the_callers_own_class_is_measured_and_its_file_says_what_is_missing(
    model: tuple[Path, Path], run: Callable[..., DetoxResult], tmp_path: Path
) -> None:
    trigger = Inverted(target="red")
    measured = evaluate(model[0], dataset=model[1], triggers=[trigger], device="cpu", progress=False)
    assert measured.triggers["inverted"].kind == "inverted"
    result = run(defense="bn", triggers=[trigger])
    assert result.report.after.triggers["inverted"].spec == "triggers/inverted.safetensors"
    assert "inverted" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="install the package that has the entry point 'inverted' in"):
        load_trigger(tmp_path / "out" / "triggers" / "inverted.safetensors")
    with pytest.raises(UsageError, match=r"no attack implants a 'inverted' trigger.*entry point hfdetox\.attacks: inv"):
        implant(model[0], dataset=model[1], triggers=[trigger])


def test_an_attack_of_the_callers_own_class_trains(accelerator: Accelerator) -> None:
    job = toy_job(accelerator, side=16)
    done = run_attack(job, [Implant(Inverted(mode="input"), 0, 0.2, InvertedPoisoner())])
    assert done.poisoned == {"inverted": round(0.2 * len(job.clean))}
