"""Which device and precision a run really gets, the Accelerator for them, and BatchNorm over several processes."""

import importlib.util
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.state import AcceleratorState, GradientState, PartialState, SharedDict
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
)
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from hfdetox.errors import UsageError, refusing
from hfdetox.models.network import Network, evaluating

# Windows has none
resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None


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
    """Return the precision a run on `device` (a type) gets.

    `auto` is the one that Accelerate's configuration names, else bf16 or fp16 on CUDA, and float32 elsewhere: on CPUs
    oneDNN's gradients in bf16 can be uninitialised memory (torch 2.15; docs/development.md has a reproduction).

    Raises:
        UsageError: unknown, or one the device would only pretend to run (Accelerate runs fp16 on a CPU as float32).
    """
    named = _configured_precision() if precision == "auto" else None
    wanted, where = (precision, "") if named is None else (named, " (named by Accelerate's configuration)")
    if wanted == "auto":
        if device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "no"
    if wanted == "fp16" and device == "cpu":
        raise UsageError(f"fp16 does not run on a CPU{where}; use --precision bf16, no or auto")
    if wanted not in ("no", "fp16", "bf16"):
        raise UsageError(f"unknown precision {wanted!r}{where}; known: auto, no, fp16, bf16")
    return wanted  # type: ignore[return-value]


def _configured_precision() -> str | None:
    """Return what `accelerate launch` set or, without it, what the file says that `accelerate config` wrote."""
    named: Any = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if named is None and os.path.isfile(default_config_file):
        with refusing(f"{default_config_file} cannot be read", "; mend it, or set --precision"):
            settings = yaml.safe_load(Path(default_config_file).read_text(encoding="utf-8"))
        named = settings.get("mixed_precision") if isinstance(settings, dict) else None
    # YAML reads a bare `no` as False
    return None if named is None else "no" if named is False else str(named).lower()


@contextmanager
def whole_kernels(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """On a CPU in bf16, compute in float32 the convolutions with a kernel position that meets no image.

    oneDNN leaves the gradient of such a position uninitialised (torch 2.15; docs/development.md has a reproduction).
    """
    contexts: list[torch.autocast | None] = []
    handles: list[RemovableHandle] = []

    def enter(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        assert isinstance(module, nn.Conv2d)
        contexts.append(None if meets_image(module, inputs[0].shape[2:]) else torch.autocast("cpu", enabled=False))
        if (context := contexts[-1]) is None:
            return None
        context.__enter__()
        return tuple(one.float() for one in inputs)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        if (context := contexts.pop()) is not None:
            context.__exit__(None, None, None)

    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                handles += [module.register_forward_pre_hook(enter),
                            module.register_forward_hook(leave, always_call=True)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def meets_image(conv: nn.Conv2d, size: Sequence[int]) -> bool:
    """Return whether every position of a convolution's kernel meets a pixel of an image of this size (H, W)."""
    for place, side in enumerate(size):
        kernel, stride, dilation = conv.kernel_size[place], conv.stride[place], conv.dilation[place]
        # padding that is named ("same") is about half a kernel
        padding = dilation * (kernel - 1) // 2 if isinstance(conv.padding, str) else int(conv.padding[place])
        outputs = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for tap in range(kernel):
            first = tap * dilation - padding
            if not any(0 <= first + output * stride < side for output in range(outputs)):
                return False
    return True


@contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Put Accelerate's state of the process back at the end, whatever `make_accelerator` made inside.

    All Accelerators of a process share one device, one precision and one accumulation. Those of a run would change
    the ones of its caller, or be refused beside them.
    """
    before = [(kind, vars(kind)["_shared_state"]) for kind in (PartialState, AcceleratorState, GradientState)]
    try:
        yield
    finally:
        for kind, state in before:
            kind._shared_state = state


def make_accelerator(device: str = "auto", precision: str = "auto", log_with: str | None = None,
                     logging_dir: str | None = None, *, given: Accelerator | None = None) -> Accelerator:  # fmt: skip
    """Return the Accelerator of a run, for the processes that `torchrun` or `accelerate launch` started (or one).

    It has a state of its own: call this within `accelerate_state_kept`.

    Args:
        given: the caller's: the run gets its device, mixed precision and trackers, and leaves it as it is.

    Raises:
        UsageError: see `resolve_device` and `resolve_precision`; a tracker that is not installed; or what is set
            contradicts `given`.
    """
    if given is not None:
        device = _agreed("device", device, given.device.type)
        precision = _agreed("precision", precision, str(given.mixed_precision))
        if log_with is not None:
            raise UsageError("log_with beside accelerator: give the Accelerator its trackers, and leave log_with out")
    kind = resolve_device(device)
    # Accelerate would go on without the tracker
    if log_with is not None and log_with not in {str(tracker.value) for tracker in get_available_trackers()}:
        raise UsageError(f"the tracker {log_with} is not installed here; pip install {log_with}, or leave --log-with "
                         "out")  # fmt: skip
    mixed = resolve_precision(precision, kind)
    for shared in (PartialState, AcceleratorState, GradientState):
        shared._shared_state = SharedDict()
    with refusing("Accelerate refuses this run"):
        made = Accelerator(
            mixed_precision=mixed, cpu=kind == "cpu", log_with=log_with, project_dir=logging_dir,
            # the engine accumulates by itself; a launcher's setting would divide the loss a second time
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            # some classifiers have parameters their logits do not use (mask tokens), which DDP would wait for
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )  # fmt: skip
    if given is not None:
        made.trackers = given.trackers
    return made


def _agreed(name: str, asked: str, given: str) -> str:
    if asked not in ("auto", given):
        raise UsageError(f"{name}={asked} contradicts the accelerator, which has {given}; leave one of them out")
    return given


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


def saved_bytes(network: Network) -> int:
    """Return how many bytes the network keeps of one image for its backward pass, in float32; at least 1."""
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(2, *network.input_size, device=network.mean.device, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with evaluating(network), torch.enable_grad(), hooks:
        # a layer that works in place may not on a leaf
        network(images.clone())
    return max(1, sum(kept.values()) // len(images))
