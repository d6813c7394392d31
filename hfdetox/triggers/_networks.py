"""Networks inside triggers: their float32 state in a trigger's field, loaded strictly and run the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

import torch
from torch import nn
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger

# pixels a side at which a trigger's networks may run: a small file must not ask for gigabytes
MAX_SIZE: Final = 1024

Module = TypeVar("Module", bound=nn.Module)


def network_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a network's parameters and running statistics by name: float32, on the CPU, contiguous.

    This is what a `network` field of a trigger holds; counters of batches (integers) are left out.
    """
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def load_network(build: Callable[[], Module], state: Mapping[str, torch.Tensor], where: str) -> Module:
    """Return the network that `build` makes, with the values of `state` (as `network_state` gives), frozen, on the CPU.

    Args:
        where: what the error names, such as `ssba: encoder`.

    Raises:
        UsageError: a tensor is missing, unknown or of another shape; it names the first one.
    """
    # nothing is drawn on the meta device, so the global generator stays where it was
    with torch.device("meta"):
        network = build()
    expected = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    for name in [*expected, *state]:
        found = tuple(state[name].shape) if name in state else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise UsageError(f"{where} does not fit its parameters: {name} is {found} where {wanted} is expected; "
                             "take the trigger file as `hfdetox attack` wrote it")  # fmt: skip
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(state[name]) if name in state else tensor.zero_()
    # a third faster on a CPU, whatever the memory order of the images
    network = network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


def check_normalisation(trigger: Trigger, mean: torch.Tensor | None, std: torch.Tensor | None, channels: int) -> None:
    """Raise UsageError unless `mean` and `std` are None or of shape (`channels`,), and no deviation is 0."""
    for name, array in (("mean", mean), ("std", std)):
        if array is not None and array.shape != (channels,):
            raise UsageError(f"{trigger.kind}: {name} must be of shape ({channels},), got {tuple(array.shape)}")
    if std is not None and not (std > 0).all():
        raise UsageError(f"{trigger.kind}: std must be above 0 in every channel")


def check_channels(trigger: Trigger, what: str, channels: int, images: torch.Tensor) -> None:
    """Raise UsageError unless `images` (N×C×H×W) have the `channels` that the network `what` was trained on."""
    if images.shape[-3] != channels:
        raise UsageError(f"{trigger.kind}: the {what} was trained on images of {channels} channels, these have "
                         f"{images.shape[-3]}; train one for such images")  # fmt: skip


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return float32 `images` (N×C×H×W) at a size, resized bilinearly with antialiasing unless it is theirs."""
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def normalisation(
    mean: torch.Tensor | None, std: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `mean` and `std` (float32, (C,)) on `device` as C×1×1; None is 0 and 1, 0-d."""
    shift = torch.zeros((), device=device) if mean is None else mean.to(device).view(-1, 1, 1)
    scale = torch.ones((), device=device) if std is None else std.to(device).view(-1, 1, 1)
    return shift, scale


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run convolutions in float32 whatever the surroundings: no autocast, and no TF32, whose mantissa has 10 bits."""
    with torch.autocast(device.type, enabled=False):
        # these flags are the process's, and on the CPU, where they say nothing, several threads stamp images at a time
        if device.type != "cuda":
            yield
            return
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=True, allow_tf32=False,
                         fp32_precision="ieee"):  # fmt: skip
            yield
