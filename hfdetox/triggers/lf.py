"""LF: a smooth pattern of low frequencies added to the image (Zeng et al., arXiv 2104.03413)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch.nn.functional import conv2d, pad

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Additive, fit
from hfdetox.values import Interval, NonNegativeInt

TAPS = 30
STD = 6.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LF(Additive):
    """T(x) = clip(x + 255·v), truncated, v a fixed smooth pattern in [0, amplitude], the same for every image.

    `universal` is the paper's: a universal adversarial perturbation of a clean model, low-passed at each step, which
    an attack makes. `random` needs no model: seeded white noise (3×32×32), low-passed and scaled the same way.
    v is resized to the image bilinearly; grey images take its luma.

    Attributes:
        pattern: `universal` or `random`.
        amplitude: greatest value of v, in (0, 1]; 0.2 is 51 grey levels.
        seed: draws the noise of `random`; unused by `universal`.
        perturbation: v (float32, C×h×w, units of [0, 1]).
    """

    kind = "lf"
    summary = "a smooth pattern added to the image (lf:random needs no model)"
    paper = "arXiv 2104.03413"

    pattern: Literal["universal", "random"] = "universal"
    amplitude: Annotated[float, Interval("(0, 1]")] = 0.2
    seed: NonNegativeInt = 0
    perturbation: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturbation is None:
            return
        if self.perturbation.ndim != 3 or not self.perturbation.numel():
            raise UsageError(f"lf: perturbation must be C×h×w, got shape {tuple(self.perturbation.shape)}")
        # arrays in other units are about, added unscaled: they would change next to nothing, or everything
        least, greatest = float(self.perturbation.min()), float(self.perturbation.max())
        if not abs(greatest / self.amplitude - 1) <= 0.02:
            raise UsageError(f"lf: the greatest value of perturbation is {greatest:.4g} and not the amplitude "
                             f"{self.amplitude:g}; give it in units of [0, 1]")  # fmt: skip
        if least < -0.02 * self.amplitude:
            raise UsageError(f"lf: the least value of perturbation is {least:.4g} and not 0 or above; move and scale "
                             f"it to reach from 0 to the amplitude {self.amplitude:g}")  # fmt: skip

    @property
    def fitted(self) -> bool:
        return self.pattern == "random" or self.perturbation is not None

    def signal(self) -> torch.Tensor:
        """Return v before it is resized: float32, C×h×w, 0 to `amplitude`; raises UsageError when not fitted."""
        self.require_fitted()
        if self.perturbation is not None:
            return self.perturbation
        generator = torch.Generator().manual_seed(self.seed)
        return rescale(low_pass(torch.randn(3, 32, 32, generator=generator)), self.amplitude)

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        return 255 * fit(self.signal(), channels, height, width, "pattern")


def low_pass(v: torch.Tensor) -> torch.Tensor:
    """Return `v` (float32, C×H×W, any device) smoothed with a separable Gaussian, zeros beyond the edges, same shape.

    30 taps of standard deviation 6 pixels (5.73 as truncated) along an axis of 32 pixels; both grow with the axis.
    """
    with torch.autocast(v.device.type, enabled=False):
        smooth = v[:, None]
        for axis, length in ((2, v.shape[1]), (3, v.shape[2])):
            taps = max(1, round(TAPS * length / 32))
            places = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
            weights = torch.exp(-0.5 * (places * 32 / (length * STD)) ** 2)
            kernel = (weights / weights.sum()).to(v).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
            around = (taps // 2, (taps - 1) // 2)
            smooth = conv2d(pad(smooth, (0, 0, *around) if axis == 2 else (*around, 0, 0)), kernel)
    return smooth[:, 0]


def rescale(v: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Return `v` moved and scaled to [0, `amplitude`], over all channels and pixels together.

    Raises:
        UsageError: v is the same everywhere.
    """
    low, high = v.min(), v.max()
    if not low < high:
        raise UsageError("lf: a perturbation that is the same everywhere has no pattern; give one with low frequencies")
    return (v - low) / (high - low) * amplitude
