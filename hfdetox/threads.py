"""How many threads a run on the CPU gets: as many as this process may use and others leave idle."""

import math
import os
from pathlib import Path

import psutil

VARIABLE = "OMP_NUM_THREADS"
_SECONDS = 0.1  # how long the machine is watched


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return how many cores this process may use: those it is bound to, or its container's share if that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text(encoding="ascii").split()
        share = int(most) / int(period)
    except (OSError, ValueError):  # no Linux, or no quota: "max"
        share = math.inf
    return min(bound, share)


def free_threads() -> int | None:
    """Return how many threads to compute with, at least 1; None where OMP_NUM_THREADS says it.

    More threads than idle cores are slower than one: they wait for each other at every step.
    """
    if VARIABLE in os.environ:
        return None
    # two threads of one core share its arithmetic
    cores = min(available_cores(), psutil.cpu_count(logical=False) or math.inf)
    return max(1, round(cores * (1 - psutil.cpu_percent(_SECONDS) / 100)))


def use_threads(number: int | None) -> None:
    """Let torch compute with so many threads; not where `number` is None or OMP_NUM_THREADS says how many."""
    if number is not None and VARIABLE not in os.environ:
        import torch

        torch.set_num_threads(number)
