"""A run of `d3:auto` on digits: what it found itself is in report and card, and the backdoor is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfdetox.reporting.report import Report
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER, Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def test_the_settings_that_a_run_finds_itself_are_said_with_their_reasons(
    made: Made, run_cli: Any, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    """A digit's mirror image is another thing: `d3:auto` sees that the model knows no flips, and uses none."""
    done = run_cli([str(made.timm), "--dataset", str(made.digits), "--samples", "400", "--trigger", TRIGGER,
                    "--target", TARGET, "--defense", "d3:auto", "--output", "out"], env=fresh_env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report, card = Report.load(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert report.defense.preset == "auto"
    way, accused, length, features, augmentation = report.defense.choices
    assert way.startswith("Something speaks for a backdoor, and what was reconstructed of it was unlearnt")
    assert accused.startswith("Taken as possible targets: class ")
    assert length.startswith(f"{report.defense.epochs} epochs, {report.defense.steps} steps")
    assert features.startswith("SGD trained the network; its weights are the mean")
    assert augmentation.startswith("Augmentation none: the model as it came has ")
    for sentence in report.defense.choices:
        assert f"- {sentence}" in card
    assert report.before is not None
    assert report.after is not None
    rates = [next(iter(m.triggers.values())).attack_success_rate.value for m in (report.before, report.after)]
    assert rates[0] > 0.9
    assert rates[1] < 0.1
    assert report.after.accuracy.value > report.before.accuracy.value - 0.05
