"""What scores together allow to be said, and what the file of thresholds holds."""

from __future__ import annotations

import dataclasses

import pytest

from hfdetox.evaluation.metrics import rate
from hfdetox.evidence.base import SCORES
from hfdetox.evidence.results import Finding, ScanResult, ScoreResult, Threshold
from hfdetox.evidence.thresholds import COMBINED, combine, judge_score, judged, table, threshold_of

LABELS = ("ant", "bee", "cat", "dog")
GOOD = rate(95, 100)


def found(finding: Finding, accused: int | None = None) -> ScoreResult:
    return ScoreResult(None, 1.0, accused, finding=str(finding))


S, N, U = Finding.SUSPICIOUS, Finding.NO_EVIDENCE, Finding.UNKNOWN


@pytest.mark.parametrize(("scores", "expected", "accused"), [
    ({"a": found(S, 2), "b": found(S, 2)}, S, 2),
    ({"a": found(S, 2), "b": found(S, 2), "c": found(N, 1)}, S, 2),
    ({"a": found(S, 2), "b": found(S)}, S, 2),
    ({"a": found(S, 2), "b": found(S, 1)}, U, None),
    ({"a": found(S, 2), "b": found(N, 2)}, U, 2),
    ({"a": found(S), "b": found(S)}, U, None),
    ({"a": found(N, 2), "b": found(N, 1)}, N, None),
    ({"a": found(N, 2), "b": found(U)}, U, None),
    ({"a": found(U), "b": found(U)}, U, None),
    # head probe and latent shift are a pair: one above, and the other's most likely class
    ({"head-probe": found(S, 2), "latent-shift": found(N, 2)}, S, 2),
    ({"head-probe": found(N, 2), "latent-shift": found(S, 2)}, S, 2),
    ({"head-probe": found(S, 2), "latent-shift": found(N, 1)}, U, 2),
    ({"head-probe": found(S, 2), "latent-shift": found(U)}, U, 2),
    ({"head-probe": found(S, 2), "blend": found(N, 2)}, U, 2),
    ({"head-probe": found(N, 2), "latent-shift": found(N, 2)}, N, None),
    ({"head-probe": found(S, 2), "latent-shift": found(N, 2), "blend": found(S, 1)}, U, None),
    ({"head-probe": found(N, 2), "latent-shift": found(N, 2), "blend": found(S, 2)}, U, 2),
    ({"latent-shift": found(S, 2)}, U, 2),
    # a scar tells of the model that came
    ({"a": found(N, 2), "b": found(N, 1), "scar": found(S, 3)}, N, None),
])  # fmt: skip
def test_no_score_decides_alone(scores: dict[str, ScoreResult], expected: Finding, accused: int | None) -> None:
    assert combine(scores, LABELS, 500, GOOD)[:2] == (expected, accused)


def test_too_few_images_or_too_low_an_accuracy_are_unknown() -> None:
    none = {"a": found(N, 2), "b": found(N, 1)}
    assert combine(none, LABELS, 99, GOOD)[0] == U
    assert combine(none, LABELS, 500, rate(40, 100))[0] == U
    two = {"a": found(S, 2), "b": found(S, 2)}
    assert combine(two, LABELS, 500, rate(30, 100))[0] == U
    # what is found on few images is found
    assert combine(two, LABELS, 20, GOOD)[0] == S


def test_the_file_has_a_threshold_for_every_score_at_every_time() -> None:
    for name, kind in SCORES.items():
        for when in ("before", "after"):
            if kind.when in (when, "both"):
                threshold = threshold_of(name, when)
                assert threshold is not None, (name, when)
                assert threshold.rule
                # what was not measured claims nothing
                assert threshold.measured or (threshold.false_alarms, threshold.found) == (None, None)
    assert threshold_of(COMBINED, "before") is not None
    assert table()["how"]
    assert threshold_of("another package's", "before") is None


def test_a_score_is_held_against_its_threshold() -> None:
    limit = threshold_of("latent-shift", "before")
    assert limit is not None
    for statistic, expected in ((limit.value + 0.1, S), (limit.value, N), (None, U)):
        one = judge_score("latent-shift", ScoreResult(None, statistic, 1), "before")
        assert one.finding == expected
        assert one.threshold == limit
    assert judge_score("unheard of", ScoreResult(None, 9.0, 1), "before").finding == U


def test_error_rates_are_said_with_their_counts_or_not_at_all() -> None:
    assert Threshold(3.5).errors == "error rates not measured"
    # a rate without a measurement is none
    assert Threshold(3.5, False, 0, "", rate(0, 10), rate(9, 10)).errors == "error rates not measured"
    said = Threshold(3.5, True, 8, "the largest", rate(0, 20), rate(9, 10)).errors
    assert said == "false alarms 0 of 20 (0.0–16.8 %), found 9 of 10 (55.5–99.7 %)"


def test_judging_fills_in_the_names() -> None:
    plain = ScanResult("unknown", None, None, "", {"latent-shift": ScoreResult(None, 99.0, 2)}, 500, GOOD, 0, 0.0)
    one = judged(plain, "before", LABELS)
    assert one.scores["latent-shift"].label == "cat"
    assert (one.finding, one.label) == ("unknown", "cat")
    assert dataclasses.asdict(one)["scores"]["latent-shift"]["finding"] == "suspicious"
