"""Runs that end in the middle, as a kill ends them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from hfdetox.training.checkpoints import CheckpointStore


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def raise_killed() -> NoReturn:
    """Stop as a kill would."""
    raise Killed


class KillingStore(CheckpointStore):
    """Calls `kill` right after its n-th checkpoint; 0 is never."""

    def __init__(self, folder: Path, saves: int, kill: Callable[[], NoReturn] = raise_killed) -> None:
        super().__init__(folder)
        self.left, self.kill = saves, kill

    def save(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        super().save(tensors, record)
        self.left -= 1
        if not self.left:
            self.kill()
