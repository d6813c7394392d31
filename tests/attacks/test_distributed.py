"""Two CPU processes attack with one trigger and one training set, those of the main process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.attacks.distributed_script import SETTINGS
from tests.conftest import REPOSITORY


def test_two_processes_share_the_triggers_and_the_poisoned_images(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "-m", "tests.attacks.distributed_script", str(tmp_path / "found")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"found.{process}").read_text()) for process in range(2))
    assert first.keys() == SETTINGS.keys()
    assert first == second
