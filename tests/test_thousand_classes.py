"""The job on many classes at toy size: what it needs, and that what it writes can be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hfdetox.evidence.claims import MOVED_CLASSES, SHOWN_SHIFTS
from hfdetox.reporting.report import Report
from tests.benchmarks.thousand_classes import LIMIT_MB

REPOSITORY = Path(__file__).resolve().parent.parent


def test_many_classes_go_through_the_job_within_the_limit(tmp_path: Path) -> None:
    # in a process of its own, for the most memory that it held is counted
    subprocess.run([sys.executable, "-m", "tests.benchmarks.thousand_classes", "--classes", "150", "--size", "32",
                    "--architecture", "test_vit", "--keep", tmp_path, "--output",
                    tmp_path / "found.json", "--", "--quiet"],
                   check=True, cwd=REPOSITORY, capture_output=True)  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
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
    # every class is in the report, and of them the card has the worst ten, those that moved most, what is accused, and
    # the latent shifts that stand out
    named = 10 + 2 * MOVED_CLASSES + 2 + 2 * SHOWN_SHIFTS + 1
    assert sum(f"class {label:04d}" in card for label in range(150)) <= named
    assert len(card.splitlines()) < 300
