"""CTRL: two DCT coefficients of the whole image's colour (Li et al., arXiv 2210.07346)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers._additive import Additive
from hfdetox.triggers._spectrum import YUV, dct_waves, in_colour_differences, require_colour

POSITIONS: Final = (15, 31)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ctrl(Additive):
    """Add `magnitude` to the coefficients (15, 15) and (31, 31) of U and V, in the DCT of the whole image.

    At another size H×W the positions are round(p·H / 32) and round(p·W / 32), so that the waves keep their share of the
    image, and the magnitude is scaled by √(H·W) / 32, so that they keep their amplitude.

    Attributes:
        magnitude: what is added to each coefficient of the orthonormal DCT of a 32×32 image, above 0.
    """

    kind = "ctrl"
    summary = "two waves in the colour of the whole image"
    paper = "arXiv 2210.07346"

    magnitude: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.magnitude <= 10_000:
            raise UsageError("ctrl: magnitude must be above 0 and at most 10000")

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        require_colour(self, channels)
        positions = [(_scaled(place, height), _scaled(place, width)) for place in POSITIONS]
        magnitude = self.magnitude * math.sqrt(height * width) / 32
        return in_colour_differences(magnitude * dct_waves(positions, height, width), YUV)


def _scaled(position: int, length: int) -> int:
    # images of fewer than 16 pixels have no frequency that high
    return min(round(position * length / 32), length - 1)
