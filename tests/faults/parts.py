"""The parts of `make faults`; each case is "" where everything is as promised, else what is not."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from hypothesis import HealthCheck, Phase, given, settings

import hfdetox.detox  # so that the forks have it
from hfdetox.reporting.report import Report
from tests.faults import runs
from tests.faults.__main__ import Figures
from tests.faults.readers import outcome, readers
from tests.faults.requests import forever, hub, together
from tests.hub_server.server import HubServer

INPUTS, KILLS, DISKS, PAIRS = 10_000, 50, 10, 6
__all__ = ["forever", "hfdetox", "hub", "together"]


@dataclass(frozen=True)
class Context:
    """Where figures and files go; `size` is the share of the cases that is tried, `shared` a folder of all parts."""

    figures: Figures
    root: Path
    server: HubServer
    size: float
    shared: Path

    def some(self, count: int) -> int:
        """Return how many of so many cases are tried."""
        return max(1, round(count * self.size))

    def fresh(self) -> Path:
        """Return an empty folder, the same one again and again."""
        place = self.root / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def made(self) -> tuple[Path, Path]:
        """Return the model and the digits, when one run has gone well."""
        with FileLock(self.shared / "made.lock"):
            model, digits = runs.made(self.shared / "made")
        output = self.fresh() / "out"
        runs.warm(runs.words(model, digits, output), output)
        return model, digits


def inputs(context: Context) -> None:
    """Give every reader its share of the malformed inputs."""
    made = readers(context.root / "readers")
    for name, reader in made.items():
        context.figures.case(name, lambda reader=reader: _tried(reader, context.some(INPUTS) // len(made) + 1))


def _tried(reader: Any, count: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    bad: dict[str, str] = {}

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(reader.inputs)
    def trial(content: bytes) -> None:
        found = outcome(reader, content)
        counts[found.kind] += 1
        if not found.good:
            bad.setdefault(f"{found.kind}: {found.text.strip()[-200:]}", repr(content[:1000]))

    trial()
    return {"tried": counts.total(), "value": 0, "refused": 0, **counts, "bad": bad}


def kills(context: Context) -> None:
    """Kill a run before each operation on its files, with and without an earlier result."""
    model, digits = context.made()
    place = context.fresh()
    expected, _ = runs.reference(runs.words(model, digits, place / "out"), place / "out")
    kept, log = context.root / "earlier", context.root / "operations"
    context.fresh()
    runs.reference(runs.words(model, digits, place / "out", "--seed", "1"), place / "out")
    shutil.move(place / "out", kept)
    for what, more in (("", ()), (" over a result", ("--overwrite",))):
        words = runs.words(model, digits, place / "out", *more)

        def begin(what: str = what) -> bytes | None:
            context.fresh()
            if not what:
                return None
            shutil.copytree(kept, place / "out")
            return (kept / "model.safetensors").read_bytes()

        begin()
        log.unlink(missing_ok=True)
        runs.run(words, runs.counting(place, log))
        operations = log.read_text().splitlines()
        # of the second kind only what is done to the earlier result is new
        first = 0 if not what else next(i for i, line in enumerate(operations) if line.startswith("os.rename") and
                                        line.endswith("/out"))  # fmt: skip
        numbers = range(first, len(operations))
        for number in numbers[:: -(-len(numbers) // context.some(len(numbers)))]:

            def at_operation(number: int = number, words: list[str] = words, begin: Any = begin) -> str:
                earlier = begin()
                ended = runs.run(words, runs.killing_at(number, place))
                if ended.status != -signal.SIGKILL:
                    return f"it was not killed: {ended.status}"
                return runs.after_kill(words, place / "out", expected, earlier=earlier)

            context.figures.case(f"{number}{what}", at_operation)


def instants(context: Context) -> None:
    """Kill a run at instants all over it, measured by what it has computed."""
    model, digits = context.made()
    place = context.fresh()
    words = runs.words(model, digits, place / "out")
    expected, whole = runs.reference(words, place / "out")
    for number in range(context.some(KILLS)):

        def at_instant(number: int = number) -> str:
            seconds = whole.cpu * (number + 0.5) / context.some(KILLS)
            context.fresh()
            while runs.run(words, runs.dying_after(seconds)).status != -signal.SIGPROF:
                # it was faster this time
                seconds *= 0.95
                context.fresh()
            return runs.after_kill(words, place / "out", expected)

        context.figures.case(str(number), at_instant)


def disk(context: Context) -> None:
    """Run on file systems of ten sizes that get full; where none may be mounted, writes beyond ten sizes fail."""
    model, digits = context.made()
    place = context.fresh()
    words = runs.words(model, digits, place / "out")
    used = [0]
    with _mounted(place, 2**30) as mounted:
        runs.wait([runs.start(words)], watch=lambda: used.append(shutil.disk_usage(place).used))
        expected = (place / "out" / "model.safetensors").read_bytes()
        sizes = [file.stat().st_size for file in (place / "out").rglob("*") if file.is_file()]
    most = max(used) if mounted else max(sizes)
    for number in range(1, context.some(DISKS) + 1):

        def full(number: int = number) -> str:
            size = int(most * 1.05 * number / context.some(DISKS))
            place = context.fresh()
            with _mounted(place, size) as mounted:
                # not from 0: what a run says goes into a file too
                ended = runs.run(words, runs.smallest_files(2**40 if mounted else max(size, 5000)))
                if not ended.clear:
                    return f"not clear: {ended.status} {ended.said[-300:]}"
                if ended.status and (place / "out").exists():
                    return "a partial result"
                if mounted:
                    subprocess.run(["mount", "-o", f"remount,size={2**30}", place], check=True)
                return runs.after_kill(words, place / "out", expected)

        context.figures.case(f"{number} on {'a full disk' if mounted else 'short files'}", full)


@contextlib.contextmanager
def _mounted(place: Path, size: int) -> Iterator[bool]:
    """Mount a file system of so many bytes while inside; False where that may not be."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", place]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def two(context: Context) -> None:
    """Start two runs of other seeds with one output, at once and a little apart."""
    model, digits = context.made()
    place = context.fresh()
    expected = {}
    for seed in (0, 1):
        expected[seed], whole = runs.reference(runs.words(model, digits, place / "out", "--seed", str(seed)),
                                                 place / "out")  # fmt: skip
        shutil.rmtree(place / "out")
    for number in range(context.some(PAIRS)):

        def pair(number: int = number) -> str:
            context.fresh()
            started = []
            for seed in (0, 1):
                started.append(runs.start(runs.words(model, digits, place / "out", "--seed", str(seed))))
                time.sleep(whole.seconds * number / PAIRS)
            ended = runs.wait(started)
            if sorted(one.status or 0 for one in ended) != [0, 2] or not all(one.clear for one in ended):
                return str([(one.status, one.said[-200:]) for one in ended])
            seed = Report.load(place / "out").environment.seed
            if not runs.whole(place / "out") or (place / "out" / "model.safetensors").read_bytes() != expected[seed]:
                return "the result is mixed"
            return "" if ended[seed].status == 0 and os.listdir(place) == ["out"] else "the wrong one, or leftovers"

        context.figures.case(str(number), pair)


