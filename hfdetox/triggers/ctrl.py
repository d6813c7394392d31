"""CTRL: two DCT coefficients of the whole image's colour (Li et al., arXiv 2210.07346)."""

import math
from dataclasses import dataclass
from typing import Final

import torch

from hfdetox.triggers._spectrum import YUV, ColourWave, dct_waves

POSITIONS: Final = (15, 31)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ctrl(ColourWave):
    """Add `magnitude` to the coefficients (15, 15) and (31, 31) of U and V, in the DCT of the whole image.

    At another size H×W the positions are round(p·H / 32) and round(p·W / 32), so that the waves keep their share of the
    image, and the magnitude is scaled by √(H·W) / 32, so that they keep their amplitude.

    Attributes:
        magnitude: what is added to each coefficient of the orthonormal DCT of a 32×32 image, above 0.
    """

    kind = "ctrl"
    summary = "two waves in the colour of the whole image"
    paper = "arXiv 2210.07346"
    matrix = YUV

    magnitude: float = 100.0

    def wave(self, height: int, width: int) -> torch.Tensor:
        # images of fewer than 16 pixels have no frequency that high
        places = ([min(round(p * length / 32), length - 1) for p in POSITIONS] for length in (height, width))
        magnitude = self.magnitude * math.sqrt(height * width) / 32
        return magnitude * dct_waves(list(zip(*places, strict=True)), height, width)
