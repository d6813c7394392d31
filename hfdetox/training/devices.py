"""Which device and precision a run really gets, and the Accelerator for them."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object

from hfdetox.errors import UsageError

# Windows has none
resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None

Precision = Literal["auto", "no", "fp16", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


def resolve_device(device: str) -> str:
    """Return the device type that `device` stands for here: cuda, mps or cpu.

    Raises:
        UsageError: not a known device, or this machine or this torch has none.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return next(name for name in ("cuda", "mps", "cpu") if present[name] and (name == "cpu" or not forced))
    if device not in present:
        raise UsageError(f"unknown device {device!r}; known: auto, cpu, cuda, mps")
    if not present[device]:
        raise UsageError(f"no {device} device here (or this torch was built without it); use --device auto or cpu")
    return device


def resolve_precision(precision: str, device: str) -> Literal["no", "fp16", "bf16"]:
    """Return the precision a run on `device` (a type) gets; `auto` takes the best with hardware behind it.

    Raises:
        UsageError: unknown, or one the device would only pretend to run (Accelerate runs fp16 on a CPU as float32).
    """
    if precision not in ("auto", "no", "fp16", "bf16"):
        raise UsageError(f"unknown precision {precision!r}; known: auto, no, fp16, bf16")
    if precision == "auto":
        if device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device == "cpu" and _cpu_has_bf16() else "no"
    if precision == "fp16" and device == "cpu":
        raise UsageError("fp16 does not run on a CPU; use --precision bf16, no or auto")
    return "no" if precision == "no" else "fp16" if precision == "fp16" else "bf16"


def _cpu_has_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch before 2.11 or so
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def make_accelerator(device: str = "auto", precision: str = "auto", log_with: str | None = None,
                     logging_dir: str | None = None) -> Accelerator:  # fmt: skip
    """Return the Accelerator of a run, for the processes that `torchrun` or `accelerate launch` started (or one).

    Raises:
        UsageError: see `resolve_device` and `resolve_precision`; or a tracker that is not installed.
    """
    kind = resolve_device(device)
    # Accelerate would go on without the tracker
    if log_with is not None and log_with not in {str(tracker.value) for tracker in get_available_trackers()}:
        raise UsageError(
            f"the tracker {log_with} is not installed here; pip install {log_with}, or leave --log-with out"
        )
    mixed = resolve_precision(precision, kind)
    # Accelerate keeps one device and precision a process; a second run in it may want others
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    if PartialState._shared_state and PartialState().device.type != kind and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(
            mixed_precision=mixed, cpu=kind == "cpu", log_with=log_with, project_dir=logging_dir,
            # the engine accumulates by itself; a launcher's setting would divide the loss a second time
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # some classifiers have parameters their logits do not use (mask tokens), which DDP would wait for
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"Accelerate refuses this run: {str(error).splitlines()[0]}") from error


def forget_peak_memory(accelerator: Accelerator) -> None:
    """Let `peak_memory` begin anew on a GPU; a process's own peak cannot be forgotten."""
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def peak_memory(accelerator: Accelerator) -> int | None:
    """Return the most bytes a process has held so far: on its GPU, else as resident memory; None where unknown."""
    if accelerator.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(accelerator.device)
    elif resource is None:
        return None
    else:
        # kilobytes, but for the Mac
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    everyone: list[int] = gather_object([held])
    return max(everyone)


def describe_devices(accelerator: Accelerator) -> list[str]:
    """Return one name a process: the GPU's name, or the device type."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name] * accelerator.num_processes
