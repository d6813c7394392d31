"""BatchNorm's running statistics, measured anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.training.batches import Batch


class Statistics:
    """Running averages over the batches of a pass: the k-th of n_k images enters with weight n_k / Σ_{j≤k} n_j.

    Until the first batch of at least two images the old ones stay.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.seen = 0

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Let a batch enter."""
        # one image has no variance after a global pooling
        if len(batch.labels) < 2:
            return
        self.seen += len(batch.labels)
        # the first batch enters with weight 1: nothing of the old statistics is left
        with _measuring(measured_layers(network), len(batch.labels) / self.seen):
            network(batch.images)

    def finish(self, accelerator: Accelerator) -> int:
        """Average over the processes; returns how many images entered, 0 where no batch had two."""
        total = float(accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device), reduction="sum"))
        # the engine may have put other layers into the network than it had when the phases were made
        for layer in measured_layers(self.network) if total else []:
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    buffer.copy_(accelerator.reduce(buffer * (self.seen / total), reduction="sum"))
        return round(total)


def measured_layers(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that have running statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _measuring(layers: list[_BatchNorm], momentum: float) -> Iterator[None]:
    """Let these layers use and average batch statistics; the rest of the network (dropout) stays in eval mode."""
    before = [(layer, layer.training, layer.momentum) for layer in layers]
    for layer in layers:
        layer.training, layer.momentum = True, momentum
    try:
        yield
    finally:
        for layer, training, old in before:
            layer.training, layer.momentum = training, old
