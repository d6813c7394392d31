"""BadNets: a patch of fixed pixels (Gu et al., arXiv 1708.06733)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger, grow, resize_picture
from hfdetox.values import Interval, NonNegativeInt, PositiveInt


@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets(Trigger):
    """Overwrite a square with a constant, with a checkerboard or with a picture.

    Lengths are pixels of an image 32 pixels high and scale with the image's height H: the side is
    max(1, round(size · H / 32)), the distances round(right · H / 32) and round(bottom · H / 32).

    Attributes:
        pattern: `square` has one grey level; `grid` is a checkerboard of `size`×`size` fields, 255 and 1 in turn, white
            at the lower right. Grown fields take the value at each pixel's centre, so that no grey comes in.
        size: side of the square, at least 1.
        value: grey level of the square, 0 to 255, in every channel; unused with a grid or a picture.
        right: distance from the image's right edge.
        bottom: distance from the image's lower edge.
        image: a picture (uint8, C×h×w) that fills the square instead of `value`; not with a grid.
    """

    kind = "badnets"
    summary = "a square patch of one grey level, a checkerboard (badnets:grid) or a picture"
    paper = "arXiv 1708.06733"

    pattern: Literal["square", "grid"] = "square"
    size: PositiveInt = 3
    value: Annotated[int, Interval("[0, 255]")] = 255
    right: NonNegativeInt = 0
    bottom: NonNegativeInt = 0
    image: torch.Tensor | None = field(default=None, metadata={"tensor": "picture"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "grid" and self.image is not None:
            raise UsageError("badnets: a patch is a grid or a picture; leave out pattern=grid or image=…")

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        scale = height / 32
        side = max(1, round(self.size * scale))
        below, beside = height - round(self.bottom * scale), width - round(self.right * scale)
        if below - side < 0 or beside - side < 0:
            raise UsageError(f"badnets: a patch of {side} pixels at this place does not fit an image of "
                             f"{width}×{height}")  # fmt: skip
        stamped = images.clone()
        square = stamped[..., below - side : below, beside - side : beside]
        if self.image is None and self.pattern == "square":
            square.fill_(self.value)
        else:
            key = (images.shape[-3], side, images.device)
            square.copy_(self.remember(key, lambda: self._patch(side, images)))
        return stamped

    def _patch(self, side: int, images: torch.Tensor) -> torch.Tensor:
        """Return the picture, or the grid, at `side`×`side`: uint8, for `images` and on their device."""
        if self.image is not None:
            return resize_picture(self.image, side, side, images)
        places = torch.arange(self.size - 1, -1, -1)
        black = ((places[:, None] + places) % 2).float()
        # 1 and not 0: in masks of the original code zero means "not part of the patch"
        return torch.where(grow(black, side, side) > 0, 1, 255).to(images.device, torch.uint8)
