"""BatchNorm over several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synchronised(networks: Iterable[nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Let the BatchNorm layers of `networks` use the statistics of all GPUs' batches; undone at the end.

    The layers stay the same objects (only their class changes), so that hooks on them, and what methods hold of them,
    are those that run. Nothing is changed with one process or on CPUs, for which torch has no SyncBatchNorm.
    """
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        yield
        return
    layers = {layer for network in networks for layer in network.modules() if isinstance(layer, _BatchNorm)}
    # a layer with a forward of its own computes something that torch has no synchronised form of
    known = {_BatchNorm.forward: nn.SyncBatchNorm, BatchNormAct2d.forward: SyncBatchNormAct}
    before = {layer: type(layer) for layer in layers if type(layer).forward in known}
    for layer, kind in before.items():
        layer.process_group = None  # type: ignore[assignment]
        layer.__class__ = type(f"Sync{kind.__name__}", (known[kind.forward], kind), {})
    try:
        yield
    finally:
        for layer, kind in before.items():
            layer.__class__ = kind
            del layer.process_group


def equalise_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    """Put the mean over all processes into every floating-point buffer: on CPUs, each has statistics of its own."""
    if accelerator.num_processes == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
