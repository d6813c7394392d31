"""The command line without the pipeline: what is parsed, refused and printed, and that refusing it is quick."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import hfdetox
from hfdetox.cli import app as cli
from hfdetox.cli.options import CommandLine, default_output, detox_options, run_folder
from hfdetox.config import ConsoleOptions, DetoxConsole, DetoxOptions
from hfdetox.defenses import DEFENSES
from hfdetox.specs import read_pair

Run = Callable[..., subprocess.CompletedProcess[str]]

HEAVY = ("torch", "torchvision", "transformers", "timm", "datasets", "huggingface_hub", "accelerate", "matplotlib")
PROBE = """
import sys
from hfdetox.cli.app import run
status = run(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else status)
"""
USAGE_ERRORS = {
    "no-model": ([], "MODEL is missing"),
    "unknown-option": (["m", "--bogus"], "No such option: --bogus"),
    "two-models": (["m", "n"], "unexpected extra argument"),
    "no-samples": (["m", "--samples", "0"], "--samples 0 leaves no images"),
    "negative-samples": (["m", "--samples", "-3"], "--samples -3 leaves no images"),
    "no-fraction": (["m", "--samples", "1.5"], "--samples 1.5 is not a fraction"),
    "zero-fraction": (["m", "--samples", "0.0"], "--samples 0.0 is not a fraction"),
    "samples-text": (["m", "--samples", "few"], "neither a count"),
    "precision": (["m", "--precision", "fp8"], "--precision"),
    "device": (["m", "--device", "tpu"], "--device"),
    "tracker": (["m", "--log-with", "paper"], "--log-with"),
    "seed": (["m", "--seed", "-1"], "--seed"),
    "epochs": (["m", "--epochs", "0"], "--epochs"),
    "label-map": (["m", "--label-map", "nowhere.json"], "--label-map"),
    "not-a-setting": (["m", "--set", "epochs"], "--set 'epochs' is not KEY=VALUE"),
    "epochs-twice": (["m", "--epochs", "3", "--set", "epochs=4"], "epochs is given twice"),
    "lr-twice": (["m", "--lr", "0.1", "--set", "learning-rate=0.1"], "learning_rate is given twice"),
    "batch-twice": (["m", "--batch-size", "8", "--set", "batch_size=8"], "batch_size is given twice"),
    "set-twice": (["m", "--set", "epsilon=1", "--set", "epsilon=1"], "epsilon is given twice"),
    "private-alone": (["m", "--private"], "--push-to"),
    "create-pr-alone": (["m", "--create-pr"], "--push-to"),
    "no-run-folder": (["--resume", "nowhere.run"], "--resume"),
    "evaluate-nothing": (["evaluate"], "MODEL is missing"),
    "evaluate-defense": (["evaluate", "m", "--defense", "d3"], "No such option: --defense"),
    "gallery-of-nothing": (["evaluate", "m", "--gallery", "g.png"], "name at least one with --trigger"),
    "gallery-name": (["evaluate", "m", "--trigger", "badnets", "--gallery", "g.gif"], "ends in .png, not 'g.gif'"),
    "gallery-folder": (["evaluate", "m", "--trigger", "badnets", "--gallery", "no/g.png"], "there is no folder no"),
    "push-nothing": (["push"], "Missing argument"),
    "list-unknown": (["list", "defences"], "': 'defences' is not one of"),
    "push-nowhere": (["push", "nowhere", "me/model"], "nowhere"),
    "bench-nothing": (["bench"], "SUITE is missing: name a suite file"),
    "bench-nowhere": (["bench", "nowhere.yaml"], "nowhere.yaml"),
    "list-nothing": (["list"], "defenses"),
    "list-other": (["list", "models"], "models"),
    "demo-argument": (["demo", "digits"], "unexpected extra argument"),
    "long-argument": (["m", "x" * 5000], "xxx … xxx"),
}


def line(**spelled: Any) -> CommandLine:
    """Return a command line of `hfdetox detox` as Typer reads it."""
    left = {"settings": [], "epochs": None, "lr": None, "batch_size": None, "reweight": None}
    return CommandLine([DetoxOptions, DetoxConsole], left | spelled, set(spelled))


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a fresh process that fails if it imported one of HEAVY."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(HEAVY), *arguments], capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        (["bench", "suite.yaml"], "a: [", "suite.yaml is not valid YAML"),
        (["bench", "suite.yaml"], "", "suite.yaml: the suite is empty; it needs models and grids, or subjects"),
        (["bench", "suite.yaml", "--output", "suite.yaml"], "a: 1", "--output suite.yaml: suite.yaml is a file"),
        (["bench", "suite.yaml", "--output", "suite.yaml/x"], "a: 1", "suite.yaml is a file; name a folder"),
        (["attack", "--suite", "suite.yaml", "--output", "zoo"], "a: [", "suite.yaml is not valid YAML"),
    ],
)
def test_a_file_that_is_no_suite_is_refused_before_the_libraries_load(
    command: list[str], text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suite.yaml").write_text(text)
    process = probe(*command)
    assert process.returncode == 2
    assert process.stderr.startswith("hfdetox: error: ")
    assert said in process.stderr
    assert process.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]


@pytest.mark.parametrize(("arguments", "said"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_error_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hfdetox: error: ")
    assert err.count("\n") == 1
    # click 8.5, under Typer before 0.26: No such option '--bogus'.
    assert said in re.sub(r"No such option '(\S+)'", r"No such option: \1", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["detox", "--help"], 0),
        (["m", "--version"], 0),
        (["evaluate", "--help"], 0),
        ([], 2),
        (["m", "--bogus"], 2),
        (["m", "--samples", "0"], 2),
        (["m", "--epochs", "3", "--set", "epochs=4"], 2),
        (["push"], 2),
    ],
)
def test_help_version_and_usage_errors_are_light(arguments: list[str], status: int) -> None:
    process = probe(*arguments)
    assert process.returncode == status, process.stderr


def test_probe_sees_a_heavy_import() -> None:
    assert "imported ['torch'" in probe("list", "triggers").stderr


def test_help_lists_the_commands_and_no_other(run_cli: Run) -> None:
    text = run_cli(["--help"]).stdout
    commands = {line.split()[1] for line in text.partition("Commands")[2].splitlines() if line[2:3].isalpha()}
    assert commands == {
        "attack",
        "bench",
        "detox",
        "evaluate",
        "gate",
        "push",
        "demo",
        "list",
        "report",
        "scan",
        "verify",
    }


def test_version_of_module_and_script_agree(run_cli: Run) -> None:
    assert run_cli(["--version"]).stdout == f"hfdetox {hfdetox.__version__}\n"
    script = Path(sys.executable).with_name("hfdetox")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout == run_cli(["--version"]).stdout


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["org/model"], ["detox", "org/model"]),
        (["--resume", "x.run"], ["detox", "--resume", "x.run"]),
        (["detox", "push"], ["detox", "push"]),
        (["./push"], ["detox", "./push"]),
        (["push", "a", "b"], ["push", "a", "b"]),
        (["--version"], ["--version"]),
        ([], ["detox"]),
    ],
)
def test_detox_is_inserted(typed: list[str], meant: list[str]) -> None:
    assert cli.with_command(typed) == meant


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), ("500", 500), ("0.05", 0.05), ("1.0", 1.0), ("1", 1), (".5", 0.5)]
)
def test_a_point_makes_a_fraction(text: str, number: float) -> None:
    parsed = line(clean_samples=text).options(DetoxOptions).clean_samples
    assert parsed == number
    assert type(parsed) is type(number)


def test_settings_stay_text_and_keep_later_equals_signs() -> None:
    assert read_pair("--set", "layers=a=b,c") == ("layers", "a=b,c")
    assert read_pair("--set", "batch-size= 8 ") == ("batch_size", "8")


def test_short_settings_join_set() -> None:
    options = line(model="m", settings=["epsilon=0.2"], epochs=3, lr=0.01, batch_size=16).options(DetoxOptions)
    assert options.settings == {
        "epochs": "3",
        "learning_rate": "0.01",
        "batch_size": "16",
        "epsilon": "0.2",
    }


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("org/model", "model-detoxed"),
        ("hf_hub:org/model@v1", "model-detoxed"),
        ("hf-hub:org/model", "model-detoxed"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k-detoxed"),
        ("model", "model-detoxed"),
    ],
)
def test_default_output_is_named_after_the_model(model: str, folder: str) -> None:
    assert default_output(model) == Path(folder)


def test_default_output_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v1@home").mkdir()
    assert default_output(f"{tmp_path}/v1@home/") == Path("v1@home-detoxed")
    monkeypatch.chdir(tmp_path / "v1@home")
    assert default_output(".") == Path("v1@home-detoxed")


def test_resume_takes_what_concerns_the_end_of_the_run_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "m-detoxed.run"
    run_folder.mkdir()
    for anew in (
        ["--seed", "0"],
        ["--samples", "0.05"],
        ["--set", "epsilon=1"],
        ["--trigger", "badnets"],
        ["--dry-run"],
    ):
        assert cli.run(["--resume", str(run_folder), *anew]) == 2, anew
        assert f"leave out {anew[0]}" in capsys.readouterr().err
    anew = {"resume": run_folder, "push_to": "me/m", "private": True, "keep_run": True}
    options = detox_options(line(**anew, quiet=True, as_json=True, debug=True))
    assert options.changed() == {**anew, "settings": {}}


def test_interrupted_run_says_how_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "my model-detoxed.run"
    run_folder.mkdir()
    with pytest.raises(typer.Exit) as caught, cli.running(ConsoleOptions(), lambda: cli.resume_advice(run_folder)):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == f"hfdetox: interrupted; resume with: hfdetox --resume '{run_folder}'\n"
    assert "nothing was written" in cli.resume_advice(tmp_path / "absent.run")


def test_an_interrupted_run_does_not_take_an_earlier_result_for_its_own(tmp_path: Path) -> None:
    run_folder, report = tmp_path / "out.run", tmp_path / "out" / "detox_report.json"
    assert cli.written(tmp_path / "out") is None
    report.parent.mkdir()
    report.write_text("{}")
    earlier = cli.written(tmp_path / "out")
    assert "nothing was written" in cli.resume_advice(run_folder, earlier=earlier)
    # a result comes as a whole new folder
    report.parent.rename(tmp_path / "old")
    report.parent.mkdir()
    report.write_text("{}")
    assert cli.resume_advice(run_folder, earlier=earlier).startswith(f"the result in {tmp_path / 'out'} is whole")


def test_a_run_is_not_resumed_for_another_model_nor_published_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfdetox.runs.folder import RunFolder

    run = RunFolder(tmp_path / "out.run")
    run.begin(DetoxOptions("org/model", dataset="org/data", revision="a" * 40), [])
    for more, said in (
        (["org/other"], "is a run of org/model, not of org/other: leave the model out"),
        (["--private"], "name the repository with --push-to"),
        (["--create-pr"], "name the repository with --push-to"),
    ):
        assert cli.run([*more, "--resume", str(run.path)]) == 2
        assert said in capsys.readouterr().err


def test_run_folder_is_beside_the_output() -> None:
    assert run_folder(detox_options(line(model="org/m"))) == Path("m-detoxed.run")
    assert run_folder(DetoxOptions("org/m", output=Path("a/b.c"))) == Path("a/b.c.run")
    assert run_folder(DetoxOptions(resume=Path("a/b.run"))) == Path("a/b.run")


def test_list_names_presets_and_settings(run_cli: Run) -> None:
    text = run_cli(["list", "defenses"]).stdout
    assert text.startswith("without --defense: d3:auto; a name without a preset is its first\n")
    assert "d3:paper is these defaults" in text
    assert "d3:code sets lambda=0.5" in text
    # every method with its paper, what it needs and what it costs
    assert "arXiv 2208.03111" in text
    assert text.count("cost, relative to plain fine-tuning: ") == len(DEFENSES)
    assert "initialization" in text
