"""Which class a head gives to random features, against the normal distribution."""

import math

import pytest
import torch
from scipy.stats import norm

from hfdetox.training.probe import log_odds, probed_shares
from hfdetox.training.shift import HeadInputs


def head(width: int, lean: float = 0.0) -> HeadInputs:
    """Return a head of two classes, whose weights differ by a normal vector and `lean`."""
    weight = torch.randn(2, width, generator=torch.Generator().manual_seed(width))
    weight[1] += lean - (weight[1] - weight[0]).mean()
    return HeadInputs("fc", weight, torch.tensor([0.5, 0.0]), torch.zeros(0, width), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(("width", "most", "spread"), [
    (1280, None, 1.0), (1280, 320, 2.0), (720, 320, 1.5), (320, 320, 1.0), (64, 320, 1.0),
])  # fmt: skip
def test_a_wide_head_gives_to_a_class_what_the_normal_distribution_says(width: int, most: int | None,
                                                                         spread: float) -> None:  # fmt: skip
    one = head(width, lean=0.05)
    difference = (one.weight[1] - one.weight[0]).double()
    # |N(0, 1)| has the mean √(2/π) and the variance 1 − 2/π
    mean = math.sqrt(2 / math.pi) * float(difference.sum()) - 0.5
    share = norm.cdf(mean / (spread * math.sqrt(1 - 2 / math.pi) * float(difference.norm())))
    found = probed_shares([one], torch.Generator().manual_seed(3), most)
    assert found.sum() == pytest.approx(1)
    assert float(found[1]) == pytest.approx(share, abs=0.02)
    assert log_odds(found) == pytest.approx(abs(math.log(share / (1 - share))), abs=0.1)


def test_a_head_that_is_not_wider_is_probed_with_the_same_draws() -> None:
    for width in (32, 192, 320):
        shares = [probed_shares([head(width, 0.1)], torch.Generator().manual_seed(1), most) for most in (None, 320)]
        assert torch.equal(*shares)
