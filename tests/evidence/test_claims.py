"""What the clean images can tell, and how far a cleaned model answers as before, by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfdetox.evidence.claims import SHOWN_SHIFTS, class_shifts, find_agreement, share_of_sure
from hfdetox.evidence.results import ScanResult, ScoreResult
from tests.evidence.suspects import Classifier, pictures, suspect_of


def scan(norms: list[float | None] | None) -> ScanResult:
    scores = {} if norms is None else {"latent-shift": ScoreResult(norms, 1.0, 0)}
    return ScanResult("unknown", None, None, "", scores, 100, None, 0, 0.0)


def test_the_sure_and_the_far_are_those_of_a_plain_loop() -> None:
    one = suspect_of(Classifier(scale=0.35), *pictures(300))
    [head] = one.heads
    features, labels = head.features.numpy(), head.labels.numpy()
    chances = head.logits.softmax(1).numpy()
    sure = [place for place in range(300) if chances[place].argmax() == labels[place] and chances[place].max() >= 0.9]
    own = [[place for place in sure if labels[place] == label] for label in range(6)]
    spread = np.std([features[p] - features[own[labels[p]]].mean(0) for p in sure], axis=0, ddof=1).clip(1e-6)
    away = [np.linalg.norm((features[p] - features[own[labels[p]]].mean(0)) / spread) for p in range(300)]
    limit = np.quantile([away[p] for p in sure], 0.99)
    share, far = share_of_sure(one)
    assert share == pytest.approx(len(sure) / 300)
    assert far == pytest.approx(np.mean(np.array(away) > limit), abs=1 / 300)
    assert 50 < len(sure) < 300


def test_what_cannot_be_told_of_the_images_is_not_said() -> None:
    # nothing is sure, and too few images
    assert share_of_sure(suspect_of(Classifier(scale=1e-3), *pictures(300))) == (0.0, None)
    assert share_of_sure(suspect_of(Classifier(), *pictures(30))) == (None, None)


def test_the_shift_of_every_class_is_its_distance_from_the_median() -> None:
    before, after = [4.0, 5.0, 6.0, 1.0, 5.5], [3.0, 3.5, 4.0, None, 3.25]
    found = class_shifts(scan(before), scan(after), ["a", "b", "c", "d", "e"])
    assert [one.name for one in found] == ["a", "b", "c", "d", "e"]
    spread = 1.4826 * np.median(np.abs(np.array(before) - 5.0))
    assert [one.before for one in found] == pytest.approx([(value - 5.0) / spread for value in before], abs=1e-3)
    # a class that no shift leads to has no number, and does not move the median of the others
    assert found[3].after is None
    assert found[1].after == pytest.approx((3.5 - 3.375) / (1.4826 * 0.25), abs=1e-3)
    assert class_shifts(scan(None), scan(after), list("abcde")) == []


def test_of_many_classes_those_that_stand_out_are_named_and_the_one_that_did_before() -> None:
    before, after = torch.ones(100), torch.arange(100).float()
    before[50] = -9
    found = class_shifts(scan(before.tolist()), scan(after.tolist()), [str(label) for label in range(100)])
    assert [one.label for one in found] == [*range(SHOWN_SHIFTS), 50, *range(100 - SHOWN_SHIFTS, 100)]


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    truth, before, after = (np.array(one) for one in ([0, 0, 1, 1, 2], [0, 2, 1, 1, 2], [0, 2, 0, 0, 2]))
    found = find_agreement(truth, before, after, ["a", "b", "c"])
    assert (found.rate.successes, found.rate.samples) == (3, 5)
    assert [(one.name, one.rate.successes, one.to_name) for one in found.moved] == [("b", 2, "a")]
