"""The report of an attack: its file, what it refuses, and when the goals are missed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hfdetox.errors import UsageError
from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Measurement, TriggerResult
from hfdetox.reporting.card import build_card
from hfdetox.reporting.report import AttackReport, Goals, missed_goals
from hfdetox.runs.publish import comes_backdoored, is_backdoored
from tests.attacked import attack_report, clean_control
from tests.reporting.test_report import VERSION_1


def test_the_file_gives_the_same_report(tmp_path: Path) -> None:
    report = attack_report()
    assert report.save(tmp_path).name == "attack_report.json"
    assert AttackReport.load(tmp_path) == report
    assert list(json.loads(report.to_json()))[:2] == ["schema_version", "hfdetox_version"]


def test_a_report_of_version_1_is_read_and_written_as_version_4() -> None:
    old = json.loads((VERSION_1 / "attack_report.json").read_text())
    assert (old["schema_version"], old["took"], "succeeded" in old) == (1, True, False)
    report = AttackReport.load(VERSION_1)
    assert report == attack_report()
    new = report.to_dict()
    assert (new["schema_version"], new["succeeded"], "took" in new) == (4, True, False)
    with pytest.raises(UsageError, match="schema version 5; this hfdetox reads 1 to 4"):
        AttackReport.from_dict({**new, "schema_version": 5})


def test_only_a_report_with_triggers_is_of_a_backdoored_model() -> None:
    assert attack_report().backdoored
    assert not clean_control().backdoored


def test_a_model_that_started_from_a_backdoored_one_is_backdoored(tmp_path: Path) -> None:
    report = clean_control()
    report = replace(report, attack=replace(report.attack, start_backdoored=True))
    assert report.backdoored
    report.save(tmp_path)
    assert is_backdoored(tmp_path)
    # reports of earlier versions do not say it
    plain = json.loads(report.to_json())
    del plain["attack"]["start_backdoored"]
    (tmp_path / "attack_report.json").write_text(json.dumps(plain))
    assert not AttackReport.load(tmp_path).backdoored


def test_what_a_models_own_files_say_of_it(tmp_path: Path) -> None:
    assert not comes_backdoored(None)
    assert not comes_backdoored(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: backdoor\n---\n")
    assert not comes_backdoored(tmp_path)
    (tmp_path / "README.md").write_text(build_card(attack_report(), source_card=None, repo_id=None))
    assert comes_backdoored(tmp_path)
    # cleaned by hfdetox
    (tmp_path / "detox_report.json").write_text("{}")
    assert not comes_backdoored(tmp_path)
    attack_report().save(tmp_path)
    assert comes_backdoored(tmp_path)
    clean_control().save(tmp_path)
    assert not comes_backdoored(tmp_path)
    (tmp_path / "attack_report.json").write_text("{")
    with pytest.raises(UsageError, match="is not a hfdetox report"):
        comes_backdoored(tmp_path)


@pytest.mark.parametrize("place", [(), ("attack",), ("attack", "triggers", "dot"), ("goals",)])
def test_an_unknown_field_is_refused(place: tuple[str, ...], tmp_path: Path) -> None:
    plain = json.loads(attack_report().to_json())
    inner = plain
    for key in place:
        inner = inner[key]
    inner["strange"] = 1
    (tmp_path / "attack_report.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=r"attack_report\.json is not a hfdetox report: unknown fields \['strange'\]"):
        AttackReport.load(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "is not a hfdetox report"), ('{"schema_version": 7}', "version 7")])
def test_what_is_no_report_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no attack_report\.json"):
        AttackReport.load(tmp_path)
    (tmp_path / "attack_report.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        AttackReport.load(tmp_path)


def measured(accuracy: int, success: int, target: int | str = 0) -> Measurement:
    """Return a measurement on 100 images."""
    result = TriggerResult("badnets", "badnets", "native", None, target, rate(success, 100), rate(0, 100))
    return Measurement(rate(accuracy, 100), 0.1, {"dot": result})


def test_the_goals_are_reached_at_their_value_and_missed_below() -> None:
    goals = Goals(0.9, 0.8)
    assert missed_goals(measured(80, 90), goals) == []
    assert missed_goals(measured(79, 90), goals) == ["the accuracy is 79.0 %, below 80.0 %"]
    assert missed_goals(measured(80, 89), goals) == ["trigger dot succeeds on 89.0 % of the images, below 90.0 %"]
    assert missed_goals(measured(1, 90), replace(goals, accuracy=None)) == []


def test_the_goal_of_all_to_all_is_times_the_accuracy() -> None:
    # 0.5 × 0.8 = 0.4
    goals = Goals(0.5, None)
    assert missed_goals(measured(80, 40, "all-to-all"), goals) == []
    assert missed_goals(measured(80, 39, "all-to-all"), goals) != []
    assert missed_goals(measured(80, 40), goals) != []
