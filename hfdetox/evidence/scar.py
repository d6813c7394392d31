"""Scar: a class that after cleaning is harder to reach than all others, as a backdoor's old target is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfdetox.evidence.base import Score, Suspect, outlier
from hfdetox.evidence.latent_shift import shift_norms
from hfdetox.evidence.results import ScoreResult


@dataclass(frozen=True)
class Scar(Score):
    """The largest z of the latent shift, max_k z_k with z as in `latent-shift`, on the cleaned model.

    D3 pushes a backdoor's target so far away that it becomes an outlier on the high side. It tells of the model that
    came, not of what is left; a cleaned model without a scar may have its backdoor still. Ours; no paper.
    """

    name = "scar"
    summary = "a class that the cleaned model needs a far longer shift for than for others: once a backdoor's target"
    paper = "no paper"
    cost = "none beside latent-shift"
    when: ClassVar[Literal["before", "after", "both"]] = "after"

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        return outlier(shift_norms(suspect), low=False)
