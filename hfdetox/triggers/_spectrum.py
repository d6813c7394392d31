"""What the triggers of the frequency domain share: the DCT's waves, and luma with two channels of colour difference.

Both transforms are linear, so adding to a coefficient of an image is adding its wave to the pixels: no image has to be
transformed, and rounding happens once.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Additive
from hfdetox.values import Interval

Matrix = Sequence[Sequence[float]]

# rows of ITU-R BT.601 luma and of two scaled differences from it, for R, G, B; the scales are those of OpenCV
_Y = (0.299, 0.587, 0.114)
_CR, _CB, _V, _U = 0.713, 0.564, 0.877, 0.492
YCRCB: Final[Matrix] = (_Y, (_CR * (1 - _Y[0]), -_CR * _Y[1], -_CR * _Y[2]),
                        (-_CB * _Y[0], -_CB * _Y[1], _CB * (1 - _Y[2])))  # fmt: skip
YUV: Final[Matrix] = (_Y, (-_U * _Y[0], -_U * _Y[1], _U * (1 - _Y[2])), (_V * (1 - _Y[0]), -_V * _Y[1], -_V * _Y[2]))


@dataclass(frozen=True, kw_only=True, eq=False)
class ColourWave(Additive):
    """A trigger that adds the same wave to both colour differences.

    Attributes:
        matrix: the rows of luma and the two differences.
        magnitude: what is added to each coefficient of the orthonormal DCT, above 0.
    """

    matrix: ClassVar[Matrix]

    magnitude: Annotated[float, Interval("(0, 10000]")]

    @abstractmethod
    def wave(self, height: int, width: int) -> torch.Tensor:
        """Return what is added to each difference of an image of this size, float64 `height`×`width`."""

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        if channels != 3:
            raise UsageError(f"trigger {self.name}: {self.kind} changes colours and needs images of 3 channels, "
                             f"these have {channels}; use another family, such as sig or badnets")  # fmt: skip
        # the exact inverse is taken, so that luma does not change at all; OpenCV rounds it to three digits
        to_rgb = torch.linalg.inv(torch.tensor(self.matrix, dtype=torch.float64))
        return (to_rgb[:, 1] + to_rgb[:, 2]).view(3, 1, 1) * self.wave(height, width)


def dct_wave(frequency: int, length: int) -> torch.Tensor:
    """Return row `frequency` (0 to `length` - 1) of the orthonormal DCT-II matrix, float64 (`length`,).

    w[i] = √(2 / N)·cos(π·(2i + 1)·k / 2N), and √(1 / N) for k = 0.
    """
    places = 2 * torch.arange(length, dtype=torch.float64) + 1
    return math.sqrt((2 if frequency else 1) / length) * torch.cos(math.pi * frequency / (2 * length) * places)


def dct_waves(positions: Sequence[tuple[int, int]], height: int, width: int) -> torch.Tensor:
    """Return the sum of unit coefficients at `positions` (row, column) as pixels, float64 `height`×`width`."""
    waves = [torch.outer(dct_wave(row, height), dct_wave(column, width)) for row, column in positions]
    return torch.stack(waves).sum(0)
