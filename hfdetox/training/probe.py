"""Which class the last layer of a classifier gives to random features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hfdetox.training.shift import HeadInputs

_DRAWS, _BLOCK = 10_000, 2**24
# E|N(0, 1)|
_MEAN = math.sqrt(2 / math.pi)


def probed_shares(heads: Sequence[HeadInputs], generator: torch.Generator, most: int | None = None) -> Tensor:
    """Return the share of 10,000 random features that goes to each class (K, float32); the logits of heads are added.

    The draws are z ~ |N(0, 1)| and, where there are features of images, z ~ N(μ, σ²) with mean and variance of each:
    of the two the shares whose largest is larger.

    Args:
        most: of D features, more than these, the first draws lie √(D / most) times as far from their mean, E|N(0, 1)|:
            the mean of a class's logit grows with D, and its standard deviation with √D, so that else weights that lean
            a little to one side weigh the more, the wider the network is. None leaves them.
    """
    features = torch.cat([head.features for head in heads], 1)
    weight = torch.cat([head.weight for head in heads], 1)
    bias = torch.stack([head.bias for head in heads]).sum(0)
    draws = torch.randn(_DRAWS, weight.shape[1], generator=generator).abs()
    if most is not None and weight.shape[1] > most:
        draws = _MEAN + (draws - _MEAN) * math.sqrt(weight.shape[1] / most)
    found = [_shares(draws, weight, bias)]
    if len(features) > 1:
        noise = torch.randn(_DRAWS, weight.shape[1], generator=generator)
        found.append(_shares(features.mean(0) + features.std(0) * noise, weight, bias))
    return max(found, key=lambda one: float(one.amax()))


def log_odds(shares: Tensor) -> float:
    """Return log(p / (1 − p)) of the largest share p, which counts as all but half a draw at most."""
    most = min(float(shares.amax()), 1 - 0.5 / _DRAWS)
    return math.log(most / (1 - most))


def _shares(draws: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = draws.split(max(1, _BLOCK // len(weight)))
    answers = torch.cat([(part @ weight.T + bias).argmax(1) for part in parts])
    return torch.bincount(answers, minlength=len(weight)) / len(answers)
