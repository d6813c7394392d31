"""SIG: a horizontal sinusoid added to the image (Barni et al., arXiv 1902.11237)."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from hfdetox.triggers.base import Additive
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Sig(Additive):
    """T(x)[i, j, c] = clip(x + Δ·sin(2π·j·f / W)), truncated to whole grey levels: the same in all rows and channels.

    Attributes:
        delta: amplitude Δ of the wave in grey levels, above 0 and at most 255.
        frequency: periods f over the image's width, above 0 and at most 10000; the wave is thus the same at every size.
    """

    kind = "sig"
    summary = "a sinusoid along the width, the same in all rows"
    paper = "arXiv 1902.11237"

    delta: Annotated[float, Interval("(0, 255]")] = 40.0
    frequency: Annotated[float, Interval("(0, 10000]")] = 6.0

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * self.frequency / width * columns)
        return wave.expand(channels, height, width)