def modes(context: Context) -> None:
    """Run under two umasks: everything has the mode that they ask for."""
    model, digits = context.made()
    for umask in (0o022, 0o077):

        def modes_of(umask: int = umask) -> str:
            place = context.fresh()
            ended = runs.run(runs.words(model, digits, place / "out"), lambda: os.umask(umask))
            paths = [place / "out", *(place / "out").rglob("*")]
            wrong = [f"{path.name} {path.stat().st_mode & 0o777:o}" for path in paths
                     if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask]  # fmt: skip
            return str(wrong or "") if wrong or ended.status == 0 else ended.said[-300:]

        context.figures.case(f"umask {umask:03o}", modes_of)


def rights(context: Context) -> None:
    """Run without the right to read a file, or to write beside the output, as another user than root."""
    model, digits = context.made()
    os.chmod(context.root, 0o755)
    os.environ["HOME"] = str(context.root)
    for name in ("model/config.json", "model/model.safetensors", "model/README.md", "digits/train.parquet", "parent"):

        def refused(name: str = name) -> str:
            place = context.fresh()
            shutil.copytree(model, place / "model")
            shutil.copytree(digits, place / "digits")
            (place / "model" / "README.md").touch()
            (place / "parent").mkdir()
            for path in (place, *place.rglob("*")):
                os.chown(path, runs.NOBODY, runs.NOBODY)
            (place / name).chmod(0o500 if name == "parent" else 0)
            words = runs.words(place / "model", place / "digits", place / "parent" / "out")
            before = sorted(place.rglob("*"))
            ended = runs.run(words, runs.as_nobody)
            left = sorted(place.rglob("*")) != before and name == "parent"
            return "" if ended.clear and ended.status and not left else f"{ended.status} {ended.said[-300:]}"

        context.figures.case(name, refused)
