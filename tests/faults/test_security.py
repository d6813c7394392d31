"""Nothing that a stranger wrote runs: not while a command works, not from a model, a data set or a card.

Python's own audit events see every unpickling, every process that is started, every piece of code that is executed and
every file that is opened, in whatever library; they are armed when the libraries are imported, which execute code of
their own then.
"""

from __future__ import annotations

import contextlib
import os
import pickle  # noqa: TID251 (what strangers send; it is never read)
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hfdetox.detox
import hfdetox.gating
import hfdetox.implanting
import hfdetox.scanning
import hfdetox.verifying  # noqa: F401 (the forks have them)
from hfdetox.data.load import load_images
from hfdetox.errors import HfdetoxError
from tests import backdoored
from tests.backdoored import Made
from tests.conftest import REPOSITORY
from tests.faults import runs
from tests.hub_server.server import HubServer
from tests.image_data import NAMES, write_dataset, write_tar
from tests.tiny_models import edit_json

_BOMBS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
_OURS = ("<", str(REPOSITORY / "hfdetox"), str(REPOSITORY / "cards"), sys.prefix, sys.base_prefix)
_HERE = (str(REPOSITORY / "hfdetox"), __file__)
_PICKLES = (".bin", ".pkl", ".pt", ".pth")
# what only asks the system what it is
_HARMLESS = ("uname", "ldconfig", "lscpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def armed(log: Path) -> Callable[[], None]:
    """Return what writes down each bomb that goes off in a fork, and stops it."""

    def prepare() -> None:
        def hook(event: str, arguments: tuple[object, ...]) -> None:
            code = arguments[0] if event == "exec" else None
            file = str(getattr(code, "co_filename", "<"))
            strange = event == "exec" and not file.startswith(_OURS) and "site-packages" not in file
            # eval and exec of a text: libraries do it with texts of their own
            strange |= event == "exec" and sys._getframe(1).f_code.co_filename.startswith(_HERE)
            # whatever would load it, torch.load too, opens it first
            strange |= event == "open" and str(arguments[0]).endswith(_PICKLES)
            harmless = any(word in str(arguments) for word in _HARMLESS)
            if strange or (event in _BOMBS and not harmless):
                with log.open("a") as written:
                    written.write(f"{event} {str(arguments)[:300]}\n")
                raise RuntimeError(f"a bomb: {event}")

        sys.addaudithook(hook)

    return prepare


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def malicious(folder: Path, mark: Path) -> None:
    """Put what would run, if anybody let it, beside a model."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", "setup.py", "conftest.py", "model.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "weights.pkl", "model.pt", "training_args.bin", "optimizer.pth"):
        (folder / name).write_bytes(pickle.dumps(Mark(mark)))


def test_the_bombs_go_off(tmp_path: Path) -> None:
    log, mark = tmp_path / "log", tmp_path / "mark"
    malicious(tmp_path, mark)

    def prepare(what: Callable[[], object]) -> Callable[[], None]:
        def armed_then() -> None:
            armed(log)()
            what()

        return armed_then

    content = (tmp_path / "weights.pkl").read_bytes()
    script = compile((tmp_path / "model.py").read_text(), str(tmp_path / "model.py"), "exec")
    several: list[Callable[[], object]] = [
        lambda: pickle.loads(content),  # noqa: S301
        lambda: exec(script),  # noqa: S102
        lambda: eval("1 + 1"),  # noqa: S307
        lambda: torch.load(tmp_path / "model.pt"),  # noqa: TID251
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=False),
    ]
    for what in several:
        log.unlink(missing_ok=True)
        assert "a bomb" in runs.run(["list", "attacks"], prepare(what)).said
        assert log.exists()
    assert not mark.exists()


@pytest.mark.parametrize("command", ["detox", "evaluate", "scan", "attack", "gate", "list"])
def test_no_command_unpickles_starts_a_process_or_runs_what_lies_beside_the_weights(
    command: str, made: Made, hub: HubServer, hub_token: str, repo_name: Callable[..., str], tmp_path: Path
) -> None:
    mark, log, name = tmp_path / "mark", tmp_path / "log", repo_name("armed", "org")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in made.timm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    malicious(folder, mark)
    hub.create_repo(name)
    hub.commit_folder(name, folder)
    images = ["--dataset", str(made.digits), "--device", "cpu", "--eval-samples", "100"]
    words = {
        "detox": [*runs.words(name, made.digits, tmp_path / "out"), "--push-to", repo_name()],
        "evaluate": ["evaluate", str(folder), *images, "--trigger", "badnets", "--gallery", str(tmp_path / "g.png")],
        "scan": ["scan", str(folder), *images, "--samples", "60"],
        "attack": ["attack", name, *images, "--samples", "100", "--trigger", "badnets", "--epochs", "1", "--goal-asr",
                   "0", "--goal-accuracy", "0", "--output", str(tmp_path / "out")],
        "gate": ["gate", name, *images, "--samples", "60", "--sarif", str(tmp_path / "x.sarif")],
        "list": ["list", "defenses"],
    }[command]  # fmt: skip
    ended = runs.run(words, armed(log))
    assert not log.exists(), log.read_text()
    assert ended.status in ((20, 30) if command == "gate" else (0,)), ended.said
    assert not mark.exists()
    if command == "detox":
        pushed = hub.files(words[-1])
        assert not [file for file in pushed if file.endswith((".bin", ".pkl", ".pt", ".pth", ".py"))]
        for more in (["verify", str(tmp_path / "out"), "--dataset", str(made.digits)],
                     ["report", str(tmp_path / "out"), "--html", str(tmp_path / "x.html")],
                     ["push", str(tmp_path / "out"), words[-1]]):  # fmt: skip
            checked = runs.run(more, armed(log))
            assert not log.exists(), log.read_text()
            assert checked.status == 0, checked.said


def test_a_configuration_that_names_code_needs_to_be_trusted(made: Made, tmp_path: Path) -> None:
    mark, log, folder = tmp_path / "mark", tmp_path / "log", tmp_path / "model"
    folder.mkdir()
    for file in made.transformers.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    malicious(folder, mark)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "configuration_x.X", "AutoModelForImageClassification":
                                                "modeling_x.X"})  # fmt: skip
    ended = runs.run(runs.words(folder, made.digits, tmp_path / "out"), armed(log))
    assert ended.status in (0, 2), ended.said
    assert not mark.exists()
    assert not log.exists(), log.read_text()


def zipped(folder: Path) -> Path:
    """Write a zip of a few kilobytes that holds 200 MB."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("cat/bomb.png", b"\0" * 200_000_000)
    return folder


@pytest.mark.parametrize("kind", ["script", "members", "zip"])
def test_nothing_of_a_dataset_runs_or_fills_the_disk(kind: str, tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "set"
    if kind == "script":
        write_dataset(folder)
        code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        for name in ("set.py", "dataset.py", "__init__.py"):
            (folder / name).write_text(code)
    elif kind == "members":
        folder.mkdir()
        content = pickle.dumps(Mark(mark))
        write_tar(folder / "train-000.tar", 30, extra={"pth": content, "pkl": content, "pyd": content})
    else:
        zipped(folder)
    before = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    with contextlib.suppress(HfdetoxError):
        load_images(folder, labels=NAMES, clean_samples=12, warn=lambda _: None)
    assert not mark.exists()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < before + 10_000_000
