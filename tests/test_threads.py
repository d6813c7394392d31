"""How many threads a run gets: what the machine leaves idle, what the user says, what a resumed run began with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from hfdetox.threads import VARIABLE, available_cores, free_threads, use_threads

CORES = os.cpu_count() or 1


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No OMP_NUM_THREADS; torch has as many threads afterwards as before."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != VARIABLE})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 1.5), ("50000 100000\n", 0.5), ("max 100000", None), ("", None), ("what?", None), (None, None)],
)
def test_a_container_has_its_share_of_the_cores(quota: str | None, cores: float | None, tmp_path: Path) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    whole = available_cores(tmp_path / "no such file")
    assert 1 <= whole <= CORES
    assert available_cores(tmp_path / "cpu.max") == (whole if cores is None else min(whole, cores))


@pytest.mark.usefixtures("nothing_said")
def test_threads_are_as_many_as_idle_cores() -> None:
    found = free_threads()
    assert found is not None
    assert 1 <= found <= max(1, available_cores())


@pytest.mark.skipif(CORES > 8, reason="would load a big machine")
@pytest.mark.usefixtures("nothing_said")
def test_a_busy_machine_leaves_one_thread() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        for _ in range(100):
            if psutil.cpu_percent(0.1) > 95:
                break
        assert free_threads() == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_the_user_s_number_stays(nothing_said: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    use_threads(None)
    assert torch.get_num_threads() == 2
    monkeypatch.setitem(os.environ, VARIABLE, "2")
    assert free_threads() is None
    use_threads(3)
    assert torch.get_num_threads() == 2
    monkeypatch.delitem(os.environ, VARIABLE)
    use_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("said", "expected"), [({VARIABLE: "1"}, "1 PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({}, " PASSIVE")]
)
def test_a_command_waits_passively_and_its_number_is_torch_s(
    said: dict[str, str], expected: str, fresh_env: dict[str, str]
) -> None:
    code = (
        "import os, torch\nfrom hfdetox.cli import app\nfrom hfdetox.config import ConsoleOptions\n"
        "with app.running(ConsoleOptions(), str):\n"
        "    print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in fresh_env.items() if not k.startswith(("OMP", "MKL"))} | said
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    number, policy = done.stdout.split()
    assert f"{number} {policy}".endswith(expected)
    assert 1 <= int(number) <= CORES
