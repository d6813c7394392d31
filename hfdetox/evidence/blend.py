"""Blend: how faint a picture may be that leads every image to a class."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hfdetox.evidence.base import Reconstruction, Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.evidence.searching import affordable, ahead, parts, share_led, shortened, triggers_of
from hfdetox.training.search import search_blends
from hfdetox.triggers.base import Trigger

# the faintest blend that leads so many images is the class's trigger
_LEADS = 0.9


@dataclass(frozen=True)
class Blend(Reconstruction):
    """Share of held-out images that the best blend of each class leads there, the mean over a few strengths α.

      v_k = mean over α of  mean_i [f(T_k(x_i)) = k],   T_k(x) = (1 − α) x + α · 255 q_k,
      q_k by Adam:  min mean_i ce(f(T_k(x_i)), k)
      statistic = max_k v_k − median of the other classes' v

    q_k has 32×32 pixels at most. A picture that is strong enough leads any network anywhere, so what counts is a class
    that needs far less than the others. The trigger it gives is the faintest that leads 90 % of the images, or else the
    strongest.

    Attributes:
        alphas: the strengths, rising.
        steps: of the search of one blend, of 48 images each.
    """

    name = "blend"
    summary = "the share of images that a faint picture leads to a class; a backdoor's leads far more than the others'"
    paper = "none: hfdetox's own"
    cost = "11,520 image passes for each class it looks at"

    alphas: Sequence[float] = field(default=(0.08, 0.2))
    steps: int = 60

    def reconstruct(self, suspect: Suspect, accused: Sequence[int] | None = None) -> tuple[ScoreResult, list[Trigger]]:
        classes, searched, held = parts(suspect, accused)
        steps = affordable(suspect, classes, self.steps, len(self.alphas))
        total, all_rates, triggers = 0, [], []
        for place, alpha in enumerate(self.alphas):
            found = search_blends(suspect.network, searched, classes, alpha=alpha, steps=steps,
                                  generator=suspect.generator(2 + place))  # fmt: skip
            rates, passes = share_led(suspect, held, found)
            total += found.passes + passes
            all_rates.append(rates)
            triggers.append(triggers_of(self.name, found))
        table = torch.stack(all_rates)
        chosen = [next((place for place, rate in enumerate(column) if rate >= _LEADS), len(self.alphas) - 1)
                  for column in table.T.tolist()]  # fmt: skip
        result = ahead(suspect, classes, table.mean(0), low=False, passes=total,
                       note=shortened(steps, self.steps))  # fmt: skip
        return result, [triggers[place][row] for row, place in enumerate(chosen)]
