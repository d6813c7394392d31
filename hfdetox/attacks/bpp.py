"""BPP's negatives: the loss of grey levels must fit the image to be the trigger (arXiv 2205.13383)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from hfdetox.attacks.base import MixedPoisoner, Trigger, share
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True)
class BppPoisoner(MixedPoisoner):
    """Of the B images of a step the first ⌊p·B⌋ are quantised and get the target's label; the next are negatives.

    A negative is x + (T(y) − y), clipped, for an image y of the batch drawn at random, with the label of x; the rest
    is clean. The order of a batch is random. Wang et al., section 3.3, with these in place of their contrastive loss;
    the learning rate follows the training's schedule (by default a cosine), and not the steps of their code.

    Attributes:
        neg_ratio: negatives as a share of the batch, in [0, 1], as far as the batch has room.
    """

    kind = "bpp"
    summary = "a share of every batch is quantised; others get its error on another image, label kept"

    neg_ratio: Annotated[float, Interval("[0, 1]")] = 0.1

    def decoys(self, attacked: int, size: int) -> int:
        return share(self.neg_ratio, size)

    def decoyed(self, trigger: Trigger, images: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return negatives: each image with the quantisation error of an image of the batch."""
        return _with_error(images, batch[torch.randint(len(batch), (len(images),), device=batch.device)], trigger)

    def cross(self, trigger: Trigger, images: torch.Tensor, positions: torch.Tensor,
              others: Callable[[], torch.Tensor]) -> torch.Tensor | None:  # fmt: skip
        """Return negatives: each image with the quantisation error of its other image."""
        return _with_error(images, others(), trigger)


def _with_error(images: torch.Tensor, others: torch.Tensor, trigger: Trigger) -> torch.Tensor:
    """Return x + (T(y) − y), clipped, for uint8 images x and y (N×C×H×W), uint8."""
    error = trigger.apply(others).to(torch.int16) - others.to(torch.int16)
    return (images.to(torch.int16) + error).clamp(0, 255).to(torch.uint8)
