"""BadNets: a patch of fixed pixels (Gu et al., arXiv 1708.06733)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger, resize_picture


@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets(Trigger):
    """Overwrite a square with a constant, or with a picture.

    Lengths are pixels of an image 32 pixels high and scale with the image's height H: the side is
    max(1, round(size · H / 32)), the distances round(right · H / 32) and round(bottom · H / 32).

    Attributes:
        size: side of the square, at least 1.
        value: grey level of the square, 0 to 255, in every channel; unused with a picture.
        right: distance from the image's right edge.
        bottom: distance from the image's lower edge.
        image: a picture (uint8, C×h×w) that fills the square instead of `value`.
    """

    kind: ClassVar[str] = "badnets"
    summary: ClassVar[str] = "a square patch of one grey level, or of a picture"
    paper: ClassVar[str] = "arXiv 1708.06733"

    size: int = 3
    value: int = 255
    right: int = 0
    bottom: int = 0
    image: torch.Tensor | None = field(default=None, metadata={"tensor": "picture"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.right < 0 or self.bottom < 0 or not 0 <= self.value <= 255:
            raise UsageError("badnets: size must be at least 1, right and bottom at least 0, value in 0 to 255")

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        scale = height / 32
        side = max(1, round(self.size * scale))
        below, beside = height - round(self.bottom * scale), width - round(self.right * scale)
        if below - side < 0 or beside - side < 0:
            raise UsageError(
                f"badnets: a patch of {side} pixels at this place does not fit an image of {width}×{height}"
            )
        stamped = images.clone()
        square = stamped[..., below - side : below, beside - side : beside]
        if self.image is None:
            square.fill_(self.value)
        else:
            square.copy_(resize_picture(self.image, side, side, images))
        return stamped
