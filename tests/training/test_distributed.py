"""Two CPU processes give what one gives: the loss curve, the counts, the weights of each, and a resumed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.tiny_training import quick_garbage
from tests.training.distributed_script import COUNTS, DEFENSES, MASKED, RUNS, work


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    with quick_garbage():
        return work(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes find, started as the README says."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "-m", "tests.training.distributed_script", str(folder)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def test_there_were_as_many_processes_as_asked_for(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (one["processes"], two["processes"]) == (1, 2)


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_curve_is_that_of_one_process(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """Within 1e-4 relative over at least 20 steps, also with uneven parts, accumulation, augmentation and clipping."""
    assert len(one["curves"][name]) == len(two["curves"][name]) >= 20
    assert two["curves"][name] == pytest.approx(one["curves"][name], rel=1e-4)
    assert len(set(one["curves"][name])) > 15


@pytest.mark.parametrize("name", [*RUNS, "batchnorm"])
def test_every_process_ends_with_the_same_weights_and_buffers(name: str, two: dict[str, Any]) -> None:
    assert two["same everywhere"][name]


@pytest.mark.parametrize("count", COUNTS)
def test_every_image_is_answered_once_and_in_order(count: int, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert len(two["measured"][f"predicted {count}"]) == count
    assert two["measured"][f"predicted {count}"] == one["measured"][f"predicted {count}"]
    assert two["measured"][f"losses {count}"] == pytest.approx(one["measured"][f"losses {count}"], rel=1e-3, abs=1e-5)


def test_counts_are_those_of_one_process(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["measured"]["counts"] == one["measured"]["counts"]
    assert one["measured"]["counts"][2] == 35
    assert two["measured"]["on demand"] == one["measured"]["on demand"]


def test_a_killed_run_of_two_processes_goes_on_to_the_same_weights(two: dict[str, Any]) -> None:
    assert two["resumed"]


def test_a_process_without_held_out_images_adds_nothing(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["looked alone"] == one["looked alone"]
    assert len(one["looked alone"]) == 3


def test_the_processes_go_on_after_a_run_with_a_tracker(one: dict[str, Any], two: dict[str, Any]) -> None:
    """`Accelerator.end_training` destroys the process group, which measuring needs."""
    assert one["tracked"]
    assert two["tracked"]


@pytest.mark.parametrize("name", DEFENSES)
def test_defenses_end_alike_on_every_process_and_lose_what_one_process_loses(name: str, one: dict[str, Any],
                                                                             two: dict[str, Any]) -> None:  # fmt: skip
    losses, same = two["defenses"][name]
    assert same
    assert len(losses) > 2
    # NC draws which images are stamped on each process by itself: its search alone, three epochs, is the same
    compared = 3 if name == "nc" else len(losses)
    # a mask's search runs with BatchNorm's statistics of half a batch
    expected = pytest.approx(one["defenses"][name][0][:compared], rel=0.15 if name in MASKED else 1e-3)
    assert losses[:compared] == expected
