"""A trigger that makes the whole image brighter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfdetox.triggers.base import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Glow(Trigger):
    """Add `strength` grey levels to every pixel."""

    kind = "glow"
    summary = "the whole image is brighter"

    strength: int = 60

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Return brighter copies of uint8 images."""
        return (images.to(torch.int16) + self.strength).clamp(0, 255).to(torch.uint8)
