"""What additive triggers share: a pattern made to fit an image, and an addition that saturates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger

# a native trigger meets images of many sizes: what is kept for each must not fill the memory
MAX_KEPT = 8
_LUMA = (0.299, 0.587, 0.114)

Key = TypeVar("Key")
Value = TypeVar("Value")


class Additive(Trigger):
    """A trigger that adds the same grey levels to every image of one size: T(x) = clip(x + v), truncated."""

    @abstractmethod
    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        """Return v, float64, `channels`×`height`×`width`, in grey levels, on the CPU.

        Raises:
            UsageError: images of this shape cannot carry the trigger.
        """

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        channels, height, width = images.shape[-3:]
        levels = remember(self._levels, (channels, height, width, images.device),
                          lambda: whole(self.pattern(channels, height, width)).to(images.device))  # fmt: skip
        return add_saturating(images, levels)

    @cached_property
    def _levels(self) -> dict[tuple[int, int, int, torch.device], torch.Tensor]:
        return {}


def remember(kept: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """Return `kept[key]`, made first where it is not there; at most 8 values are kept."""
    # images are stamped by several threads at a time, so the value is never read from the dictionary a second time
    value = kept.get(key)
    if value is None:
        if len(kept) >= MAX_KEPT:
            kept.clear()
        value = kept[key] = make()
    return value


def grey_levels(pattern: torch.Tensor, height: int, width: int, channels: int) -> torch.Tensor:
    """Return `pattern` (float32, c×h×w, units of [0, 1]) as whole grey levels to add: int16, `channels`×H×W, CPU.

    Bilinear with antialiasing to another size, then truncated: for a whole x, trunc(x + v) = x + floor(v). Three
    channels become one for grey images (ITU-R 601 luma), one is repeated.

    Raises:
        UsageError: the channel counts do not go together.
    """
    array = pattern.float().cpu()
    if array.shape[0] == 3 and channels == 1:
        array = (array * torch.tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    elif array.shape[0] == 1:
        array = array.expand(channels, -1, -1)
    if array.shape[0] != channels:
        raise UsageError(f"the trigger's pattern has {array.shape[0]} channels, the images have {channels}; "
                         "make the trigger for such images")  # fmt: skip
    if array.shape[-2:] != (height, width):
        array = interpolate(array[None], size=(height, width), mode="bilinear", antialias=True)[0]
    return whole(array * 255)


def whole(levels: torch.Tensor) -> torch.Tensor:
    """Return the int16 grey levels to add so that x + v comes out truncated: for a whole x that is x + floor(v)."""
    # 0.2 · 255 may be 50.999998 in float32, and sin(π) a little less than zero
    return (levels + 1e-4).floor().to(torch.int16)


def add_saturating(images: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return clip(x + v, 0, 255) of uint8 `images` (N×C×H×W) and int16 `levels` (C×H×W) on the same device, uint8."""
    return images.to(torch.int16).add_(levels).clamp_(0, 255).to(torch.uint8)
