"""Options are declared once: the command line, the Python functions and `run.json` have the same ones."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import hfdetox
from hfdetox.arguments import options_of
from hfdetox.cli.app import app
from hfdetox.config import AttackOptions, DetoxOptions, EvaluateOptions, ImageOptions
from hfdetox.defenses import D3Config
from hfdetox.detox import plan
from hfdetox.errors import UsageError
from hfdetox.runs.folder import RecordedOptions, RunFolder
from hfdetox.triggers import BadNets
from tests.image_data import NAMES, write_dataset
from tests.tiny_models import timm_folder

FUNCTIONS: list[tuple[str, type[ImageOptions], Callable[..., Any]]] = [
    ("detox", DetoxOptions, hfdetox.detoxify),
    ("detox", DetoxOptions, plan),
    ("evaluate", EvaluateOptions, hfdetox.evaluate),
    ("attack", AttackOptions, hfdetox.implant),
]
IDS = ["detoxify", "plan", "evaluate", "implant"]
# what the command line spells as before, and Python by what it is
SPELLED = {
    "dataset_config": "config", "clean_samples": "samples", "triggers": "trigger", "settings": "set",
    "model_args": "model-arg",
}  # fmt: skip


def flags(command: str) -> dict[str, str]:
    """Return the long option of each parameter of a command, MODEL's being its name."""
    found = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {str(one.name): one.opts[0] for one in found}


@pytest.mark.parametrize(("command", "kind", "function"), FUNCTIONS, ids=IDS)
def test_fields_flags_parameters_and_records_are_the_same(
    command: str, kind: type[ImageOptions], function: Callable[..., Any]
) -> None:
    options, found = options_of(kind), inspect.signature(function).parameters
    assert [one.name for one in fields(kind)] == list(options)
    assert {one.name: one.default for one in fields(kind)} == {name: p.default for name, p in found.items()}
    hints = typing.get_type_hints(kind)
    assert {name: hints[name] for name in options} == {name: p.annotation for name, p in found.items()}
    assert [name for name, p in found.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY] == ["model"]
    written = {name for name, one in options.items() if one.panel is not None}
    assert set(kind("m").record()) == written
    typed = flags(command)
    assert written <= set(typed)
    for name in written - {"model"}:
        assert typed[name] == "--" + SPELLED.get(name, name.replace("_", "-"))
    for name in options:
        assert f"\n        {name}: " in (function.__doc__ or "")


def test_a_run_folder_has_every_option_and_its_first_command(tmp_path: Path) -> None:
    run, options = RunFolder(tmp_path / "out.run"), DetoxOptions("org/model", dataset="org/data", seed=3)
    run.begin(options, [])
    recorded = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert {name: recorded[name] for name in options.record()} == options.record()
    assert run.recorded() == RecordedOptions(
        **options.record(),
        original_command="hfdetox org/model --dataset org/data --seed 3",
        threads=torch.get_num_threads(),
    )


def test_objects_are_recorded_as_texts_or_not_at_all() -> None:
    options = DetoxOptions(Path("m"), dataset=object(), triggers=[BadNets(size=4)], target=3, output=Path("o"),
                           settings={"epochs": 3, "freeze_norm": True, "layers": ["a", "b"]})  # fmt: skip
    plain = options.record()
    assert json.loads(json.dumps(plain)) == plain
    known = {"model": "m", "dataset": None, "triggers": ["badnets:size=4"], "target": "index:3", "output": "o"}
    assert {name: plain[name] for name in known} == known
    assert plain["settings"] == {"epochs": "3", "freeze_norm": "true", "layers": "a,b"}
    assert options.plain().record() == plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"eval_samples": 0}, "--eval-samples must be at least 1, got 0"),
        ({"eval_samples": 1.5}, "--eval-samples must be a whole number, got 1.5"),
        ({"seed": "0"}, "--seed must be a whole number, got '0'"),
        ({"clean_samples": 0}, "--samples 0 leaves no images"),
        ({"clean_samples": 1.5}, "--samples 1.5 is not a fraction"),
        ({"clean_samples": "few"}, "--samples 'few' is neither a count"),
        ({"private": True}, "--private and --create-pr say how to publish: name the repository with --push-to"),
        ({"settings": {"epsilon": "1"}, "defense": D3Config()}, "settings= goes with the name of a defense"),
        ({"model": None}, "MODEL is missing"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        hfdetox.detoxify(**{"model": "org/there-is-none", **options})


def test_an_unknown_argument_is_named_with_the_function() -> None:
    with pytest.raises(TypeError, match=r"^detoxify\(\) got an unexpected keyword argument 'epsilon'"):
        hfdetox.detoxify("m", epsilon=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^evaluate\(\) too many positional arguments"):
        hfdetox.evaluate("m", "data")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (hfdetox.detoxify, {"samples": 0, "config": "c"}, "--samples 0 leaves no images"),
        (hfdetox.evaluate, {"config": "c", "eval_samples": 0}, "--eval-samples must be at least 1"),
        (hfdetox.implant, {"samples": 0, "config": "c"}, "--samples 0 leaves no images"),
        (hfdetox.load_images, {"samples": 0, "config": "c", "labels": NAMES}, "--samples 0 leaves no images"),
    ],
)
def test_old_names_of_arguments_warn_and_mean_the_new_ones(
    function: Callable[..., Any], old: dict[str, Any], new: str
) -> None:
    with pytest.warns(FutureWarning) as caught, pytest.raises(UsageError, match=new):
        function("org/there-is-none", **old)
    said = {str(warning.message): warning.filename for warning in caught if warning.category is FutureWarning}
    renamed = {"samples": "clean_samples", "config": "dataset_config"}
    assert set(said) == {f"{was}= is now {renamed[was]}=; the old name goes with the next release"
                         for was in renamed if was in old}  # fmt: skip
    assert set(said.values()) == {__file__}


def test_old_and_new_name_together_are_refused() -> None:
    with pytest.raises(TypeError, match="samples= is the old name of clean_samples=: give one of them"):
        hfdetox.detoxify("m", samples=1, clean_samples=2)  # type: ignore[call-arg]


def test_old_names_give_what_new_ones_give(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with pytest.warns(FutureWarning, match="samples= is now clean_samples="):
        old = hfdetox.load_images(tmp_path, labels=NAMES, samples=12)  # type: ignore[call-arg]
    assert old.info == hfdetox.load_images(tmp_path, labels=NAMES, clean_samples=12).info
    model = timm_folder(tmp_path / "model")
    (tmp_path / "map.json").write_text('{"horse": "elk"}')
    with pytest.warns(FutureWarning, match="samples= is now clean_samples="):
        planned = plan(model, dataset=str(tmp_path), samples=7, label_map=tmp_path / "map.json")  # type: ignore[call-arg]
    assert planned["dataset"]["samples"] == 7


def test_options_are_light() -> None:
    code = "import sys, hfdetox.config; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("triggers", ["badnets", 5])
def test_triggers_are_a_list(triggers: Any) -> None:
    with pytest.raises(UsageError, match="triggers must be a list"):
        DetoxOptions("org/model", triggers=triggers)
