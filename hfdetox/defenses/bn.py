"""BN re-estimation: BatchNorm's statistics are measured anew on clean images; nothing is trained.

A baseline of hfdetox's own. Every method that trains in train mode on the clean images moves the statistics too,
and that alone lowers the success of some attacks; this shows by how much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.defenses.base import Batch, DefenseConfig, Network, Pass, Phase
from hfdetox.errors import UsageError
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True)
class BNConfig(DefenseConfig):
    """Settings of the re-estimation.

    Attributes:
        batch_size: images whose statistics are taken together, over all processes, at least 2. The new mean and
            variance are the averages of the batches' (the variance within batches), weighted by their images.
    """

    name = "bn"
    summary = "baseline: measure BatchNorm's statistics anew on clean images, train nothing"
    paper = "none: a baseline"
    data = "clean images"
    cost = "one forward pass in all"
    card_text = ("The statistics of the model's BatchNorm layers were measured anew on {images}; no weight was "
                 "trained. This is a baseline, not a method of a paper.")  # fmt: skip
    presets: ClassVar = {"control": {}}

    batch_size: Annotated[int, Interval("[2, inf]")] = 256

    def phases(self, network: Network) -> list[Phase | Pass]:
        if not _layers(network):
            raise UsageError(f"bn: {type(network.model).__name__} has no BatchNorm with running statistics, so there "
                             "is nothing to measure anew; use another defense, such as ft")  # fmt: skip
        statistics = _Statistics(network)
        return [Pass(name="bn", on_batch=statistics.on_batch, finish=statistics.finish, batch_size=self.batch_size)]


class _Statistics:
    """Running averages over the batches of a pass: the k-th of n_k images enters with weight n_k / Σ_{j≤k} n_j."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.seen = 0

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        # one image has no variance after a global pooling
        if len(batch.labels) < 2:
            return
        self.seen += len(batch.labels)
        # the first batch enters with weight 1: nothing of the old statistics is left
        with _measuring(_layers(network), len(batch.labels) / self.seen):
            network(batch.images)

    def finish(self, accelerator: Accelerator) -> dict[str, float]:
        total = float(accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device), reduction="sum"))
        if not total:
            raise UsageError("bn: a batch has less than two images; use more --samples or fewer processes")
        # the engine may have put other layers into the network than it had when the phases were made
        for layer in _layers(self.network):
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    buffer.copy_(accelerator.reduce(buffer * (self.seen / total), reduction="sum"))
        return {"images": total}


def _layers(network: nn.Module) -> list[_BatchNorm]:
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
