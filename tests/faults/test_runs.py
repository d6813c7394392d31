"""Kills, leftovers and interruptions: what `make faults` tries many of, a few."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.config import DetoxOptions
from hfdetox.data.files import DatasetError, LocalFiles
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.runs.folder import RESULT_FILE, RUN_FILE, RunFolder, fresh_name, settle
from hfdetox.runs.manifest import foreign_files, remove_own, write_manifest
from hfdetox.triggers import parse_trigger
from tests import backdoored
from tests.backdoored import Made
from tests.faults import runs
from tests.tiny_models import timm_folder

PLAIN = DetoxOptions("org/model", dataset="org/data")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@pytest.fixture(scope="module")
def unharmed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    """The weights of a run that nothing happens to, and its operations on files."""
    place = tmp_path_factory.mktemp("unharmed")
    ended = runs.run(runs.words(made.timm, made.digits, place / "out"), runs.counting(place, place.parent / "log"))
    assert ended.status == 0, ended.said
    operations = (place.parent / "log").read_text().replace(str(place), "").splitlines()
    return (place / "out" / "model.safetensors").read_bytes(), operations


@pytest.mark.parametrize("before", ["run is recorded", "result is moved", "run folder goes", "checkpoint goes"])
def test_a_run_that_is_killed_goes_on_to_equal_weights_and_leaves_nothing(
    before: str, made: Made, unharmed: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    expected, operations = unharmed
    moved = next(n for n, line in enumerate(operations) if line.startswith("os.rename /.out.hfdetox-")
                 and line.count("/") == 1)  # fmt: skip
    goes = operations.index(f"os.remove /out.run/{RUN_FILE}")
    number = {"run is recorded": operations.index("os.mkdir /out.run/checkpoint.new") - 2, "result is moved": moved,
              "run folder goes": goes, "checkpoint goes": goes + 1}[before]  # fmt: skip
    words = runs.words(made.timm, made.digits, tmp_path / "out")
    assert runs.run(words, runs.killing_at(number, tmp_path)).status == -signal.SIGKILL
    assert runs.after_kill(words, tmp_path / "out", expected) == ""


@pytest.mark.parametrize("left", [
    ["triggers/badnets.safetensors"], ["fingerprint.json"], [".0123456789abcdef.new"], ["checkpoint/record.json"],
    ["checkpoint.old/record.json", "triggers/.0123456789abcdef.new", RESULT_FILE],
])  # fmt: skip
def test_what_is_left_of_a_run_that_was_never_recorded_is_in_nobodys_way(left: list[str], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out.run")
    for name in left:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("{")
    run.refuse_existing()
    run.begin(PLAIN, [], {"model weights": "x"})
    assert sorted(os.listdir(run.path)) == ["fingerprint.json", RUN_FILE]
    with pytest.raises(UsageError, match="holds a run that did not finish"):
        run.refuse_existing()
    # a run that goes on keeps its checkpoint
    (run.path / "checkpoint").mkdir()
    run.begin(PLAIN, [])
    assert (run.path / "checkpoint").is_dir()
    (run.path / "0123456789abcdef.new").touch()
    run.remove()
    assert os.listdir(run.path) == ["0123456789abcdef.new"]
    with pytest.raises(UsageError, match="holds a run that did not finish"):
        run.refuse_existing()


@pytest.mark.parametrize("name", ["triggers/mine.txt", "checkpoint/notes/x.md", "triggers/mine/LICENSE", "mine.json"])
def test_what_no_run_writes_is_never_removed(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out.run")
    (run.path / name).parent.mkdir(parents=True)
    (run.path / name).write_text("mine")
    with pytest.raises(UsageError, match="holds a run that did not finish"):
        run.refuse_existing()
    assert (run.path / name).read_text() == "mine"


def test_an_unfinished_folder_goes_and_an_earlier_result_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name in (".out.old", f"{fresh_name(output)}12ab", ".out.hfdetoxed", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    (tmp_path / f"{fresh_name(output)}link").symlink_to(tmp_path / "other")
    settle(output)
    assert sorted(os.listdir(tmp_path)) == [".out.hfdetox-link", ".out.hfdetoxed", "other", "out"]
    assert os.listdir(output) == ["kept"] == os.listdir(tmp_path / "other")
    (tmp_path / ".out.old").mkdir()
    settle(output)
    assert os.listdir(output) == ["kept"]


def test_a_file_that_was_being_written_is_hfdetoxs_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    write_manifest(tmp_path)
    (tmp_path / ".0123456789abcdef.new").touch()
    assert foreign_files(tmp_path) == []
    remove_own(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE"]
)
def test_a_pipe_in_a_models_folder_is_refused_and_a_folder_of_licences_is_not(name: str, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "MIT.txt").touch()
    (folder / "NOTICE").symlink_to("nowhere")
    load_classifier(folder).save(tmp_path / "saved")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match=f"{name} is no plain file"):
        load_classifier(folder)


def test_a_pipe_in_a_datasets_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"train\.parquet is no plain file"):
        LocalFiles(tmp_path).open(str(tmp_path / "train.parquet"))


@pytest.mark.parametrize("picture", ["a\0b", "x" * 5000, ".", "nowhere.png"])
def test_a_picture_that_no_file_can_be_is_one_line(picture: str) -> None:
    with pytest.raises(UsageError, match=r"trigger picture .* cannot be read"):
        parse_trigger(f"blended:image={picture}")


@pytest.mark.parametrize("words", [
    [""], [" "], ["--resume", ""], ["org/x", "--output", ""], ["org/x", "--output="], ["push", "", "me/x"],
    ["org/x", "--dataset", ""], ["verify", ""], ["scan", ""], ["attack", "--suite", ""], ["bench", ""], ["gate", "  "],
])  # fmt: skip
def test_an_empty_argument_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    line = capsys.readouterr().err
    assert "is empty (a variable of the shell that is not set?)" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("options", [{"output": ""}, {"dataset": " "}, {"label_map": ""}])
def test_an_empty_option_of_python_is_one_line(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is empty: give it a value"):
        DetoxOptions("org/model", **options)


@pytest.mark.parametrize("seconds", [0.25, 0.6, 1.2, 2.0])
def test_ctrl_c_is_130_and_one_line_while_the_libraries_load(
    seconds: float, made: Made, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    words = runs.words(made.timm, made.digits, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-m", "hfdetox", *words], env=fresh_env, cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (130, ""), err
    lines = [line for line in err.split("\n") if "hfdetox: " in line]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert "hfdetox: interrupted; " in lines[0]


def test_ctrl_c_in_a_constructor_says_nothing_of_the_half_made_object(fresh_env: dict[str, str]) -> None:
    # as tqdm's bars fail, whose __del__ wants what __init__ had not set
    script = """
