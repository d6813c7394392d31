"""What one process finds must hold for all: devices differ in the last bits, and DeepFool or PGD in more than those."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from hfdetox.triggers.base import Trigger


def of_main(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return the main process's `tensor` on every process, where they all have one of its shape and dtype.

    On the accelerator's device, where there are several processes; else the tensor itself.
    """
    if accelerator.num_processes == 1:
        return tensor
    found: torch.Tensor = broadcast(tensor.detach().to(accelerator.device, copy=True).contiguous())
    return found


def trigger_of_main(trigger: Trigger, accelerator: Accelerator) -> Trigger:
    """Return `trigger` with the main process's arrays, on every process."""
    if accelerator.num_processes == 1:
        return trigger
    arrays = {name: of_main(array, accelerator).to(array.device) for name, array in trigger.tensors().items()}
    return replace(trigger, **trigger.grouped(arrays)[0])
