"""Patch: how small a patch must be that leads every image to a class."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfdetox.evidence.base import Reconstruction, Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.evidence.searching import affordable, ahead, parts, share_led, shortened, triggers_of
from hfdetox.training.search import search_patches
from hfdetox.triggers.base import Trigger

# a patch that leads fewer images than this to its class is none
_LEADS = 0.5


@dataclass(frozen=True)
class Patch(Reconstruction):
    """log of the share of the image that the smallest patch of each class covers.

      v_k = log(‖m_k‖₁ / pixels), m_k and a pattern q_k by Adam:  min mean_i ce(f((1 − m) x_i + m q), k) + κ ‖m‖₁
      statistic = median of the other classes' v − min_k v_k

    A patch that does not lead half of the held-out images to its class counts as the whole image: v = 0. The search
    is Neural Cleanse's (Wang et al., IEEE S&P 2019) with a fixed κ; that of `nc` moves it and takes longer. A statistic
    of 2 is a patch that is 7 times smaller than the others'.

    Attributes:
        steps: of the search, of 48 images each.
    """

    name = "patch"
    summary = "the smallest patch that leads images to a class; a backdoor's is far smaller than the others'"
    paper = "after Neural Cleanse (IEEE S&P 2019)"
    cost = "11,520 image passes for each class it looks at"

    steps: int = 120

    def reconstruct(self, suspect: Suspect, accused: Sequence[int] | None = None) -> tuple[ScoreResult, list[Trigger]]:
        classes, searched, held = parts(suspect, accused)
        steps = affordable(suspect, classes, self.steps)
        found = search_patches(suspect.network, searched, classes, generator=suspect.generator(1), steps=steps)
        rates, passes = share_led(suspect, held, found)
        height, width = searched.shape[-2:]
        sizes = (found.norms(height, width) / (height * width)).cpu().log()
        sizes[rates < _LEADS] = 0.0
        result = ahead(suspect, classes, sizes, low=True, passes=found.passes + passes,
                       note=shortened(steps, self.steps))  # fmt: skip
        return result, triggers_of(self.name, found)
