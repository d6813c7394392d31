"""Latent shift: how little must be added to the head's input until every image is of one class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfdetox.evidence.base import Score, Suspect, outlier
from hfdetox.evidence.results import ScoreResult
from hfdetox.training.shift import shifts_of_heads


@dataclass(frozen=True)
class LatentShift(Score):
    """z of ‖s_k‖ among the classes, s_k the least vector that, added to the head's input, sends every image to class k.

      s_k = argmin ½‖s‖²  s.t.  (w_k − w_j)ᵀ(s + φ_i) + b_k − b_j ≥ 0  for all images i, classes j ≠ k
      z_k = (‖s_k‖ − median) / (1.4826 · MAD),  statistic = −min_k z_k

    φ is the input of the classifier's last layer, W and b that layer. A backdoor gives the network a short way from
    everywhere to its target, which then lies far below the other classes. `hfdetox.training.shift` has the solver. The
    quadratic programme is that of TAC reconstruction (arXiv 2511.08944).

    It costs one pass over the clean images. It misses a backdoor of a head that was hardly trained, one that needs as
    long a shift as every other class, and all-to-all, which has no one target.
    """

    name = "latent-shift"
    summary = "the least shift of the features that sends every image to a class; a backdoor's target needs little"
    paper = "after arXiv 2511.08944"
    cost = "one pass over the clean images"

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        return outlier(shift_norms(suspect), low=True, passes=len(suspect.heads[0].features))


def shift_norms(suspect: Suspect) -> torch.Tensor:
    """Return ‖s_k‖ of every class (K), inf where no shift leads to it."""
    return torch.cat(shifts_of_heads(suspect.heads), 1).norm(dim=1)
