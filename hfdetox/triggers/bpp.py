"""BPP: fewer grey levels in each channel (Wang et al., arXiv 2205.13383)."""

from dataclasses import dataclass
from typing import Annotated

import torch

from hfdetox.triggers.base import Trigger
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Bpp(Trigger):
    """T(x) = round(x / 255·(L − 1)) / (L − 1)·255 in each channel, rounded to the nearest grey level.

    Attributes:
        levels: grey levels L that are left in each channel, 2 to 255.
        dither: pass each pixel's rounding error on to its neighbours (Floyd and Steinberg, 1976) before they are
            rounded: 7/16 right, 3/16 below left, 5/16 below, 1/16 below right; what leaves the image is lost.
    """

    kind = "bpp"
    summary = "fewer grey levels in each channel"
    paper = "arXiv 2205.13383"

    levels: Annotated[int, Interval("[2, 255]")] = 8
    dither: bool = False

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        # the grey levels that are left, rounded half up
        steps, device = self.levels - 1, images.device
        greys = ((2 * 255 * torch.arange(self.levels, device=device) + steps) // (2 * steps)).to(torch.uint8)
        if self.dither:
            return greys[diffused(images, self.levels)]
        # round(a / b) of whole numbers is (2a + b) // 2b: every device gives the same
        nearest = (2 * torch.arange(256, device=device) * steps + 255) // 510
        return greys[nearest][images.long()]


def diffused(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the level (int64, 0 to `levels` - 1) of each pixel of `images` (uint8, N×C×H×W), errors passed on.

    A pixel needs its left neighbour and three of the row above: pixels with the same column + 2·row are independent
    and are done together, in W + 2·H steps for the whole batch.
    """
    height, width = images.shape[-2:]
    steps = levels - 1
    # in units of 1 / steps grey levels, with zeros around: one row above, two columns left, one right
    scaled = images.float() * steps
    errors = torch.zeros(*images.shape[:-2], height + 1, width + 3, device=images.device)
    chosen = torch.zeros_like(images, dtype=torch.int64)
    for step in range(width + 2 * (height - 1)):
        row = torch.arange(max(0, (step - width + 2) // 2), min(height, step // 2 + 1), device=images.device)
        column = step - 2 * row
        # padded: errors[row + 1, column + 2] is the pixel's own
        value = scaled[..., row, column] + errors[..., row + 1, column + 1] * (7 / 16)
        value = value + errors[..., row, column + 3] * (3 / 16)
        value = value + errors[..., row, column + 2] * (5 / 16)
        value = value + errors[..., row, column + 1] * (1 / 16)
        level = (value * (1 / 255)).round().clamp(0, steps)
        errors[..., row + 1, column + 2] = value - level * 255
        chosen[..., row, column] = level.long()
    return chosen
