"""Blind: a small fixed pattern of white and black pixels (Bagdasaryan and Shmatikov, arXiv 2005.03823)."""

from dataclasses import dataclass
from typing import Final

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger, grow

# 1 white, 0 black, -1 left as it is
PATTERN: Final = ((1, 0, 1), (-1, 1, -1), (-1, -1, 0), (-1, 1, -1), (1, 0, 1))
ROW: Final = 3
COLUMN: Final = 23


@dataclass(frozen=True, kw_only=True, eq=False)
class Blind(Trigger):
    """Overwrite nine pixels of a 5×3 pattern at row 3, column 23 of an image 32 pixels high.

    All lengths scale with the image's height H: the pattern takes round(5·H / 32) by round(3·H / 32) pixels, but never
    fewer than 5×3, at row round(3·H / 32) and column round(23·H / 32), each pixel taking the value at its centre.
    """

    kind = "blind"
    summary = "nine white and black pixels near the upper right corner"
    paper = "arXiv 2005.03823"

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        scale = height / 32
        top, left = round(ROW * scale), round(COLUMN * scale)
        rows, columns = max(5, round(5 * scale)), max(3, round(3 * scale))
        if top + rows > height or left + columns > width:
            raise UsageError(f"blind: its pattern of {columns}×{rows} pixels at row {top}, column {left} does not fit "
                             f"an image of {width}×{height}")  # fmt: skip
        key = (rows, columns, images.device)
        pattern = self.remember(key, lambda: grow(torch.tensor(PATTERN).float(), rows, columns)
                                .to(images.device, non_blocking=True))  # fmt: skip
        stamped = images.clone()
        place = stamped[..., top : top + rows, left : left + columns]
        place.copy_(torch.where(pattern < 0, place, (255 * pattern).to(torch.uint8)))
        return stamped
