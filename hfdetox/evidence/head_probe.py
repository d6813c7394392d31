"""Head probe: which class the head gives to random features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfdetox.errors import UsageError
from hfdetox.evidence.base import MIN_CLASSES, Score, Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.training.probe import log_odds, probed_shares

# of wider heads the draws are spread; chosen on networks with 1,280 features (tests/benchmarks/pretrained_zoo.py)
_MOST = 320


@dataclass(frozen=True)
class HeadProbe(Score):
    """The log odds of the largest share that one class has of 10,000 random features.

      p_k = share of draws z with argmax_j w_jᵀz + b_j = k,  statistic = max_k log(p_k / (1 − p_k))

    The draws are z ~ N(μ, σ²) with mean and variance of each feature over the clean images, and z ~ |N(0, 1)|; where
    there are D > 320 features, the latter lie √(D/320) times as far from their mean. Without that the wide heads of
    pretrained networks that were tuned give up to 99 % of them to one class, without a backdoor. The larger statistic
    of the two counts. Without images the second is left. After HTell (arXiv 2605.18908), whose exact formula we could
    not read; the outlier by the MAD of the shares that it speaks of grows without bound where most classes get no draw,
    as with many classes, and the log odds do not.

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
        shares = probed_shares(suspect.heads, suspect.generator(1), _MOST)
        return ScoreResult(shares.tolist(), log_odds(shares), int(shares.argmax()))
