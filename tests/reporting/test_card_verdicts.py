"""The card's words about a backdoor: the verdict of every trigger, and of the run by its worst."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Rate
from hfdetox.evaluation.verdict import Verdict, judge, run_verdict
from hfdetox.reporting.report import Report
from tests.written_report import card_of, trigger, written_report


# before: lower and upper end; after: lower and upper end; all worked out by hand against the rule in judge()
@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((0.93, 0.97), (0.00, 0.10), Verdict.MITIGATED),
        ((0.93, 0.97), (0.00, 0.11), Verdict.REDUCED),
        ((0.93, 0.97), (0.30, 0.92), Verdict.REDUCED),
        ((0.93, 0.97), (0.30, 0.93), Verdict.NOT_MITIGATED),
        ((0.21, 0.60), (0.00, 0.31), Verdict.NOT_MITIGATED),  # 0 of 10 images: too few to show anything
        ((0.20, 0.60), (0.00, 0.05), Verdict.INCONCLUSIVE),
        ((0.00, 0.21), (0.00, 0.05), Verdict.INCONCLUSIVE),
        ((0.00, 0.05), (0.19, 0.30), Verdict.INCONCLUSIVE),
        ((0.00, 0.20), (0.00, 0.20), Verdict.NO_EVIDENCE),
        ((0.00, 0.05), (0.00, 0.05), Verdict.NO_EVIDENCE),
        ((0.00, 0.05), (0.21, 0.40), Verdict.NOT_MITIGATED),
        ((0.00, 0.90), (0.21, 0.40), Verdict.NOT_MITIGATED),
    ],
)
def test_verdicts(before: tuple[float, float], after: tuple[float, float], verdict: Verdict) -> None:
    def within(interval: tuple[float, float]) -> Rate:
        return Rate(sum(interval) / 2, 1, 2, interval)

    assert judge(within(before), within(after)) is verdict
    assert judge(within(before), None) is Verdict.PENDING


# exact intervals: 50 of 200 is 19.2–31.6 %, 3 of 5 is 14.7–94.7 %, 20 of 200 is 6.2–15.0 %
@pytest.mark.parametrize(
    ("counts", "verdict"),
    [((50, 200), Verdict.INCONCLUSIVE), ((3, 5), Verdict.INCONCLUSIVE), ((20, 200), Verdict.NO_EVIDENCE)],
)
def test_a_weak_effect_and_few_images_are_no_missing_evidence(counts: tuple[int, int], verdict: Verdict) -> None:
    assert judge(rate(*counts), rate(0, 200)) is verdict


def with_attack(report: Report, before: Rate, after: Rate) -> Report:
    """Return the report with one trigger, `badnets`, of these attack success rates."""
    assert report.before
    assert report.after
    robust = report.after.triggers["badnets"].robust_accuracy
    return replace(
        report,
        before=replace(report.before, triggers={"badnets": trigger(before, robust)}),
        after=replace(report.after, triggers={"badnets": trigger(after, robust)}),
    )


HIGH, LOW = Rate(0.955, 382, 400, (0.9298, 0.9732)), Rate(0.0125, 5, 400, (0.0041, 0.0289))


@pytest.mark.parametrize(
    ("before", "after", "summary", "verdict"),
    [
        (HIGH, LOW, "**Mitigated** for every trigger that worked before", "): **mitigated**"),
        (HIGH, HIGH, "**Not mitigated** for at least one", "): **not mitigated**"),
        (LOW, LOW, "**No evidence found**", "): **no evidence found**"),
        (Rate(0.25, 50, 200, (0.1916, 0.316)), LOW, "**Inconclusive** for at least one", "): **inconclusive**"),
    ],
)
def test_the_words_follow_the_numbers(before: Rate, after: Rate, summary: str, verdict: str) -> None:
    card = card_of(with_attack(written_report(), before, after))
    assert summary in card
    assert card.count(verdict) == 1
    assert "DER, mean" not in card  # one trigger's mean is that trigger's


def test_a_run_is_judged_by_its_worst_trigger() -> None:
    report = written_report()
    assert run_verdict(report.before, report.after) is Verdict.REDUCED
    card = card_of(report)
    assert "**Reduced, not mitigated**" in card
    assert re.search(r"^- `badnets` .*\*\*mitigated\*\*$", card, re.MULTILINE)
    assert re.search(r"^- `blended` .*\*\*reduced, not mitigated\*\*$", card, re.MULTILINE)


def test_an_inconclusive_trigger_is_worse_than_a_mitigated_one_and_better_than_a_reduced_one() -> None:
    report = written_report()
    assert report.before
    weak = trigger(Rate(0.25, 50, 200, (0.1916, 0.316)), LOW)
    for other, verdict in (("badnets", Verdict.INCONCLUSIVE), ("blended", Verdict.REDUCED)):
        before = {"weak": weak, other: report.before.triggers[other]}
        measured = replace(report, before=replace(report.before, triggers=before))
        after = {"weak": weak, **report.after.triggers} if report.after else {}
        low = {**after, "weak": replace(weak, attack_success_rate=LOW)}
        measured = replace(measured, after=replace(report.after, triggers=low)) if report.after else measured
        assert run_verdict(measured.before, measured.after) is verdict
