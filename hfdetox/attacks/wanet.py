"""WaNet's noise mode: the model learns the one warp, and to take no notice of others (arXiv 2102.10369)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hfdetox.attacks.base import MixedPoisoner, Trigger, of_kind
from hfdetox.triggers.wanet import WaNet
from hfdetox.values import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class WaNetPoisoner(MixedPoisoner):
    """Of the B images of a step the first ⌊p·B⌋ are warped and get the target's label, the next are warped by noise.

    Those are ⌊p·B⌋ · cross_ratio images, as far as the batch has them, with the warp moved at random for each image
    and pixel, and with their own label; the rest is clean. The order of a batch is random. Nguyen and Tran, section 3;
    the learning rate follows the training's schedule (by default a cosine), and not the steps of their code.

    Attributes:
        cross_ratio: noise-warped images for each warped one, at least 0.
    """

    kind = "wanet"
    summary = "a share of every batch is warped; twice as many get a random warp and keep their label"

    cross_ratio: NonNegativeFloat = 2.0

    def decoys(self, attacked: int, size: int) -> int:
        return math.floor(attacked * self.cross_ratio)

    def decoyed(self, trigger: Trigger, images: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the images in noise mode."""
        return of_kind(WaNet, trigger).noisy(images)

    def cross(self, trigger: Trigger, images: torch.Tensor, positions: torch.Tensor,
              others: Callable[[], torch.Tensor]) -> torch.Tensor | None:  # fmt: skip
        """Return the images in noise mode, each with the warp that the trigger's seed and its position draw."""
        chosen, warped = of_kind(WaNet, trigger), []
        for image, position in zip(images, positions.tolist(), strict=True):
            # drawn on the CPU, so that every device measures the same warps
            generator = torch.Generator().manual_seed((chosen.seed * 1_000_003 + position) % 2**63)
            warped.append(chosen.noisy(image[None], generator))
        return torch.cat(warped)
