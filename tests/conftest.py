"""The test session: one Hub server for each process, and an environment in which every client talks to it only.

The client libraries freeze HF_ENDPOINT and HF_HOME when they are imported, so all of this happens while this file is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest

from tests.hub_server.server import HubServer

REPOSITORY = Path(__file__).resolve().parent.parent


def _clean_environment() -> None:
    """Remove what would let a test depend on the person or machine that runs it."""
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    for name in list(os.environ):
        if name.upper() in proxies or name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_", "HFDETOX_")):
            del os.environ[name]


def _start_server() -> tuple[HubServer, Path]:
    if "huggingface_hub" in sys.modules:
        raise pytest.UsageError("huggingface_hub was imported before tests/conftest.py could set HF_ENDPOINT")
    root = Path(tempfile.mkdtemp(prefix="hfdetox-tests-"))
    server = HubServer(root / "hub")
    server.start()
    _clean_environment()
    os.environ.update(
        HF_ENDPOINT=server.url,
        HF_HOME=str(root / "hf_home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_UPDATE_DOWNLOAD_COUNTS="0",
        DISABLE_SAFETENSORS_CONVERSION="1",
        NO_PROXY="127.0.0.1,localhost",
        MPLBACKEND="Agg",
        TOKENIZERS_PARALLELISM="false",
    )
    # a background job of a shell may start with Ctrl-C ignored, and so would all processes the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # one thread a process: several with all cores each would stop each other at every barrier
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return server, root


_SERVER, _ROOT = _start_server()
_NUMBERS = count()


def pytest_unconfigure() -> None:
    """Stop the server and remove its repos and the session's caches."""
    _SERVER.stop()
    shutil.rmtree(_ROOT, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Begin each test with the same random numbers, whatever ran before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The session's Hub, without faults, with an empty log and the accounts of the start. Repos stay between tests."""
    _SERVER.reset()
    yield _SERVER
    errors = list(_SERVER.errors)
    _SERVER.reset()
    assert not errors, "mistakes in tests/hub_server: " + "\n".join(errors)


@pytest.fixture
def hub_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Log this process in as `me` for the test (clients read HF_TOKEN at each call); the token is given back."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


@pytest.fixture
def repo_name() -> Callable[..., str]:
    """A function that gives an id nobody has had in this session: `repo_name()`, `repo_name("model", "org")`."""

    def name(stem: str = "repo", namespace: str = "me") -> str:
        return f"{namespace}/{stem}-{next(_NUMBERS)}"

    return name


@pytest.fixture
def fresh_env(tmp_path: Path) -> dict[str, str]:
    """An environment for subprocesses that use the session's Hub with their own empty HF_HOME, and not logged in."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment["HF_HOME"] = str(tmp_path / "hf_home")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    return environment


@pytest.fixture
def run_cli(fresh_env: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli(args, env=fresh_env, timeout=600, cwd=tmp_path)` runs `python -m hfdetox` and returns the process."""

    def run(
        args: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 600, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hfdetox", *map(str, args)],
            env=dict(fresh_env if env is None else env),
            cwd=cwd or tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