import signal
from hfdetox import __main__ as started

class Half:
    def __init__(self):
        signal.raise_signal(signal.SIGINT)
        self.disable = True

    def __del__(self):
        self.disable

signal.signal(signal.SIGINT, started._interrupt)
try:
    Half()
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], env=fresh_env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_two_runs_with_one_output_are_never_mixed(made: Made, tmp_path: Path) -> None:
    started = [runs.start(runs.words(made.timm, made.digits, tmp_path / "out", "--seed", str(seed))) for seed in (0, 1)]
    ended = runs.wait(started)
    assert sorted(one.status or 0 for one in ended) == [0, 2], ended
    loser = next(one for one in ended if one.status)
    assert "is in use by process" in loser.said or "holds" in loser.said
    assert runs.whole(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.skipif(os.name == "nt", reason="rights are POSIX's")
def test_a_file_that_may_not_be_read_is_one_line(name: str, made: Made, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(made.timm, model)
    (model / "README.md").touch()
    (model / name).chmod(0)

    # others may pass through, for root's rights are given up
    for path in (tmp_path, *tmp_path.parents[: len(tmp_path.parts) - len(Path(tempfile.gettempdir()).parts) - 1]):
        path.chmod(path.stat().st_mode | 0o011)
    ended = runs.run(runs.words(model, made.digits, tmp_path / "out"), runs.as_nobody)
    assert ended.clear, ended
    assert ended.status in (1, 2)
    assert not (tmp_path / "out").exists()
