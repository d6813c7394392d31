"""BatchNorm over several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn


@contextmanager
def synchronised(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let the BatchNorm layers of `network` use the statistics of all GPUs' batches, in place; undone at the end.

    Nothing is changed with one process or on CPUs, for which torch has no SyncBatchNorm.
    """
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        yield
        return
    originals = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)}
    convert_sync_batchnorm(network)
    try:
        yield
    finally:
        for name, module in originals.items():
            module.load_state_dict(network.get_submodule(name).state_dict())
            network.set_submodule(name, module)


def equalise_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    """Put the mean over all processes into every floating-point buffer: on CPUs, each has statistics of its own."""
    if accelerator.num_processes == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
