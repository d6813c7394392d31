"""WaNet: a smooth warp of the whole image (Nguyen and Tran, arXiv 2102.10369)."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch.nn.functional import grid_sample, interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger
from hfdetox.values import Interval, NonNegativeInt


@dataclass(frozen=True, kw_only=True, eq=False)
class WaNet(Trigger):
    """T(x) = x sampled at g = clamp(identity + s·n / 32, −1, 1), bilinearly, in coordinates of [−1, 1] per axis.

    n is a k×k field of uniform displacements in [−1, 1] for each axis, divided by its mean size and raised to H×W by
    bicubic interpolation. At 32×32 this is the paper's s·n / H; at other sizes s grows to s·H / 32, so that the warp
    stays the same share of the image: a mean of some 0.19 pixels per axis of 32. The result is rounded.

    Attributes:
        k: points of the displacement field along each axis, 2 to 256.
        s: strength, above 0 and at most 1000; at 64 the mean displacement is the whole image.
        seed: draws the field.
        noise: the field itself (float32, 2×k×k: along x, along y) before the division; replaces the drawn one.
    """

    kind = "wanet"
    summary = "a smooth warp of the whole image, less than a pixel at 32×32"
    paper = "arXiv 2102.10369"

    k: Annotated[int, Interval("[2, 256]")] = 4
    s: Annotated[float, Interval("(0, 1000]")] = 0.5
    seed: NonNegativeInt = 0
    noise: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = (2, self.k, self.k)
        if self.noise is not None and self.noise.shape != wanted:
            raise UsageError(f"wanet: noise must be of shape {wanted} for k={self.k}, got {tuple(self.noise.shape)}")
        if self.noise is not None and not self.noise.any():
            raise UsageError("wanet: noise is all zeros and would move no pixel; give other displacements")

    def field_noise(self) -> torch.Tensor:
        """Return the displacements before the division by their mean size: float32, 2×k×k, on the CPU."""
        if self.noise is not None:
            return self.noise.cpu()
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(2, self.k, self.k, generator=generator) * 2 - 1

    def grid(self, height: int, width: int) -> torch.Tensor:
        """Return g: where each pixel is taken from, float32, H×W×2 with (x, y) last, on the CPU."""
        noise = self.field_noise()
        smooth = interpolate((noise / noise.abs().mean())[None], (height, width), mode="bicubic", align_corners=True)[0]
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        return (identity + self.s * smooth.permute(1, 2, 0) / 32).clamp(-1, 1)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return _sampled(images, self._grid_on(images).expand(len(images), -1, -1, -1))

    @torch.no_grad()
    def noisy(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return `images` (uint8, N×C×H×W) warped at g' = clamp(g + u, −1, 1): the paper's noise mode.

        u is fresh for every image and pixel, uniform in ±1/W along x and ±1/H along y: up to half a pixel. A model
        must keep the true label of such images; it is drawn from `generator`, or from the images' device's own one.
        """
        height, width = images.shape[-2:]
        device = images.device if generator is None else generator.device
        drawn = torch.rand(len(images), height, width, 2, generator=generator, device=device).to(images.device) * 2 - 1
        sides = self.remember(("sides", height, width, images.device), lambda: torch.tensor([width, height])
                              .to(images.device, non_blocking=True))  # fmt: skip
        return _sampled(images, (self._grid_on(images) + drawn / sides).clamp(-1, 1))

    def _grid_on(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        key = (height, width, images.device)
        return self.remember(key, lambda: self.grid(height, width).to(images.device, non_blocking=True))


@torch.no_grad()
def _sampled(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return uint8 `images` sampled at `grid` (N×H×W×2), rounded to whole grey levels."""
    with torch.autocast(images.device.type, enabled=False):
        sampled = grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)
