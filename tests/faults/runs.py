"""Runs of the command in processes that are killed, limited or refused, forked from one that has the libraries.

Nothing of a library is replaced: a kill at an operation on a file comes from Python's audit events.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfdetox.cli import app as cli
from hfdetox.files import MANIFEST, sha256_file
from hfdetox.reporting.report import Report
from hfdetox.runs.manifest import changed_files
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER

SECONDS = 300.0  # beyond them a run hangs
# operations on files that change what is there, as Python's audit events call them
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir")
NOBODY = 65534


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, negative for a signal, None for one that hung; what it said; seconds."""

    status: int | None
    said: str
    seconds: float
    cpu: float = 0.0

    @property
    def clear(self) -> bool:
        """Whether it ended well, or with one line of its own."""
        lines = [line for line in self.said.splitlines() if line.startswith("hfdetox: ") and ": warning: " not in line]
        return self.status == 0 or (
            self.status in (1, 2, 3, 130) and len(lines) == 1 and "not foreseen" not in lines[0]
        )


def made(root: Path) -> tuple[Path, Path]:
    """Return the folders of a small backdoored model and of the digits, made in `root` when they are not there."""
    model, digits = root / "model", root / "digits"
    if not (root / "done").exists():
        shutil.rmtree(root, ignore_errors=True)
        backdoored.write_digits(digits)
        backdoored._backdoor(backdoored._timm_classifier(), digits).save(model)
        (root / "done").touch()
    return model, digits


def words(model: Path | str, digits: Path | str, output: Path, *more: str) -> list[str]:
    """Return a short run: 100 images, four epochs of two steps."""
    return [str(model), "--dataset", str(digits), "--samples", "100", "--eval-samples", "100", "--trigger", TRIGGER,
            "--target", TARGET, "--precision", "no", "--device", "cpu", "--no-scan",
            *backdoored.settings(epochs=4, batch_size=50), "--output", str(output), *more]  # fmt: skip


def run(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None, *, seconds: float = SECONDS) -> Ended:
    """Run one command in a fork and return how it ended; `prepare` is called in the fork first."""
    return wait([start(arguments, prepare)], seconds=seconds)[0]


@dataclass(frozen=True)
class Started:
    """A fork: its process, the file with what it says, and when it began."""

    process: int
    said: Path
    began: float


def start(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> Started:
    """Fork a process that runs one command."""
    handle, name = tempfile.mkstemp(prefix="said-")
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        status = 99
        try:
            os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # pytest's own, if there are any
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            status = cli.run(list(arguments))
        except BaseException as error:  # noqa: BLE001 (what Python would say, on one line)
            sys.stderr.write(f"TRACEBACK {type(error).__name__}: {error}\n")
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)
    os.close(handle)
    return Started(process, Path(name), began)


def wait(started: Sequence[Started], *, seconds: float = SECONDS, watch: Callable[[], object] = lambda: None,
         ) -> list[Ended]:  # fmt: skip
    """Wait for forks, call `watch` meanwhile, end those that take too long, and return how each ended."""
    left, found = list(started), dict[int, tuple[int | None, float, float]]()
    while left:
        for one in list(left):
            now = time.monotonic() - one.began
            late = now > seconds
            if late:
                os.kill(one.process, signal.SIGKILL)
            process, status, used = os.wait4(one.process, 0 if late else os.WNOHANG)
            if process:
                code = None if late else os.waitstatus_to_exitcode(status)
                found[one.process] = (code, now, used.ru_utime + used.ru_stime)
                left.remove(one)
        watch()
        time.sleep(0.002)
    ended = []
    for one in started:
        status, took, cpu = found[one.process]
        ended.append(Ended(status, one.said.read_text(errors="replace")[-3000:], took, cpu))
        one.said.unlink()
    return ended


def dying_after(seconds: float) -> Callable[[], None]:
    """Return what ends a fork by a signal, at once and wherever it is, when it has computed for so long."""

    def prepare() -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)

    return prepare


def _changes(event: str, arguments: tuple[object, ...], inside: Path) -> bool:
    """Return whether an audit event is one that will change something in a folder."""
    if event not in _EVENTS or not str(arguments[0]).startswith(str(inside)):
        return False
    return os.path.lexists(str(arguments[0])) != (event == "os.mkdir")


def killing_at(operation: int, inside: Path) -> Callable[[], None]:
    """Return what kills a fork right before its n-th operation (from 0) on files in a folder."""

    def prepare() -> None:
        left, own = [operation], os.getpid()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if os.getpid() == own and _changes(event, arguments, inside):
                if not left[0]:
                    os.kill(own, signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(hook)

    return prepare


def counting(inside: Path, log: Path) -> Callable[[], None]:
    """Return what writes down each operation on files in a folder."""

    def prepare() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if _changes(event, arguments, inside):
                os.write(handle, f"{event} {arguments[0]}\n".encode())

        sys.addaudithook(hook)

    return prepare


def whole(output: Path) -> bool:
    """Return whether an output has all of its files as they were written, and the weights that its report names."""
    if not (output / MANIFEST).is_file() or changed_files(output):
        return False
    return Report.load(output).output.weights_sha256 == sha256_file(output / "model.safetensors")


def go_on(arguments: Sequence[str], output: Path) -> Ended:
    """Go on after a kill as a person would: resume what can be resumed, else give the same command again."""
    folder = output.with_name(f"{output.name}.run")
    if (folder / "run.json").exists():
        return run(["--resume", str(folder)])
    if whole(output) and "--overwrite" not in arguments:
        return Ended(0, "", 0.0)
    return run(arguments)


def after_kill(arguments: Sequence[str], output: Path, expected: bytes, *, earlier: bytes | None = None) -> str:
    """Return what is wrong after a kill, and after going on; "" if nothing is.

    Args:
        expected: the weights of a run that nobody killed.
        earlier: those of the result that is replaced, if there is one.
    """
    weights = output / "model.safetensors"
    if output.exists() and not (whole(output) and weights.read_bytes() in (expected, earlier)):
        return "a result that is not whole"
    ended = go_on(arguments, output)
    if ended.status != 0:
        return f"cannot go on: {ended.status} {ended.said[-300:]}"
    if not whole(output) or weights.read_bytes() != expected:
        return "other weights than a run that was not killed"
    folder = output.with_name(f"{output.name}.run")
    if folder.exists() and not (folder / "run.json").exists():
        # a kill in the last instants leaves this much, which the next command with this output removes
        run([word for word in arguments if word != "--overwrite"])
    left = sorted(set(os.listdir(output.parent)) - {output.name})
    return f"left behind: {left}" if left else ""


def smallest_files(size: int) -> Callable[[], None]:
    """Return what makes every write beyond `size` bytes of a file fail, as a full disk does."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def as_nobody() -> None:
    """Give up root's right to read and write everything, for good."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def reference(arguments: Sequence[str], output: Path) -> tuple[bytes, Ended]:
    """Return the weights of a run that nothing happens to, and how it ended."""
    ended = run(arguments)
    if ended.status != 0:
        raise RuntimeError(f"the run itself fails: {ended.said}")
    content = (output / "model.safetensors").read_bytes()
    json.loads((output / MANIFEST).read_text())
    return content, ended


def warm(arguments: Sequence[str], output: Path) -> None:
    """Run a command in this process, whose forks then have what it imports, and remove the output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.run(list(arguments))
    shutil.rmtree(output, ignore_errors=True)
    # a collection in a fork goes through its own objects only
    gc.collect()
    gc.freeze()
