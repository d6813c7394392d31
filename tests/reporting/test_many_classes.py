"""A thousand classes with names of 200 characters: report, card and screen stay readable."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from hfdetox.cli.console import report_table
from hfdetox.evaluation.metrics import class_accuracies, find_destination, rate
from hfdetox.evaluation.results import AccuracyLoss, Measurement
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.report import Report
from tests.written_report import written_report

CLASSES = 1000
NAMES = [f"class {i} | of `many` [x](y), " + "long\n" * 40 for i in range(CLASSES)]


def report() -> Report:
    """Return a report of 2,000 images, of which the trigger moves most to one class of another name."""
    plain, rng = written_report(), np.random.default_rng(0)
    truth = np.repeat(np.arange(CLASSES), 2)

    def state(share: float, label: int) -> Measurement:
        answers = np.where(rng.random(len(truth)) < share, truth, (truth + 7) % CLASSES)
        triggered = np.where(rng.random(len(truth)) < 0.9, label, answers)
        moved = find_destination(truth, triggered, answers, CLASSES, NAMES)
        assert plain.before is not None
        trigger = replace(plain.before.triggers["badnets"], target=2, destination=moved)
        right = answers == truth
        return Measurement(rate(int(right.sum()), len(truth)), 0.5, {"badnets": trigger},
                           class_accuracies(truth, right, CLASSES, NAMES))  # fmt: skip

    before, after = state(0.8, 2), state(0.75, 900)
    return replace(plain, model=replace(plain.model, num_labels=CLASSES), before=before, after=after,
                   accuracy_loss=AccuracyLoss(0.05, (0.03, 0.07), 0.05, "inconclusive"))  # fmt: skip


def test_the_card_names_ten_classes_and_cuts_their_names() -> None:
    card = build_card(report(), source_card=None, repo_id=None, labels=NAMES)
    validate_card(card)
    text = card.partition("\n# ")[2]
    (line,) = (line for line in text.splitlines() if line.startswith("The classes with the lowest accuracy after: "))
    assert line.count("(before ") == 10
    assert line.endswith(" All 1,000 are in `detox_report.json`.")
    assert text.count("class ") < 40
    (row,) = (line for line in text.splitlines() if line.startswith("| Largest class with `badnets` |"))
    # two states and what stands before them: the pipes in the names are none of the table
    assert row.replace(r"\|", "").count("|") == 4
    assert max(len(line) for line in text.splitlines() if not line.startswith("The classes")) < 600


def test_the_screen_has_room_for_them() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(report_table(report()))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, shown)) <= 80
    assert sum("largest class" in line for line in shown) == 1
    assert any("class 900 | of `ma…" in line for line in shown)
    assert any("redirected, not mitigated" in line for line in shown)


def test_the_reports_numbers_are_one_line_a_list(tmp_path: Path) -> None:
    text = report().save(tmp_path).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 600
    assert Report.load(tmp_path) == report()
    line = next(line for line in text.splitlines() if '"accuracies"' in line)
    assert len(json.loads("{" + line.strip().rstrip(",") + "}")["accuracies"]) == CLASSES
    # what looks like a list within a text is left as it is
    odd = replace(report(), warnings=["[\n 1,\n 2\n ]", "[ 1, 2 ]"])
    odd.save(tmp_path)
    assert Report.load(tmp_path).warnings == odd.warnings
