"""Head probe: which class the head gives to random features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hfdetox.evidence.base import Score, Suspect, outlier
from hfdetox.evidence.results import ScoreResult

_DRAWS, _BLOCK = 10_000, 2**24


@dataclass(frozen=True)
class HeadProbe(Score):
    """How far one class's share of 10,000 random features stands out among the classes' shares.

      p_k = share of draws z with argmax_j w_jᵀz + b_j = k,  statistic = max_k (p_k − median) / (1.4826 · MAD)

    The draws are z ~ N(μ, σ²) with mean and variance of each feature over the clean images, and z ~ |N(0, 1)|; the
    larger statistic of the two counts. Without images the second is left. After HTell (arXiv 2605.18908), whose exact
    formula we could not read.

    It sees the head alone: a backdoor that lies in the layers before it is missed, and so is every one after D3, which
    draws the head anew.
    """

    name = "head-probe"
    summary = "the share of random features that the head gives to a class"
    paper = "after arXiv 2605.18908"
    cost = "10,000 products with the head; one pass over the clean images, which latent-shift takes too"
    when: ClassVar[Literal["before", "after", "both"]] = "before"
    needs_images = False

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        features = torch.cat([head.features for head in suspect.heads], 1)
        weight = torch.cat([head.weight for head in suspect.heads], 1)
        bias = torch.stack([head.bias for head in suspect.heads]).sum(0)
        generator = suspect.generator(1)
        found = [self._shares(torch.randn(_DRAWS, weight.shape[1], generator=generator).abs(), weight, bias)]
        if len(features) > 1:
            noise = torch.randn(_DRAWS, weight.shape[1], generator=generator)
            found.append(self._shares(features.mean(0) + features.std(0) * noise, weight, bias))
        results = [outlier(shares, low=False) for shares in found]
        return max(results, key=lambda one: one.statistic or 0.0)

    def _shares(self, draws: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts = draws.split(max(1, _BLOCK // len(weight)))
        answers = torch.cat([(part @ weight.T + bias).argmax(1) for part in parts])
        return torch.bincount(answers, minlength=len(weight)) / len(answers)
