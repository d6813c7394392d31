"""Runs that stop in the middle, by a kill, by Ctrl-C, by a disk that is full, and how they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from hfdetox.cli import app as cli
from hfdetox.reporting.report import Report
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER, Made
from tests.hub_server.server import HubServer

resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX only")

EPOCHS = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def command(model: Path, digits: Path, output: Path, **settings: object) -> list[str]:
    """Return a short float32 run: 100 images are two steps an epoch."""
    return [str(model), "--dataset", str(digits), "--samples", "100", "--eval-samples", "100", "--trigger", TRIGGER,
            "--target", TARGET, "--precision", "no",
            *backdoored.settings(**{"epochs": EPOCHS, "batch_size": 50, **settings}),
            "--output", str(output)]  # fmt: skip


def error_line(text: str) -> str:
    """Return the one line that is left on standard error when progress bars have erased themselves."""
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    lines = [line for line in lines if line.startswith("hfdetox") or "Traceback" in line]
    assert len(lines) == 1, text
    return lines[0]


def start(arguments: list[str], environment: dict[str, str], folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hfdetox", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=folder,
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


def assert_like_an_uninterrupted_run(resumed: Path, arguments: list[str], scratch: Path) -> None:
    """Run the whole at once and compare: weights bit for bit, every number but the times."""
    assert cli.run([*arguments[:-1], str(scratch / "whole")]) == 0
    assert weights(resumed) == weights(scratch / "whole")
    reports = Report.load(resumed), Report.load(scratch / "whole")
    assert reports[0].before == reports[1].before
    assert reports[0].after == reports[1].after
    commands = [report.environment.command for report in reports]
    assert commands[0].replace(f"./{resumed.name}", "./whole") == commands[1]
    # the folder is the absolute one in a run that was resumed in another directory
    assert replace(reports[0].dataset, id="") == replace(reports[1].dataset, id="")
    assert Path(reports[0].dataset.id).resolve() == Path(reports[1].dataset.id).resolve()
    timeless = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in r.history] for r in reports]
    assert timeless[0] == timeless[1]
    assert sum("learning_rate" in entry for entry in timeless[0]) == reports[0].defense.epochs == EPOCHS


def test_a_resumed_run_computes_with_as_many_threads(
    made: Made, fresh_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(command(made.timm, made.digits, tmp_path / "out"), fresh_env)
    run, before = tmp_path / "out.run", torch.get_num_threads()
    wait_for_epoch(process, run, 1)
    process.kill()
    process.communicate()
    recorded = json.loads((run / "run.json").read_text())
    # the tests' environment says one
    assert recorded["threads"] == 1
    (run / "run.json").write_text(json.dumps({**recorded, "threads": 3}))
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        assert cli.run(["--resume", str(run)]) == 0
    finally:
        torch.set_num_threads(before)
    assert Report.load(tmp_path / "out").environment.threads == 3


def test_a_killed_run_resumes_to_the_very_same_weights(
    made: Made, fresh_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # everything is named as seen from one folder, and the run is resumed in another
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    (place / "model").symlink_to(made.timm)
    (place / "digits").symlink_to(made.digits)
    Image.new("RGB", (3, 3), "white").save(place / "patch.png")
    run, arguments = place / "out.run", command(Path("model"), Path("digits"), Path("out"))
    arguments[arguments.index(TRIGGER)] += ",image=patch.png"
    process = start(arguments, fresh_env, place)
    wait_for_epoch(process, run, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= checkpointed(run) < EPOCHS
    given = ["digits", "model", "patch.png"]
    assert sorted(os.listdir(place)) == sorted([*given, "out.run"])

    monkeypatch.chdir(elsewhere)
    assert cli.run(["--resume", str(run)]) == 0
    assert sorted(os.listdir(place)) == sorted([*given, "out"])
    assert os.listdir(elsewhere) == []
    monkeypatch.chdir(place)
    assert f"--trigger {TRIGGER},image=patch.png" in Report.load(place / "out").environment.command
    assert_like_an_uninterrupted_run(place / "out", arguments, tmp_path)
    assert capsys.readouterr().out.count("mitigated") >= 1


def test_ctrl_c_says_how_to_resume_and_the_resumed_run_is_still_pushed(
    made: Made, hub: HubServer, hub_token: str, repo_name: Callable[..., str], fresh_env: dict[str, str],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, pushed = tmp_path / "out.run", repo_name()
    arguments = command(made.transformers, made.digits, tmp_path / "out")
    publishing = ["--push-to", pushed]
    process = start([*publishing, *arguments], {**fresh_env, "HF_TOKEN": hub_token})
    wait_for_epoch(process, run, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert error_line(err) == f"hfdetox: interrupted; resume with: hfdetox --resume {run}"
    assert out == ""
    assert checkpointed(run) >= 2
    assert not (tmp_path / "out").exists()
    assert hub_token not in "".join(path.read_text() for path in run.rglob("*.json"))

    # the same command again would forget what was done
    for more in ([], ["--dry-run"]):
        assert cli.run([*arguments, *more]) == 2
        assert f"go on with hfdetox --resume {run}" in error_line(capsys.readouterr().err)
    assert not hub.exists(pushed)
    assert cli.run([str(made.transformers), "--resume", str(run), "--keep-run", "--private"]) == 0
    assert checkpointed(run) == EPOCHS
    assert hub.repo(pushed).private
    assert hub.files(pushed)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert_like_an_uninterrupted_run(tmp_path / "out", arguments, tmp_path)


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_a_push_that_fails_leaves_the_result_and_says_how_to_push_it(
    how: str, made: Made, hub: HubServer, hub_token: str, repo_name: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, pushed = tmp_path / "out", repo_name()
    if how == "refused":
        hub.faults.answer("POST", "/commit/", 403)
    else:
        hub.faults.before("POST", "/commit/", lambda: os.kill(os.getpid(), signal.SIGINT))
        hub.faults.answer("POST", "/commit/", 403)
    # a name alone is the user's own
    name = pushed.removeprefix("me/")
    arguments = ["--push-to", name, *command(made.transformers, made.digits, output, epochs=2)]
    assert cli.run(arguments) == (3 if how == "refused" else 130)
    # a folder's pictures are not pushed, which is said before
    kept, line = (text for text in capsys.readouterr().err.splitlines() if text.startswith("hfdetox: "))
    assert kept.startswith("hfdetox: warning: pictures of images stay here")
    assert hub_token not in line
    if how == "refused":
        assert line.endswith(f"the folder is whole, push it with `hfdetox push {output} {pushed}`")
    else:
        assert line.endswith(f"the result in {output} is whole; publish it with: hfdetox push {output} REPO")
    assert os.listdir(tmp_path) == ["out"]
    assert Report.load(output).output.pushed_to == pushed
    assert f'model="{pushed}"' in (output / "README.md").read_text()
    hub.faults.clear()
    assert cli.run(["push", str(output), pushed]) == 0
    assert f"published: {hub.url}/{pushed} (commit {hub.head(pushed)})" in capsys.readouterr().out


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
    # the model is saved once before the training; a checkpoint holds the optimizer's state too
    with largest_file((made.transformers / "model.safetensors").stat().st_size + 50_000):
        assert cli.run(command(made.transformers, made.digits, tmp_path / "out", epochs=2)) == 1
    line = error_line(capsys.readouterr().err)
    assert line.startswith(f"hfdetox: error: cannot write the checkpoint in {run}: ")
    assert line.endswith(f"free some space, then: hfdetox --resume {run}")
    assert not (tmp_path / "out").exists()
    assert cli.run(["--resume", str(run)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_full_for_the_model_is_found_out_before_the_training(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a licence goes with the model: the one file too large
    model, limit = tmp_path / "model", 3_000_000
    shutil.copytree(made.transformers, model)
    (model / "LICENSE").write_text("A line of the author's.\n" * 200_000)
    with largest_file(limit):
        assert cli.run(command(model, made.digits, tmp_path / "out", epochs=2)) == 1
    line = error_line(capsys.readouterr().err)
    assert line.startswith(f"hfdetox: error: cannot write the model to {tmp_path}")
    assert "File too large" in line
    assert line.endswith("free some space or choose another --output")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


def test_a_run_is_not_resumed_with_a_model_or_images_that_changed(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, digits, run = tmp_path / "model", tmp_path / "digits", tmp_path / "out.run"
    shutil.copytree(made.transformers, model)
    shutil.copytree(made.digits, digits)
    with largest_file((model / "model.safetensors").stat().st_size + 50_000):
        assert cli.run(command(model, digits, tmp_path / "out", epochs=2)) == 1
    began = json.loads((run / "fingerprint.json").read_text())
    for name in began:
        (run / "fingerprint.json").write_text(json.dumps({**began, name: "other"}))
        capsys.readouterr()
        assert cli.run(["--resume", str(run)]) == 2
        assert f"began with other inputs: {name} (other, now {began[name]}) changed" in error_line(
            capsys.readouterr().err
        )
    (run / "fingerprint.json").write_text(json.dumps(began))
    weights_file = model / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    assert cli.run(["--resume", str(run)]) == 2
    assert "model weights (" in error_line(capsys.readouterr().err)
    content[-1] ^= 1
    weights_file.write_bytes(content)
    # the same weights and images, and yet another training
    config, processor = model / "config.json", model / "preprocessor_config.json"
    for file, key, value, name in (
        (config, "id2label", lambda old: {**old, "0": old["1"], "1": old["0"]}, "labels"),
        (processor, "image_mean", lambda old: [0.9] * len(old), "preprocessing"),
    ):
        text = file.read_text()
        plain = json.loads(text)
        file.write_text(json.dumps({**plain, key: value(plain[key])}))
        assert cli.run(["--resume", str(run)]) == 2
        assert f"began with other inputs: {name} (" in error_line(capsys.readouterr().err)
        file.write_text(text)
