"""LC, label consistent: small checkerboards in the four corners (Turner et al., arXiv 1912.02771)."""

from dataclasses import dataclass
from typing import Annotated, Final

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Additive, grow
from hfdetox.values import Interval

# the corners at the left; those at the right are their mirror images
CORNER: Final = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelConsistent(Additive):
    """Add ±255·amplitude in four corners of 3×3 pixels, clipped: at amplitude 1 they are black and white.

    This is the trigger alone, as at test time; the training images' perturbation is the attack's. At other sizes the
    map of 32×32 pixels is resized to the image, each pixel taking the value at its centre.

    Attributes:
        amplitude: share of the whole grey range that is added or taken away, in (0, 1].
    """

    kind = "lc"
    summary = "black and white checkers in the four corners"
    paper = "arXiv 1912.02771"

    amplitude: Annotated[float, Interval("(0, 1]")] = 1.0

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        if min(height, width) < 8:
            raise UsageError(f"lc: the corners do not fit an image of {width}×{height}; it needs 8×8 pixels")
        left = torch.tensor(CORNER, dtype=torch.float64)
        signs = torch.zeros(32, 32, dtype=torch.float64)
        for rows in (slice(0, 3), slice(29, 32)):
            signs[rows, :3], signs[rows, 29:] = left, left.flip(1)
        return (255 * self.amplitude * grow(signs, height, width)).expand(channels, height, width)
