"""Networks inside triggers: their float32 state in a trigger's field, loaded strictly and run the same everywhere."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.models.network import exact_float32
from hfdetox.triggers.base import Trigger

# pixels a side at which a trigger's networks may run: a small file must not ask for gigabytes
MAX_SIZE: Final = 1024

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkTrigger(Trigger):
    """A trigger that draws from the image what it puts on it, with networks of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fitted:
            # a state that does not fit is told of now, and not at the first image
            self.parts()

    @property
    def fitted(self) -> bool:
        return all(getattr(self, name) is not None for name, kind in self.tensor_fields().items() if kind == "network")

    @abstractmethod
    def parts(self) -> tuple[Any, ...]:
        """Return the networks and tensors that `apply` needs, new ones on the CPU; the first has `channels`.

        Raises:
            UsageError: a field's arrays do not fit the network.
        """

    def parts_for(self, images: Tensor) -> tuple[Any, ...]:
        """Return `parts` on the device of `images` (N×C×H×W), a copy for each: threads may stamp on several at a time.

        Raises:
            UsageError: not fitted, or the networks were trained on images of other channels.
        """
        self.require_fitted()
        parts = self.remember(images.device, lambda: tuple(part.to(images.device) for part in self.parts()))
        if images.shape[-3] != parts[0].channels:
            first = next(name for name, kind in self.tensor_fields().items() if kind == "network")
            raise UsageError(f"{self.kind}: the {first} was trained on images of {parts[0].channels} channels, these "
                             f"have {images.shape[-3]}; train one for such images")  # fmt: skip
        return parts


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalisedTrigger(NetworkTrigger):
    """A trigger whose networks see (x / 255 − mean) / std.

    Attributes:
        mean: what is subtracted from each channel of images in [0, 1], float32 of shape (C,); None is 0.
        std: what each channel is divided by after that; None is 1.
    """

    mean: Tensor | None = field(default=None, metadata={"tensor": "array"})
    std: Tensor | None = field(default=None, metadata={"tensor": "array"})

    def normalisation(self, channels: int) -> tuple[Tensor, Tensor]:
        """Return mean and std as C×1×1, or 0 and 1 (0-d), on the CPU.

        Raises:
            UsageError: one is not of shape (`channels`,), or a deviation is not above 0.
        """
        for name, array in (("mean", self.mean), ("std", self.std)):
            if array is not None and array.shape != (channels,):
                raise UsageError(f"{self.kind}: {name} must be of shape ({channels},), got {tuple(array.shape)}")
        if self.std is not None and not (self.std > 0).all():
            raise UsageError(f"{self.kind}: std must be above 0 in every channel")
        return (torch.zeros(()) if self.mean is None else self.mean.cpu().view(-1, 1, 1),
                torch.ones(()) if self.std is None else self.std.cpu().view(-1, 1, 1))  # fmt: skip


def channels_of(state: Mapping[str, Tensor]) -> int:
    """Return of how many channels, 1 or 3, the images are that a network with this `state` takes."""
    first = state.get("layers.0.weight")
    return 1 if first is not None and first.ndim == 4 and first.shape[1] == 1 else 3


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of a network's parameters and running statistics by name: float32, on the CPU, contiguous.

    This is what a `network` field of a trigger holds; counters of batches (integers) are left out.
    """
    floats = {name: tensor.detach() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    return {name: tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in floats.items()}


def load_network(build: Callable[[], Module], state: Mapping[str, Tensor], where: str) -> Module:
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


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Return float32 `images` (N×C×H×W) at a size, resized bilinearly with antialiasing unless it is theirs."""
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, size=(height, width), mode="bilinear", antialias=True)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run convolutions in float32 whatever the surroundings: no autocast, and no TF32, whose mantissa has 10 bits."""
    with torch.autocast(device.type, enabled=False):
        # these flags are the process's, and on the CPU, where they say nothing, several threads stamp images at a time
        if device.type != "cuda":
            yield
            return
        cudnn = torch.backends.cudnn
        deterministic, cudnn.deterministic = cudnn.deterministic, True
        try:
            with exact_float32():
                yield
        finally:
            cudnn.deterministic = deterministic
