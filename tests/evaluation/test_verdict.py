"""What may be said: paired intervals against published ones, and the rules for a trigger's and a run's verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from hfdetox.evaluation.metrics import find_destination, paired_difference, rate
from hfdetox.evaluation.results import AccuracyLoss, Destination, Difference, Measurement, TriggerResult
from hfdetox.evaluation.verdict import (
    Verdict,
    describe_loss,
    judge_accuracy,
    judge_trigger,
    run_verdict,
    trigger_verdicts,
)


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return paired outcomes: so many of both, of the first alone, of the second alone, of neither."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


# --- the paired interval ---


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Bentur et al. 2009 in Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): Tango's interval
        ((1, 1, 7, 12), -0.517, -0.026),
        # nothing ever differs: ± z² / (n + z²), by hand for n = 100
        ((60, 0, 0, 40), -0.036994, 0.036994),
        # everything turns round: the whole of [-1, 1] has one end that is certain
        ((0, 0, 21, 0), -1.0, -0.6907),
    ],
)
def test_the_paired_interval_is_the_published_one(table: tuple[int, int, int, int], low: float, high: float) -> None:
    found = paired_difference(*outcomes(*table))
    assert found.value == pytest.approx((table[1] - table[2]) / sum(table))
    assert found.interval == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(("more", "fewer", "count"), [(40, 20, 160), (6, 16, 161), (86, 150, 1600), (3, 0, 50)])
def test_the_paired_interval_inverts_the_score_test(more: int, fewer: int, count: int) -> None:
    """The constrained likelihood is maximised by a search, in place of the closed form."""

    def score(difference: float) -> float:
        rest = count - more - fewer

        def loss(other: float) -> float:
            shares = (other + difference, other, 1 - 2 * other - difference)
            return -sum(n * np.log(max(p, 1e-300)) for n, p in zip((more, fewer, rest), shares, strict=True))

        bounds = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
        other = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        spread = np.sqrt(count * (2 * other + difference * (1 - difference)))
        return float((more - fewer - count * difference) / spread)

    middle, edge = (more - fewer) / count, norm.ppf(0.975)
    low = brentq(lambda d: score(d) - edge, middle - 0.3, middle - 1e-6)
    high = brentq(lambda d: score(d) + edge, middle + 1e-6, middle + 0.3)
    both = (count - more - fewer) // 2
    found = paired_difference(*outcomes(both, more, fewer, count - more - fewer - both))
    assert found.interval == pytest.approx((low, high), abs=1e-5)
    turned = paired_difference(*reversed(outcomes(both, more, fewer, count - more - fewer - both)))
    assert turned.interval == pytest.approx((-high, -low), abs=1e-5)


# --- where triggered images go ---


def test_the_destination_is_counted_over_the_images_of_other_classes() -> None:
    # true classes 1 1 1 2 2 2 2; with the trigger: 2 2 1 | 2 2 2 0; without: 1 2 1 | 2 2 2 2
    truth, triggered = np.array([1, 1, 1, 2, 2, 2, 2]), np.array([2, 2, 1, 2, 2, 2, 0])
    found = find_destination(truth, triggered, np.array([1, 2, 1, 2, 2, 2, 2]), 4, ["a", "b", "c", "d"])
    # 2 of the 3 images that are not of class 2; that most images of class 2 stay there counts for nothing
    assert (found.label, found.name) == (2, "c")
    assert (found.rate, found.without) == (rate(2, 3), rate(1, 3))
    assert found.excess == paired_difference(np.array([True, True, False]), np.array([False, True, False]))
    assert find_destination(truth, triggered, truth, 4).name == "2"


def test_a_model_that_answers_one_class_to_everything_moves_nothing() -> None:
    truth = np.repeat([1, 2, 3], 20)
    always = np.full(60, 3)
    found = find_destination(truth, always, always, 5)
    assert (found.label, found.rate.value, found.without.value, found.excess.value) == (3, 1.0, 1.0, 0.0)


# --- a trigger ---


def effect(
    hits: int, label: int, there: int, without: int = 2, *, target: int | str = 0, count: int = 100
) -> TriggerResult:
    """Return a trigger that succeeds on so many of the images, and moves so many to a class."""
    moved = Destination(label, "class", rate(there, count), rate(without, count),
                        paired_difference(*outcomes(0, there, without, count - there - without)))  # fmt: skip
    return TriggerResult("badnets", "badnets", "native", None, target, rate(hits, count), rate(0, count),
                         rate(count, count), moved)  # fmt: skip


WORKS = effect(95, 0, 95)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        # the excess's interval: 84 − 2 is 72 to 89 points, 15 − 2 is 5.8 to 21.6, 14 − 2 is 5.0 to 20.4, 12 − 2 to 18.2
        (WORKS, effect(0, 3, 84), Verdict.REDIRECTED),
        (WORKS, effect(0, 3, 15), Verdict.REDUCED),
        (WORKS, effect(0, 3, 12), Verdict.MITIGATED),
        # the class has that share anyway
        (WORKS, effect(0, 3, 40, 38, count=200), Verdict.MITIGATED),
        (WORKS, effect(95, 0, 95), Verdict.NOT_MITIGATED),
        (WORKS, effect(50, 0, 50), Verdict.REDUCED),
        (WORKS, effect(30, 3, 60), Verdict.REDIRECTED),
        # another target than the trigger's was named: it moved them there before, too
        (effect(0, 3, 90), effect(0, 3, 90), Verdict.INCONCLUSIVE),
        (effect(0, 3, 90), effect(0, 3, 1), Verdict.INCONCLUSIVE),
        (effect(0, 3, 90), effect(0, 4, 90), Verdict.REDIRECTED),
        (effect(1, 3, 5), effect(1, 3, 5), Verdict.NO_EVIDENCE),
        (effect(1, 3, 5), effect(1, 3, 60), Verdict.REDIRECTED),
        # of two classes each is the next one of the other: what works is not called redirected
        (effect(95, 1, 95, target="all-to-all"), effect(60, 1, 60, target="all-to-all"), Verdict.REDUCED),
        (effect(95, 1, 95, target="all-to-all"), effect(2, 4, 80, target="all-to-all"), Verdict.REDIRECTED),
        (effect(95, 1, 11, target="all-to-all"), effect(2, 4, 8, target="all-to-all"), Verdict.MITIGATED),
    ],
)
def test_the_verdict_of_a_trigger(before: TriggerResult, after: TriggerResult, verdict: Verdict) -> None:
    assert judge_trigger(before, after) is verdict
    assert judge_trigger(before, None) is Verdict.PENDING


def test_what_was_not_measured_is_not_called_mitigated() -> None:
    unknown = replace(effect(0, 3, 2), destination=None)
    assert judge_trigger(WORKS, unknown) is Verdict.INCONCLUSIVE
    assert judge_trigger(replace(WORKS, destination=None), effect(0, 3, 2)) is Verdict.MITIGATED


# --- accuracy ---


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.01, 0.05), "accepted"), ((-0.09, -0.02), "accepted"), ((0.01, 0.051), "inconclusive"),
        ((0.05, 0.09), "inconclusive"), ((0.051, 0.09), "rejected: accuracy"), ((0.6, 0.7), "rejected: accuracy"),
    ],
)  # fmt: skip
def test_the_verdict_on_accuracy(interval: tuple[float, float], verdict: str) -> None:
    found = judge_accuracy(Difference(sum(interval) / 2, interval), 0.05)
    assert (found.verdict, found.allowed, found.interval) == (verdict, 0.05, interval)


def test_the_loss_in_words() -> None:
    words = "−0.3 points of accuracy lost (−1.0 to 0.4, at most 2.5 allowed)"
    assert describe_loss(AccuracyLoss(-0.003, (-0.01, 0.004), 0.025, "accepted")) == words
    assert describe_loss(AccuracyLoss(-0.0, (-0.0004, 0.0004), 0.0, "inconclusive")).startswith("0.0 points")


def test_nothing_is_mitigated_in_a_model_that_is_rejected() -> None:
    triggers = {"a": WORKS, "b": WORKS}, {"a": effect(0, 3, 2), "b": effect(0, 3, 84)}
    states = [Measurement(rate(9, 10), 0.1, found) for found in triggers]
    lost = judge_accuracy(Difference(0.5, (0.4, 0.6)), 0.05)
    assert trigger_verdicts(*states) == {"a": "mitigated", "b": "redirected, not mitigated"}
    assert trigger_verdicts(*states, lost) == {"a": "rejected: accuracy", "b": "redirected, not mitigated"}
    assert run_verdict(*states, lost) == "rejected: accuracy"
