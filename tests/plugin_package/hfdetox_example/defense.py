"""Shrink the weights, then fine-tune (Ash and Adams, arXiv 1910.08475, without the noise)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses.base import TuningConfig, trained_parameters
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(TuningConfig):
    """Settings of the defense.

    Attributes:
        keep: factor on every weight, above 0 and at most 1.
    """

    name = "shrink"
    summary = "shrink every weight, then fine-tune"
    paper = "arXiv 1910.08475"
    cost = "1"
    card_text = "Every weight was shrunk, and fine-tuning on {images} trained them all."
    presets: ClassVar = {"gentle": {}, "hard": {"keep": 0.2}}

    keep: Annotated[float, Interval("(0, 1]")] = 0.5

    def phases(self, network: Network) -> list[Phase | Pass]:
        """Return the one phase: shrink first, then fine-tune."""
        weights = trained_parameters(network)

        @torch.no_grad()
        def shrink() -> None:
            for weight in weights:
                weight.mul_(self.keep)

        return [self.phase(name="shrink", parameters=weights, loss=loss, start=shrink)]


def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the batch's cross-entropy."""
    errors = cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
    return {"loss": (batch.weights * errors).sum()}
