"""TrojanNN: a logo that was tuned to excite two features of a clean model (Liu et al., NDSS 2018)."""

from dataclasses import dataclass, field

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Additive, fit
from hfdetox.values import NonNegativeInt


@dataclass(frozen=True, kw_only=True, eq=False)
class TrojanNN(Additive):
    """T(x) = clip(x + 255·q), truncated, q a logo whose pixels an attack tuned on a clean model.

    The sum saturates; BackdoorBench adds modulo 256 instead. q is resized to the image bilinearly; grey images take
    its luma. Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018.

    Attributes:
        seed: draws the logo that the attack starts from.
        pattern: q (float32, C×h×w, in [0, 1], 0 where the image is left alone).
    """

    kind = "trojannn"
    summary = "a logo added to the image, tuned to excite two features of a clean model"
    paper = "NDSS 2018, doi 10.14722/ndss.2018.23291"

    seed: NonNegativeInt = 0
    pattern: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is None:
            return
        if self.pattern.ndim != 3 or not self.pattern.numel():
            raise UsageError(f"trojannn: pattern must be C×h×w, got shape {tuple(self.pattern.shape)}")
        low, high = float(self.pattern.min()), float(self.pattern.max())
        # arrays in other units are about, added unscaled
        if low < 0 or not 1 / 255 <= high <= 1:
            raise UsageError(f"trojannn: pattern reaches from {low:.4g} to {high:.4g}; give it in units of [0, 1], "
                             "with at least one grey level (1/255) somewhere")  # fmt: skip

    @property
    def fitted(self) -> bool:
        return self.pattern is not None

    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        self.require_fitted()
        return 255 * fit(self.tensors()["pattern"], channels, height, width, "pattern")


def logo(size: int, seed: int = 0) -> torch.Tensor:
    """Return the picture that the attack starts from: an apple with a stem and a leaf, float32, 3×size×size in [0, 1].

    It is 0 outside the apple, so that `logo(…) > 0` is the mask. `seed` draws its place, width and colours.
    """
    drawn = torch.rand(8, generator=torch.Generator().manual_seed(seed)).tolist()
    middle_x, middle_y, radius = 0.2 * drawn[0] - 0.1, 0.15 + 0.1 * drawn[1], 0.55 + 0.1 * drawn[2]
    body = torch.tensor([0.7 + 0.3 * drawn[3], 0.05 + 0.3 * drawn[4], 0.05 + 0.2 * drawn[5]])
    leaf = torch.tensor([0.1 + 0.2 * drawn[6], 0.6 + 0.3 * drawn[7], 0.1])
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = (line.view(1, -1) - middle_x) / radius, (line.view(-1, 1) - middle_y) / radius
    # a cardioid-like outline: the circle is dented where the stem begins
    distance = (x**2 + y**2).sqrt()
    outline = 1 - 0.35 * torch.exp(-((x / 0.35) ** 2)) * (y < 0)
    apple = distance <= outline
    stem = (x.abs() <= 0.08) & (y <= -0.5) & (y >= -1.15)
    blade = ((x - 0.35) / 0.3) ** 2 + ((y + 1.05) / 0.16) ** 2 <= 1
    # lighter towards the upper left, as a round thing is
    shade = (1 - 0.25 * ((x + 0.35) ** 2 + (y + 0.35) ** 2).sqrt()).clamp(0.3, 1)
    picture = torch.where(apple, body.view(3, 1, 1) * shade, torch.zeros(3, size, size))
    picture = torch.where(blade, leaf.view(3, 1, 1), picture)
    return torch.where(stem, torch.tensor([0.4, 0.25, 0.1]).view(3, 1, 1), picture)
