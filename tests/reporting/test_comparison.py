"""Two measurements number by number: what counts as equal, by the same processor and versions and by others."""

from __future__ import annotations

import dataclasses

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import ClassAccuracies, Destination, Difference, Measurement, TriggerResult
from hfdetox.reporting.comparison import Comparison, differing_environment, inconsistent
from tests.written_report import written_report


def test_counts_are_equal_or_within_two_of_ten_thousand_and_at_least_one() -> None:
    exact, other = Comparison(True), Comparison(False)
    assert [exact.allowed(n) for n in (10, 10_000)] == [0, 0]
    assert [other.allowed(n) for n in (10, 4_999, 10_000, 50_000)] == [1, 1, 2, 10]
    for ours, apart, finding in (
        (exact, 0, "match"),
        (exact, 1, "mismatch"),
        (other, 1, "match"),
        (other, 2, "mismatch"),
    ):
        assert ours.rates("x", rate(90, 100), rate(90 + apart, 100)).finding == finding
        assert ours.rates("x", rate(90, 100), rate(90 - apart, 100)).finding == finding
    assert other.rates("x", rate(90, 100), rate(90, 101)).finding == "mismatch"


def test_another_worst_or_largest_class_is_taken_only_where_it_is_as_bad_or_as_large() -> None:
    def classes(label: int, successes: int) -> ClassAccuracies:
        return ClassAccuracies([], label, rate(successes, 50), 0.1)

    def trigger(label: int, successes: int) -> TriggerResult:
        share, base = rate(successes, 50), rate(2, 50)
        there = Destination(label, f"class {label}", share, base, Difference(0.1, (0.0, 0.2)))
        return TriggerResult("badnets", "badnets", "native", None, 0, share, base, base, there)

    for exact, apart, finding in ((True, 0, "mismatch"), (False, 1, "match"), (False, 9, "mismatch")):
        ours = Comparison(exact)
        counts = {label: 20 + label * apart for label in (0, 1)}
        states = [Measurement(rate(90, 100), 0.5, {"t": trigger(label, count)}, classes(label, count))
                  for label, count in counts.items()]  # fmt: skip
        found = {one.what: str(one.finding) for one in ours.measurements("after", *states)}
        assert found["after: worst class"] == finding
        assert found["after: t: largest class"] == finding


def test_another_processor_threads_or_version_is_named() -> None:
    here = written_report().environment
    assert differing_environment(here, here) == []
    assert differing_environment(here, dataclasses.replace(here, python="3.99", command="x", seed=9)) == []
    for name, value in {"device": "cpu (another)", "threads": 9, "torch": "9", "timm": "9"}.items():
        [line] = differing_environment(here, dataclasses.replace(here, **{name: value}))
        assert line.startswith(name)


def test_a_rate_that_is_not_that_of_its_counts_is_named() -> None:
    report = written_report()
    assert len(list(inconsistent(rate(3, 7)))) == 0
    assert any("before.accuracy" in line for line in inconsistent(
        dataclasses.replace(report, before=dataclasses.replace(report.before, accuracy=dataclasses.replace(  # type: ignore[type-var]
            rate(561, 600), successes=601)))))  # fmt: skip
