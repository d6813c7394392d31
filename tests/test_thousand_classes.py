"""The job on many classes at toy size: what it needs, and that what it writes can be read."""

from __future__ import annotations

from pathlib import Path

from hfdetox.reporting.report import Report
from tests.benchmarks.thousand_classes import LIMIT_MB, job


def test_many_classes_go_through_the_job_within_the_limit(tmp_path: Path) -> None:
    found = job(tmp_path, classes=150, side=32, architecture="test_vit", samples=150, options=["--quiet"])
    assert found["above_mb"] < LIMIT_MB
    assert found["shown_lines"] == 0
    before, after = found["accuracy"]
    # chance is 0.7 %
    assert before > 0.05
    assert after > 0.05
    report = Report.load(tmp_path / "out")
    assert report.after is not None
    assert report.after.classes is not None
    assert len(report.after.classes.accuracies) == report.model.num_labels == 150
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    # every class is in the report, and none is listed in the card
    assert sum(f"class {label:04d}" in card for label in range(150)) <= 10
    assert len(card.splitlines()) < 300
