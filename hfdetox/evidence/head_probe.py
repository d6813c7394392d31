"""Head probe: which class the head gives to random features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hfdetox.errors import UsageError
from hfdetox.evidence.base import MIN_CLASSES, Score, Suspect
from hfdetox.evidence.results import ScoreResult

_DRAWS, _BLOCK = 10_000, 2**24


@dataclass(frozen=True)
class HeadProbe(Score):
    """The log odds of the largest share that one class has of 10,000 random features.

      p_k = share of draws z with argmax_j w_jᵀz + b_j = k,  statistic = max_k log(p_k / (1 − p_k))

    The draws are z ~ N(μ, σ²) with mean and variance of each feature over the clean images, and z ~ |N(0, 1)|; the
    larger statistic of the two counts. Without images the second is left. After HTell (arXiv 2605.18908), whose exact
    formula we could not read; the outlier by the MAD of the shares that it speaks of grows without bound where most
    classes get no draw, as with many classes, and the log odds do not.

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
        if suspect.classes < MIN_CLASSES:
            raise UsageError(f"{suspect.classes} classes are too few to tell one that stands out")
        features = torch.cat([head.features for head in suspect.heads], 1)
        weight = torch.cat([head.weight for head in suspect.heads], 1)
        bias = torch.stack([head.bias for head in suspect.heads]).sum(0)
        generator = suspect.generator(1)
        found = [self._shares(torch.randn(_DRAWS, weight.shape[1], generator=generator).abs(), weight, bias)]
        if len(features) > 1:
            noise = torch.randn(_DRAWS, weight.shape[1], generator=generator)
            found.append(self._shares(features.mean(0) + features.std(0) * noise, weight, bias))
        shares = max(found, key=lambda one: float(one.amax()))
        most = min(float(shares.amax()), 1 - 0.5 / _DRAWS)
        return ScoreResult(shares.tolist(), math.log(most / (1 - most)), int(shares.argmax()))

    def _shares(self, draws: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts = draws.split(max(1, _BLOCK // len(weight)))
        answers = torch.cat([(part @ weight.T + bias).argmax(1) for part in parts])
        return torch.bincount(answers, minlength=len(weight)) / len(answers)
