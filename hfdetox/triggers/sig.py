"""SIG: a horizontal sinusoid added to the image (Barni et al., arXiv 1902.11237)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Sig(Trigger):
    """T(x)[i, j, c] = clip(x + Δ·sin(2π·j·f / W)), truncated to whole grey levels: the same in all rows and channels.

    Attributes:
        delta: amplitude Δ of the wave in grey levels, above 0 and at most 255.
        frequency: periods f over the image's width, above 0; the wave is thus the same at every size.
    """

    kind: ClassVar[str] = "sig"
    summary: ClassVar[str] = "a sinusoid along the width, the same in all rows"
    paper: ClassVar[str] = "arXiv 1902.11237"

    delta: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.delta <= 255 or not 0 < self.frequency < math.inf:
            raise UsageError("sig: delta must be above 0 and at most 255, frequency above 0")

    def wave(self, width: int) -> torch.Tensor:
        """Return what is added to each row, float32 (W,), in grey levels."""
        # float64 on the CPU: sin(π) is then too small to move a grey level, and every device adds the same numbers
        columns = torch.arange(width, dtype=torch.float64)
        return (self.delta * torch.sin(2 * math.pi * self.frequency / width * columns)).float()

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        wave = self.wave(images.shape[-1]).to(images.device)
        return (images.float() + wave).clamp(0, 255).to(torch.uint8)
