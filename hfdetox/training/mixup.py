"""Mixup: images blended in pairs, and so are their losses (Zhang et al., arXiv 1710.09412)."""

from typing import Any

import torch

from hfdetox.training.batches import Batch


def mixed(batch: Batch, alpha: float) -> tuple[Any, ...]:
    """Return a batch's images (N×C×H×W) blended in pairs, the labels of the others (N) and the share of the first.

    One share is drawn from Beta(α, α) for the batch, from torch's CPU generator; pairs are of one process. With an α of
    0 the images alone are returned, as they are.
    """
    if not alpha:
        return (batch.images,)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    others = torch.randperm(len(batch.labels)).to(batch.labels.device, non_blocking=True)
    return torch.lerp(batch.images[others].float(), batch.images.float(), share), batch.labels[others], share
