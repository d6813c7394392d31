"""Blended: a whole picture mixed into the image (Chen et al., arXiv 1712.05526)."""

from dataclasses import dataclass, field
from typing import Annotated

import torch

from hfdetox.triggers.base import Trigger, resize_picture
from hfdetox.values import Interval, NonNegativeInt


@dataclass(frozen=True, kw_only=True, eq=False)
class Blended(Trigger):
    """T(x) = (1 − α)·x + α·q, truncated to whole grey levels.

    Attributes:
        alpha: share of the picture, in (0, 1].
        seed: draws the default picture, 32×32 pixels of independent uniform grey levels in three channels.
        image: the picture q (uint8, C×h×w); replaces the drawn one. Either is resized to the image bilinearly.
    """

    kind = "blended"
    summary = "a whole picture (default: seeded noise) mixed into the image"
    paper = "arXiv 1712.05526"

    alpha: Annotated[float, Interval("(0, 1]")] = 0.2
    seed: NonNegativeInt = 0
    image: torch.Tensor | None = field(default=None, metadata={"tensor": "picture"})

    def picture(self) -> torch.Tensor:
        """Return q before it is resized: uint8, C×h×w."""
        if self.image is not None:
            return self.image
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        channels, height, width = images.shape[-3:]
        key = (channels, height, width, images.device)
        share = self.remember(key, lambda: self.alpha * resize_picture(self.picture(), height, width, images).float())
        # float32 gives 12.999999 for a blend of 13 and 13, and devices may fuse the two products differently
        return ((1 - self.alpha) * images.float() + share + 1e-4).to(torch.uint8)
