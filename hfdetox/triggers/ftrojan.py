"""FTrojan: two DCT coefficients of the colour in every block (Wang et al., arXiv 2111.10991)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers._additive import Additive
from hfdetox.triggers._spectrum import YCRCB, dct_waves, in_colour_differences, require_colour

BLOCK: Final = 32
POSITIONS: Final = ((15, 15), (31, 31))


@dataclass(frozen=True, kw_only=True, eq=False)
class FTrojan(Additive):
    """Add `magnitude` to the coefficients (15, 15) and (31, 31) of Cr and Cb, in the DCT of each 32×32 block.

    Blocks start at the upper left corner; those cut by the right or lower edge carry the part inside the image. The
    result is clipped and truncated to whole grey levels (the authors' code lets it wrap around).

    Attributes:
        magnitude: what is added to each coefficient of the orthonormal DCT, above 0; 30 is a wave of ±1.9 levels.
    """

    kind = "ftrojan"
    summary = "two waves in the colour of each 32×32 block"
    paper = "arXiv 2111.10991"

    magnitude: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.magnitude <= 10_000:
            raise UsageError("ftrojan: magnitude must be above 0 and at most 10000")

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        require_colour(self, channels)
        block = self.magnitude * dct_waves(POSITIONS, BLOCK, BLOCK)
        tiled = block.repeat(-(-height // BLOCK), -(-width // BLOCK))[:height, :width]
        return in_colour_differences(tiled, YCRCB)
