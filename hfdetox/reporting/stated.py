"""What a report states: whether its numbers fit each other, and what of it nobody can count again."""

from collections.abc import Iterator

from hfdetox.errors import one_line
from hfdetox.evaluation.verdict import judge_accuracy
from hfdetox.evidence.recount import fits_threshold, is_cheap
from hfdetox.reporting.comparison import Check, CheckFinding, inconsistent
from hfdetox.reporting.report import AttackReport, Report, RunReport, missed_goals


def unchecked(report: RunReport) -> list[str]:
    """Return by name what of a report nobody recomputes."""
    named = ["pictures", "seconds and memory of the run"]
    evidence = report.evidence if isinstance(report, Report) else None
    if evidence is not None:
        for when, scan in evidence.scans.items():
            searched = [name for name, one in scan.scores.items() if one.statistic is not None and not is_cheap(name)]
            named += [f"{when}: score {name}" for name in searched]
        named += ["residual tests (re-tuning, path, drift)"] if evidence.residual else []
    return named


def arithmetic(report: RunReport) -> Iterator[Check]:
    """Give the checks that need nothing but the report: its numbers must fit each other."""
    wrong = list(inconsistent(report))
    yield Check("rates and intervals of the report", "those of their counts", one_line("; ".join(wrong)) or "so",
                CheckFinding.MISMATCH if wrong else CheckFinding.MATCH)  # fmt: skip
    if isinstance(report, Report) and report.accuracy_loss is not None:
        stated = report.accuracy_loss
        made = judge_accuracy(stated, stated.allowed).verdict
        yield Check("verdict on the accuracy", stated.verdict, made,
                    CheckFinding.MATCH if made == stated.verdict else CheckFinding.MISMATCH)  # fmt: skip
    if isinstance(report, Report) and report.evidence is not None:
        for when, scan in report.evidence.scans.items():
            bad = [name for name, one in scan.scores.items() if not fits_threshold(one)]
            yield Check(f"{when}: findings of the scores", "those of their values", ", ".join(bad) or "so",
                        CheckFinding.MISMATCH if bad else CheckFinding.MATCH)  # fmt: skip
    if isinstance(report, AttackReport) and report.after is not None:
        succeeded = not missed_goals(report.after, report.goals)
        yield Check("the attack succeeded", str(report.succeeded), str(succeeded),
                    CheckFinding.MATCH if succeeded == report.succeeded else CheckFinding.MISMATCH)  # fmt: skip
