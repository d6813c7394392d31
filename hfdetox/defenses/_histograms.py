"""Histograms of many channels at once, how far they are apart, and the bound that brings one nearest to another."""

import math
from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def histograms(values: torch.Tensor, low: float, width: float, bins: int) -> torch.Tensor:
    """Return the counts (C×bins, int64) of each row of `values` (C×M) in bins of `width` from `low`, ends open."""
    places = ((values - low) / width).floor().clamp(0, bins - 1).long()
    rows = torch.arange(len(values), device=values.device)[:, None] * bins
    return torch.bincount((rows + places).flatten(), minlength=len(values) * bins).view(len(values), bins)


def total_variation(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return |p − q| of counts, bin by bin."""
    return (seen - wanted).abs()


def kullback_leibler(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return p log(p / q) of counts with equal sums, bin by bin; an empty bin of q counts as one with one value."""
    return torch.xlogy(seen, seen / wanted.clamp_min(1))


def jensen_shannon(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return ½ (p log(p / m) + q log(q / m)), m = (p + q) / 2, of counts with equal sums, bin by bin."""
    middle = ((seen + wanted) / 2).clamp_min(0.5)
    return (torch.xlogy(seen, seen / middle) + torch.xlogy(wanted, wanted / middle)) / 2


DIVERGENCES = {"total-variation": total_variation, "js": jensen_shannon, "kl": kullback_leibler}


def best_bound(seen: torch.Tensor, wanted: torch.Tensor, low: float, width: float,
               apart: Divergence = total_variation) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the bounds u (C) whose min(z, u) has the histogram nearest to the wanted one, and how far they are.

    Candidates are the bins' centres, and ∞ for the last, open bin. Often several are equally near, for to gather what
    lies beyond the reference leaves Σ|count| as it is; of these the lowest is taken, which bounds at all. A bound in
    bin b moves all that lies above into b: Σ_{j<b} d(seen_j, wanted_j) + d(Σ_{j≥b} seen_j, wanted_b)
    + Σ_{j>b} d(0, wanted_j).

    Args:
        seen: counts of z (C×B), and `wanted` of the reference, in the bins of `histograms`.
        apart: d, a bin's part of a divergence of counts.
    """
    each, emptied = apart(seen, wanted), apart(torch.zeros_like(seen), wanted)
    below = each.cumsum(1) - each
    above = emptied.flip(1).cumsum(1).flip(1) - emptied
    gathered = seen.flip(1).cumsum(1).flip(1)
    distance = below + apart(gathered, wanted) + above
    last = seen.shape[1] - 1
    place = distance.argmin(1)
    bound = torch.where(place == last, math.inf, low + (place.double() + 0.5) * width)
    return bound, distance.gather(1, place[:, None]).squeeze(1)
