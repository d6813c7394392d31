"""The parts of `make faults`; each case is "" where everything is as promised, else what is not."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, settings

import hfdetox.detox  # so that the forks have it
from hfdetox.reporting.report import Report
from tests.faults import runs
from tests.faults.__main__ import Figures
from tests.faults.readers import outcome, readers
from tests.hub_server.server import HubServer

INPUTS, KILLS, DISKS, PAIRS = 10_000, 50, 10, 6
FAULTS = ("503", "429", "cut", "half a body", "a wrong byte")
__all__ = ["hfdetox"]


@dataclass(frozen=True)
class Context:
    """Where figures and files go; `size` is the share of the cases that is tried."""

    figures: Figures
    root: Path
    server: HubServer
    size: float

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
        """Return the model and the digits."""
        return runs.made(self.root / "made")


def inputs(context: Context) -> None:
    """Give every reader its share of the malformed inputs."""
    made = readers(context.root / "readers")
    for name, reader in made.items():
        context.figures.case(
            "inputs", name, lambda reader=reader: _tried(reader, context.some(INPUTS) // len(made) + 1)
        )


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
    """Kill a run at instants all over it and before each operation on its files, with and without an earlier result."""
    model, digits = context.made()
    place = context.fresh()
    expected, seconds = runs.reference(runs.words(model, digits, place / "out"), place / "out")
    earlier_words = runs.words(model, digits, place / "out", "--seed", "1")
    log = context.root / "operations"
    for what, more in (("", ()), (" over a result", ("--overwrite",))):
        words = runs.words(model, digits, place / "out", *more)

        def begin(what: str = what) -> bytes | None:
            context.fresh()
            if not what:
                return None
            kept = context.root / "earlier"
            if not kept.exists():
                runs.reference(earlier_words, place / "out")
                shutil.move(place / "out", kept)
            shutil.copytree(kept, place / "out")
            return (kept / "model.safetensors").read_bytes()

        begin()
        log.unlink(missing_ok=True)
        runs.run(words, runs.counting(place, log))
        operations = log.read_text().splitlines()
        # of the second kind only what is done to the earlier result is new
        first = 0 if not what else next(i for i, line in enumerate(operations) if line.startswith("os.rename") and
                                        line.endswith("/out"))  # fmt: skip
        for number in range(first, len(operations)):

            def at_operation(number: int = number, words: list[str] = words, begin: Any = begin) -> str:
                earlier = begin()
                ended = runs.run(words, runs.killing_at(number, place))
                if ended.status != -9:
                    return f"it was not killed: {ended.status}"
                return runs.after_kill(words, place / "out", expected, earlier=earlier)

            context.figures.case("kills before an operation", f"{number}{what}", at_operation)
    words = runs.words(model, digits, place / "out")
    for number in range(context.some(KILLS)):

        def at_instant(number: int = number) -> str:
            context.fresh()
            runs.run(words, kill_after=seconds * (number + 0.5) / context.some(KILLS))
            return runs.after_kill(words, place / "out", expected)

        context.figures.case("kills at an instant", str(number), at_instant)


def disk(context: Context) -> None:
    """Let writes beyond ten sizes of a file fail."""
    model, digits = context.made()
    place = context.fresh()
    words = runs.words(model, digits, place / "out")
    expected, _ = runs.reference(words, place / "out")
    most = max(file.stat().st_size for file in (place / "out").rglob("*") if file.is_file())
    # not from 0: what a run says goes into a file too
    for number in range(1, context.some(DISKS) + 1):

        def full(number: int = number) -> str:
            context.fresh()
            ended = runs.run(words, runs.smallest_files(int(most * 1.2 * number / context.some(DISKS))))
            if not ended.clear:
                return f"not clear: {ended.status} {ended.said[-300:]}"
            if ended.status and (place / "out").exists():
                return "a partial result"
            return runs.after_kill(words, place / "out", expected)

        context.figures.case("full disks", str(number), full)


def two(context: Context) -> None:
    """Start two runs of other seeds with one output, at once and a little apart."""
    model, digits = context.made()
    place = context.fresh()
    expected = {}
    for seed in (0, 1):
        expected[seed], seconds = runs.reference(runs.words(model, digits, place / "out", "--seed", str(seed)),
                                                 place / "out")  # fmt: skip
        shutil.rmtree(place / "out")
    for number in range(context.some(PAIRS)):

        def pair(number: int = number) -> str:
            context.fresh()
            started = []
            for seed in (0, 1):
                started.append(runs.start(runs.words(model, digits, place / "out", "--seed", str(seed))))
                time.sleep(seconds * number / PAIRS)
            ended = runs.wait(started)
            if sorted(one.status or 0 for one in ended) != [0, 2] or not all(one.clear for one in ended):
                return str([(one.status, one.said[-200:]) for one in ended])
            seed = Report.load(place / "out").environment.seed
            if not runs.whole(place / "out") or (place / "out" / "model.safetensors").read_bytes() != expected[seed]:
                return "the result is mixed"
            return "" if ended[seed].status == 0 and os.listdir(place) == ["out"] else "the wrong one, or leftovers"

        context.figures.case("two runs at once", str(number), pair)


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

        context.figures.case("modes", f"umask {umask:03o}", modes_of)


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

        context.figures.case("rights", name, refused)


def hub(context: Context) -> None:
    """Let each kind of request fail once in each way: the run recovers, or says clearly what it could not do."""
    _faults(context, "hub, once", FAULTS)


def forever(context: Context) -> None:
    """Let each kind of request fail for ever: the run ends, within its time, with one line."""
    _faults(context, "hub, for ever", ("503 for ever",))


def _faults(context: Context, part: str, faults: tuple[str, ...]) -> None:
    server, (model, digits) = context.server, context.made()
    for name, folder, kind in (("org/digits-net", model, "model"), ("org/digits", digits, "dataset")):
        if not server.exists(name, kind):
            server.create_repo(name, kind)
            server.commit_folder(name, folder, repo_type=kind)
    os.environ["HF_TOKEN"] = server.token
    place = context.fresh()
    words = runs.words("org/digits-net", "org/digits", place / "out")
    words[words.index("epochs=4")] = "epochs=1"
    expected, _ = runs.reference(words, place / "out")
    kinds: dict[str, tuple[str, str]] = {}
    flows: dict[str, Callable[[str], list[str]]] = {
        "run": lambda repo: [*words, "--push-to", repo],
        "pull request": lambda repo: ["push", str(context.root / "kept"), repo, "--create-pr"],
    }
    shutil.copytree(place / "out", context.root / "kept", dirs_exist_ok=True)
    for flow, command in flows.items():
        server.reset()
        _target(server, flow, "me/first")
        context.fresh()
        runs.run(command("me/first"), _empty_cache)
        for entry in list(server.log):
            pattern = _pattern(entry.path)
            kinds.setdefault(f"{entry.method} {pattern}", (flow, pattern))
    for number, (kind, (flow, pattern)) in enumerate(sorted(kinds.items())[: context.some(len(kinds))]):
        method = kind.partition(" ")[0]
        for fault in faults if method == "GET" else [name for name in faults if name not in FAULTS[3:]]:

            def trial(number: int = number, method: str = method, pattern: str = pattern, fault: str = fault,
                      flow: str = flow) -> str:  # fmt: skip
                repo = f"me/{part[-4:].strip()}-{number}-{FAULTS.index(fault) if fault in FAULTS else 9}"
                server.reset()
                _target(server, flow, repo)
                _add(server, method, pattern, fault)
                context.fresh()
                ended = runs.run(flows[flow](repo), _empty_cache, seconds=400)
                server.faults.clear()
                return _judged(server, ended, repo, flow, expected)

            context.figures.case(part, f"{kind}: {fault}", trial)


def _empty_cache() -> None:
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def _target(server: HubServer, flow: str, repo: str) -> None:
    if flow == "pull request" and not server.exists(repo):
        server.create_repo(repo)
        server.commit(repo, {"README.md": "# theirs"})


def _pattern(path: str) -> str:
    """Return what finds this kind of request in another run, which pushes elsewhere."""
    path = re.sub(r"\bme/[\w-]+", "TARGET", path)
    path = re.sub(r"[0-9a-f]{64}", "SHA", re.sub(r"[0-9a-f]{40}(?![0-9a-f])", "COMMIT", path))
    pattern = re.escape(path).replace("TARGET", r"me/[\w-]+").replace("SHA", "[0-9a-f]{64}")
    return pattern.replace("COMMIT", "[0-9a-f]{40}") + r"(\?|$)"


def _add(server: HubServer, method: str, pattern: str, fault: str) -> None:
    match fault:
        case "503":
            server.faults.answer(method, pattern, 503)
        case "503 for ever":
            server.faults.answer(method, pattern, 503, times=None)
        case "429":
            server.faults.answer(method, pattern, 429, headers={"Retry-After": "1"})
        case "cut":
            server.faults.drop_answer(method, pattern)
        case "half a body":
            server.faults.cut_body(pattern, 20)
        case _:
            server.faults.flip_byte(pattern, 5)


def _judged(server: HubServer, ended: runs.Ended, repo: str, flow: str, expected: bytes) -> str:
    """Return `recovered` or `refused`, or what is wrong."""
    if not ended.clear:
        return f"not clear: {ended.status} after {ended.seconds:.0f} s: {ended.said[-300:]}"
    revision = "refs/pr/1" if flow == "pull request" else "main"
    try:
        files = server.files(repo, revision) if server.exists(repo) else {}
    except KeyError:
        files = {}
    pushed = files.get("model.safetensors")
    if ended.status == 0:
        requests = len(server.repo(repo).discussions) if server.exists(repo) else 0
        if pushed != expected or requests > 1:
            return f"it ended well, and what was pushed is not the result ({requests} pull requests)"
        return "recovered"
    return "refused" if pushed in (None, expected) else "half a push"
