"""Maximum margin (MM-BD): how far above all others a class's logit can be driven, without any image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfdetox.errors import UsageError
from hfdetox.evidence.base import Score, Suspect, outlier
from hfdetox.evidence.results import ScoreResult

_STARTS, _STEPS, _RATE, _STILL = 30, 300, 0.01, 1e-5
# of more classes the search takes hours
_MOST = 100


@dataclass(frozen=True)
class Margin(Score):
    """How far the largest margin of one class stands out among those of the classes.

      r_k = max over 30 starts x ~ U[0,1] of  z_k − max_{j≠k} z_j,  ascended by up to 300 steps of SGD (rate 0.01)
      statistic = max_k (r_k − median) / (1.4826 · MAD)

    The ascent of a start ends when its margin changes by less than 1e-5 of itself. The note has MM-BD's own p-value:
    p = 1 − F(max r)^K, F a gamma distribution fitted to the other classes' r; with ten classes it is fitted to nine
    points, badly. MM-BD (IEEE S&P 2024).

    It needs no image. It costs the most: 18,000 passes a class. It misses backdoors whose trigger depends on the image,
    and clean models with one class that looks like noise are accused.
    """

    name = "margin"
    summary = "the largest margin that images made for a class reach"
    paper = "IEEE S&P 2024 (MM-BD)"
    cost = "up to 18,000 image passes a class"
    needs_images = False
    thorough = True

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        if not suspect.has_grey_levels:
            raise UsageError("needs a model of images in grey levels, and the model's own callable takes floats")
        if suspect.classes > _MOST:
            raise UsageError(f"left out: {suspect.classes} classes would take "
                             f"{2 * _STARTS * _STEPS * suspect.classes:,} image passes")  # fmt: skip
        found = [self._largest(suspect, label) for label in range(suspect.classes)]
        margins = torch.tensor([margin for margin, _ in found])
        result = outlier(margins, low=False, passes=sum(passes for _, passes in found))
        return ScoreResult(result.values, result.statistic, result.accused, passes=result.passes,
                           note=f"p = {p_value(margins):.3g} by MM-BD's gamma fit")  # fmt: skip

    def _largest(self, suspect: Suspect, label: int) -> tuple[float, int]:
        """Return a class's largest margin, and the image passes that took."""
        size = suspect.network.input_size
        x = torch.rand(_STARTS, *size, generator=suspect.generator(3 + label)).to(suspect.accelerator.device)
        best, last, passes = x.new_full((_STARTS,), -torch.inf), x.new_zeros(_STARTS), 0
        moving = torch.arange(_STARTS, device=x.device)
        for _ in range(_STEPS):
            now = x[moving].requires_grad_()
            with torch.enable_grad():
                margins = _margins(suspect, now, label)
                slope = torch.autograd.grad(margins.sum(), now)[0]
            passes += 2 * len(moving)
            margins = margins.detach()
            best[moving] = best[moving].maximum(margins)
            still = (margins - last[moving]).abs() < _STILL * last[moving].abs()
            last[moving] = margins
            x[moving] = now.detach() + _RATE * slope
            moving = moving[~still]
            if not len(moving):
                break
        return float(best.max()), passes


def _margins(suspect: Suspect, x: Tensor, label: int) -> Tensor:
    logits = suspect.network(255 * x.clamp(0, 1)).float()
    others = logits.index_fill(1, torch.tensor([label], device=x.device), -torch.inf)
    return logits[:, label] - others.amax(1)


def p_value(margins: Tensor) -> float:
    """Return MM-BD's p-value, 1 − F(max r)^K, F the gamma distribution fitted to all but the largest of K margins."""
    # a second to import, and for this alone
    from scipy.stats import gamma

    ordered = margins.double().sort().values.numpy()
    shape, place, scale = gamma.fit(ordered[:-1])
    return float(1 - gamma.cdf(ordered[-1], shape, place, scale) ** len(ordered))
