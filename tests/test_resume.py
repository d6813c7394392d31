"""Runs that stop in the middle, by a kill, by Ctrl-C, by a disk that is full, and how they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from hfdetox import cli
from hfdetox.report import Report
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER, Made

resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX only")

EPOCHS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def command(model: Path, digits: Path, output: Path, **settings: object) -> list[str]:
    """Return a short float32 run: 100 images are two steps an epoch."""
    return [str(model), "--dataset", str(digits), "--samples", "100", "--eval-samples", "100", "--trigger", TRIGGER,
            "--target", TARGET, "--precision", "no", "--output", str(output),
            *backdoored.settings(**{"epochs": EPOCHS, "batch_size": 50, **settings})]  # fmt: skip


def error_line(text: str) -> str:
    """Return the one line that is left on standard error when progress bars have erased themselves."""
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    lines = [line for line in lines if line.startswith("hfdetox") or "Traceback" in line]
    assert len(lines) == 1, text
    return lines[0]


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hfdetox", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_for_epoch(process: subprocess.Popen[str], run: Path, epoch: int) -> None:
    """Return when the run's checkpoint is of this epoch or a later one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if checkpointed(run) >= epoch:
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no checkpoint of epoch {epoch} in {run}: {process.communicate()}")


def checkpointed(run: Path) -> int:
    """Return the epoch of the run's checkpoint, 0 without one."""
    try:
        return int(json.loads((run / "checkpoint" / "record.json").read_text())["epoch"])
    except FileNotFoundError:
        return 0


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_killed_run_resumes_to_the_very_same_weights(
    library: str, made: Made, fresh_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = getattr(made, library), tmp_path / "out.run"
    process = start(command(model, made.digits, tmp_path / "out"), fresh_env)
    wait_for_epoch(process, run, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= checkpointed(run) < EPOCHS
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("hf_home")] == ["out.run"]

    assert cli.run(["--resume", str(run)]) == 0
    assert not run.exists()
    assert cli.run(command(model, made.digits, tmp_path / "whole")) == 0
    capsys.readouterr()
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    resumed, whole = Report.load(tmp_path / "out"), Report.load(tmp_path / "whole")
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert resumed.dataset == whole.dataset
    timeless = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in r.history] for r in (resumed, whole)]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == resumed.defense.epochs == EPOCHS


def test_ctrl_c_says_how_to_resume(
    made: Made, fresh_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out.run"
    process = start(command(made.transformers, made.digits, tmp_path / "out"), fresh_env)
    wait_for_epoch(process, run, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert error_line(err) == f"hfdetox: interrupted; resume with: hfdetox --resume {run}"
    assert out == ""
    assert checkpointed(run) >= 2
    assert not (tmp_path / "out").exists()

    # the same command again would forget what was done
    assert cli.run(command(made.transformers, made.digits, tmp_path / "out")) == 2
    assert f"go on with hfdetox --resume {run}" in error_line(capsys.readouterr().err)
    assert cli.run(["--resume", str(run), "--keep-run"]) == 0
    assert Report.load(tmp_path / "out").defense.epochs == EPOCHS
    assert checkpointed(run) == EPOCHS


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make every write beyond `size` bytes of a file fail with an OSError, as a full disk does (root's too)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "out.run"
    with largest_file(100_000):
        assert cli.run(command(made.transformers, made.digits, tmp_path / "out", epochs=2)) == 1
    line = error_line(capsys.readouterr().err)
    assert line.startswith(f"hfdetox: error: cannot write the checkpoint in {run}: ")
    assert line.endswith(f"free some space, then go on with: hfdetox --resume {run}")
    assert not (tmp_path / "out").exists()
    assert cli.run(["--resume", str(run)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_while_saving_costs_nothing_but_the_space(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the source card is kept below the new one, which makes that the one file too large
    model, run, limit = tmp_path / "model", tmp_path / "out.run", 3_000_000
    shutil.copytree(made.transformers, model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Long\n" + "A line of the author's.\n" * 200_000)
    with largest_file(limit):
        assert cli.run(command(model, made.digits, tmp_path / "out", epochs=2)) == 1
    line = error_line(capsys.readouterr().err)
    assert line.startswith(f"hfdetox: error: cannot write {tmp_path / 'out'}: File too large")
    assert line.endswith(f"go on with: hfdetox --resume {run}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.run"]
    assert checkpointed(run) == 2
    before = (run / "checkpoint" / "tensors.safetensors").read_bytes()
    assert limit > len(before)
    assert cli.run(["--resume", str(run)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert (tmp_path / "out" / "README.md").stat().st_size > limit
    assert Report.load(tmp_path / "out").defense.epochs == 2


def test_an_output_folder_with_something_else_is_left_alone(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert cli.run([*command(made.timm, made.digits, output), *more]) == 2
        assert f"{output} exists and was not written by hfdetox" in error_line(capsys.readouterr().err)
    assert (output / "thesis.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_run_folder_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.run").mkdir()
    assert cli.run(["--resume", str(tmp_path / "out.run")]) == 2
    assert "is not a run folder of this hfdetox" in error_line(capsys.readouterr().err)
