"""The parts of `make faults` in which requests to the Hub fail, by the test Hub's own faults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from tests.faults import runs
from tests.hub_server.answers import Refusal
from tests.hub_server.server import HubServer

if TYPE_CHECKING:
    from tests.faults.parts import Context

FAULTS = ("503", "429", "cut", "half a body", "a wrong byte")
_BODIES = FAULTS[3:]  # only what is sent by GET
_AT_A_TIME = 8  # runs that wait
_PATIENCE = 400.0  # seconds: two minutes of hfdetox, and the client library's own repetitions of one call


@dataclass
class Flows:
    """A run with a push and a pull request, the kinds of requests that they send, and the weights that they push.

    Attributes:
        kinds: by method and path, the flow that sends it and what finds it in another run.
    """

    words: list[str]
    kept: Path
    expected: bytes
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)

    def command(self, flow: str, repo: str) -> list[str]:
        """Return the command of `run` or `pull request` that pushes to `repo`."""
        if flow == "run":
            return [*self.words, "--push-to", repo]
        return ["push", str(self.kept), repo, "--create-pr"]


def hub(context: Context) -> None:
    """Let each kind of request fail once in each way: the run recovers, or says clearly what it could not do."""
    flows = _flows(context)
    for number, (kind, fault) in enumerate(_chosen(context, flows, FAULTS)):
        flow, pattern = flows.kinds[kind]

        def trial(number: int = number, kind: str = kind, fault: str = fault, flow: str = flow,
                  pattern: str = pattern) -> str:  # fmt: skip
            return _tried(context, flows, flow, f"me/once-{number}", {(kind.partition(" ")[0], pattern): fault})

        context.figures.case(f"{kind}: {fault}", trial)


def together(context: Context) -> None:
    """Let every kind of request fail once in the same run: it recovers, but for a file that came with a wrong byte."""
    flows = _flows(context)
    for number, fault in enumerate(FAULTS[: context.some(len(FAULTS))]):
        for flow in ("run", "pull request"):

            def trial(number: int = number, fault: str = fault, flow: str = flow) -> str:
                rules = {(kind.partition(" ")[0], pattern): fault for kind, (_, pattern) in flows.kinds.items()
                         if _fits(kind, fault)}  # fmt: skip
                found = _tried(context, flows, flow, f"me/all-{flow[:4]}-{number}", rules)
                return "refused, and it should recover" if found == "refused" and fault != FAULTS[-1] else found

            context.figures.case(f"{flow}: {fault}", trial)


def forever(context: Context) -> None:
    """Let each kind answer 503 for ever: the run ends, within its time, with one line; several wait at a time."""
    flows = _flows(context)
    model, digits = context.made()
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(lambda one: _waited(context, flows, *one, model, digits),
                      enumerate(dict.fromkeys(kind for kind, _ in _chosen(context, flows, ("503",))))))  # fmt: skip


def _waited(context: Context, flows: Flows, number: int, kind: str, model: Path, digits: Path) -> None:
    """Try one kind that fails for ever, with a Hub and a process of its own."""
    flow, pattern = flows.kinds[kind]

    def trial() -> str:
        place = context.root / f"waits-{number}"
        shutil.rmtree(place, ignore_errors=True)
        with HubServer(place / "hub") as server:
            _fill(server, model, digits)
            _target(server, flow, "me/target")
            server.faults.answer(kind.partition(" ")[0], pattern, 503, times=None)
            words = flows.command(flow, "me/target")
            if flow == "run":
                words[words.index("--output") + 1] = str(place / "out")
            else:
                words[1] = str(shutil.copytree(flows.kept, place / "kept"))
            environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(place / "home")}
            began = time.monotonic()
            try:
                done = subprocess.run([sys.executable, "-m", "hfdetox", *words], env=environment, timeout=_PATIENCE,
                                      capture_output=True, text=True, check=False)  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"it did not end in {_PATIENCE:.0f} s"
            ended = runs.Ended(done.returncode, done.stderr, time.monotonic() - began)
            return _judged(server, ended, "me/target", flow, None)

    context.figures.case(kind, trial)
    shutil.rmtree(context.root / f"waits-{number}", ignore_errors=True)


def _flows(context: Context) -> Flows:
    """Return the two flows, after both went well once, with the kinds of requests that they sent."""
    server, (model, digits) = context.server, context.made()
    _fill(server, model, digits)
    os.environ["HF_TOKEN"] = server.token
    place = context.fresh()
    words = runs.words("org/digits-net", "org/digits", place / "out")
    words[words.index("epochs=4")] = "epochs=1"
    expected, _ = runs.reference(words, place / "out")
    flows = Flows(words, context.root / "kept", expected)
    shutil.copytree(place / "out", flows.kept, dirs_exist_ok=True)
    for flow in ("run", "pull request"):
        server.reset()
        _target(server, flow, f"me/first-{flow[:4]}")
        context.fresh()
        runs.run(flows.command(flow, f"me/first-{flow[:4]}"), _empty_cache)
        for entry in list(server.log):
            pattern = _pattern(entry.path)
            flows.kinds.setdefault(f"{entry.method} {pattern}", (flow, pattern))
    return flows


def _fill(server: HubServer, model: Path, digits: Path) -> None:
    for name, folder, kind in (("org/digits-net", model, "model"), ("org/digits", digits, "dataset")):
        if not server.exists(name, kind):
            server.create_repo(name, kind)
            server.commit_folder(name, folder, repo_type=kind)


def _chosen(context: Context, flows: Flows, faults: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [(kind, fault) for kind in sorted(flows.kinds) for fault in faults if _fits(kind, fault)]
    return pairs[:: -(-len(pairs) // context.some(len(pairs)))]


def _fits(kind: str, fault: str) -> bool:
    return kind.startswith("GET ") or fault not in _BODIES


def _tried(context: Context, flows: Flows, flow: str, repo: str, rules: dict[tuple[str, str], str]) -> str:
    """Run a flow while requests fail once each, and return what is wrong; `rules` name a fault by method and path."""
    server = context.server
    if server.exists(repo):
        # what was not as promised is tried again
        server.delete_repo(repo)
    server.reset()
    _target(server, flow, repo)
    for (method, pattern), fault in rules.items():
        _add(server, method, pattern, fault)
    context.fresh()
    ended = runs.run(flows.command(flow, repo), _empty_cache, seconds=_PATIENCE)
    server.faults.clear()
    return _judged(server, ended, repo, flow, flows.expected)


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
    add: dict[str, Callable[[], object]] = {
        "503": lambda: server.faults.answer(method, pattern, 503),
        "429": lambda: server.faults.answer(method, pattern, 429, headers={"Retry-After": "1"}),
        "cut": lambda: server.faults.drop_answer(method, pattern),
        "half a body": lambda: server.faults.cut_body(pattern, 20),
        "a wrong byte": lambda: server.faults.flip_byte(pattern, 5),
    }
    add[fault]()


def _judged(server: HubServer, ended: runs.Ended, repo: str, flow: str, expected: bytes | None) -> str:
    """Return `recovered` or `refused`, or what is wrong; `expected` are the weights to push, None where any may be."""
    if not ended.clear:
        return f"not clear: {ended.status} after {ended.seconds:.0f} s: {ended.said[-300:]}"
    revision = "refs/pr/1" if flow == "pull request" else "main"
    try:
        files = server.files(repo, revision) if server.exists(repo) else {}
    except (KeyError, Refusal):
        files = {}
    pushed = files.get("model.safetensors")
    if ended.status == 0:
        requests = len(server.repo(repo).discussions) if server.exists(repo) else 0
        if pushed is None or (expected is not None and pushed != expected) or requests > 1:
            return f"it ended well, and what was pushed is not the result ({requests} pull requests)"
        return "recovered"
    return "refused" if pushed is None or expected is None or pushed == expected else "half a push"
