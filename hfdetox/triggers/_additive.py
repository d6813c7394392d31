"""What additive triggers share: a pattern made to fit an image, and an addition that saturates."""

from __future__ import annotations

from abc import abstractmethod

import torch

from hfdetox.triggers.base import Trigger


class Additive(Trigger):
    """A trigger that adds the same grey levels to every image of one size: T(x) = clip(x + v), truncated."""

    @abstractmethod
    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        """Return v, float, `channels`×`height`×`width`, in grey levels, on the CPU.

        Raises:
            UsageError: images of this shape cannot carry the trigger.
        """

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        channels, height, width = images.shape[-3:]
        levels = self.remember((channels, height, width, images.device),
                               lambda: whole(self.added(channels, height, width)).to(images.device))  # fmt: skip
        return add_saturating(images, levels)


def whole(levels: torch.Tensor) -> torch.Tensor:
    """Return the int16 grey levels to add so that x + v comes out truncated: for a whole x that is x + floor(v)."""
    # 0.2 · 255 may be 50.999998 in float32, and sin(π) a little less than zero
    return (levels + 1e-4).floor().to(torch.int16)


def add_saturating(images: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return clip(x + v, 0, 255) of uint8 `images` (N×C×H×W) and int16 `levels` (C×H×W) on the same device, uint8."""
    return images.to(torch.int16).add_(levels).clamp_(0, 255).to(torch.uint8)
