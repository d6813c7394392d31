"""FTrojan: two DCT coefficients of the colour in every block (Wang et al., arXiv 2111.10991)."""

from dataclasses import dataclass
from typing import Final

import torch

from hfdetox.triggers._spectrum import YCRCB, ColourWave, dct_waves

BLOCK: Final = 32
POSITIONS: Final = ((15, 15), (31, 31))


@dataclass(frozen=True, kw_only=True, eq=False)
class FTrojan(ColourWave):
    """Add `magnitude` to the coefficients (15, 15) and (31, 31) of Cr and Cb, in the DCT of each 32×32 block.

    Blocks start at the upper left corner; those cut by the right or lower edge carry the part inside the image. The
    result is clipped and truncated to whole grey levels (the authors' code lets it wrap around).

    Attributes:
        magnitude: what is added to each coefficient of the orthonormal DCT, above 0; 30 is a wave of ±1.9 levels.
    """

    kind = "ftrojan"
    summary = "two waves in the colour of each 32×32 block"
    paper = "arXiv 2111.10991"
    matrix = YCRCB

    magnitude: float = 30.0

    def wave(self, height: int, width: int) -> torch.Tensor:
        block = self.magnitude * dct_waves(POSITIONS, BLOCK, BLOCK)
        return block.repeat(-(-height // BLOCK), -(-width // BLOCK))[:height, :width]
