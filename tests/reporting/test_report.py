"""The report: whole through JSON, and what is not one is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfdetox.data.info import DatasetInfo
from hfdetox.errors import UsageError
from hfdetox.evaluation.results import Measurement, Rate, Rating, TriggerResult
from hfdetox.models.classifier import ModelInfo  # fmt: skip
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.report import DefenseInfo, EnvironmentInfo, OutputInfo, Report, describe_target
from tests.written_report import written_report

# as hfdetox 0.1.0 wrote them
VERSION_1 = Path(__file__).parent / "version_1"


def measurement(successes: int) -> Measurement:
    """Return a measurement with one trigger."""
    attack, robust = Rate(successes / 9, successes, 9, (0.1, 0.9)), Rate(0.0, 0, 9, (0.0, 0.34))
    trigger = TriggerResult("badnets", "badnets:size=4", "native", "f" * 64, 2, attack, robust)
    return Measurement(Rate(0.9, 9, 10, (0.55, 0.99)), 0.123456789012345, {"patch": trigger})


def full_report() -> Report:
    """Return a report in which every field has a value of its own."""
    return Report(
        hfdetox_version="0.1.0",
        model=ModelInfo("org/model", "a" * 40, "timm", "resnet18", 10, 11_000_000, "float16", "b" * 64),
        dataset=DatasetInfo(
            "org/data", "plain", "train", "test", "c" * 40, "hub", 2500, 10, "d" * 64, "e" * 64, {"1": "cat"}),
        defense=DefenseInfo(
            "d3", "paper", {"lambda": 10.0, "layers": ["head"], "max_grad_norm": None, "freeze_norm": True}, ["fc"], 3,
            30, 1.5, 512.25, "bf16", ["cpu", "cpu"]),
        before=measurement(9), after=measurement(1),
        defense_effectiveness_rating={"patch": Rating(0.94, (0.7, 0.99)), "mean": Rating(0.94, (0.7, 0.99))},
        history=[{"phase": "d3", "epoch": 1, "clean_loss": 0.5, "distance": 1 / 3}],
        output=OutputInfo("1" * 64, "me/model", "2" * 40),
        environment=EnvironmentInfo("3.11", "2.15", "1.15", "5.23", "1.0.31", "5.2", "cpu", 0, "hfdetox org/model"),
        warnings=["a – dash"],
    )  # fmt: skip


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    report = full_report()
    path = report.save(tmp_path)
    assert path == tmp_path / "detox_report.json"
    again = Report.load(tmp_path)
    assert again == report
    assert again.after is not None
    assert again.after.triggers["patch"].attack_success_rate.interval == (0.1, 0.9)
    assert again.history[0]["distance"] == 1 / 3
    assert "a – dash" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"after": None, "defense_effectiveness_rating": None},
        {"before": None, "history": []},
        {"output": OutputInfo(), "warnings": []},
        {"before": replace(measurement(3), triggers={})},
        {"model": replace(full_report().model, revision=None, weights_sha256=None)},
    ],
)
def test_round_trip_of_a_report_with_gaps(changes: dict[str, Any], tmp_path: Path) -> None:
    report = replace(full_report(), **changes)
    report.save(tmp_path)
    assert Report.load(tmp_path) == report


def test_the_keys_are_those_of_the_contract() -> None:
    plain = json.loads(json.dumps(full_report().to_dict()))
    assert list(plain)[:2] == ["schema_version", "hfdetox_version"]
    assert plain["schema_version"] == 4
    assert set(plain) - {"warnings"} == {
        "schema_version", "hfdetox_version", "model", "dataset", "defense", "before", "after",
        "defense_effectiveness_rating", "history", "output", "environment", "uncorrected",
        "accuracy_loss", "evidence", "taxonomies",
    }  # fmt: skip
    assert set(plain["model"]) == {
        "id", "revision", "library", "architecture", "num_labels", "parameters", "dtype", "weights_sha256",
    }  # fmt: skip
    assert set(plain["dataset"]) == {
        "id", "config", "split", "eval_split", "revision", "source", "clean_samples", "eval_samples", "indices_sha256",
        "eval_indices_sha256", "label_map", "named_by_card", "pixel_range", "asked",
    }  # fmt: skip
    assert set(plain["defense"]) == {
        "name", "preset", "parameters", "layers", "epochs", "steps", "seconds", "images_per_second", "precision",
        "devices", "peak_memory", "choices", "description", "trigger_given",
    }  # fmt: skip
    assert set(plain["before"]) == {"accuracy", "loss", "triggers", "classes"}
    assert set(plain["before"]["accuracy"]) == {"value", "successes", "samples", "interval"}
    assert set(plain["before"]["triggers"]["patch"]) == {
        "kind", "spec", "mode", "file_sha256", "target", "attack_success_rate", "robust_accuracy",
        "accuracy_without", "destination",
    }  # fmt: skip
    assert set(plain["defense_effectiveness_rating"]["mean"]) == {"value", "interval"}
    assert set(plain["output"]) == {"weights_sha256", "pushed_to", "commit"}
    assert set(plain["environment"]) == {
        "python", "torch", "accelerate", "transformers", "timm", "datasets", "device", "seed", "command", "threads",
    }  # fmt: skip


def test_a_target_is_an_index_or_all_to_all(tmp_path: Path) -> None:
    known = measurement(3)
    moved = replace(known.triggers["patch"], target="all-to-all")
    report = replace(full_report(), before=replace(known, triggers={"patch": moved}))
    report.save(tmp_path)
    again = Report.load(tmp_path)
    assert again == report
    assert again.before is not None
    assert again.after is not None
    assert again.before.triggers["patch"].target == "all-to-all"
    assert again.after.triggers["patch"].target == 2


def test_targets_in_words() -> None:
    assert describe_target(1, ["cat", "dog"]) == "dog"
    assert describe_target(1) == "1"
    assert describe_target("all-to-all", ["cat", "dog"]) == describe_target("all-to-all")
    assert describe_target("all-to-all") == "every class to the next one"


@pytest.mark.parametrize("version", [0, 5, "1", True, 1.0, None])
def test_another_schema_version_is_refused(version: object) -> None:
    plain = {**full_report().to_dict(), "schema_version": version}
    with pytest.raises(UsageError, match=f"schema version {version!r}; this hfdetox reads 1 to 4"):
        Report.from_dict(plain)


def test_a_report_of_an_earlier_version_is_read() -> None:
    again = Report.load(VERSION_1)
    assert json.loads((VERSION_1 / "detox_report.json").read_text())["schema_version"] == 1
    now, old = written_report(), {"accuracy_without": None, "destination": None}
    before, after = (
        replace(one, triggers={name: replace(trigger, **old) for name, trigger in one.triggers.items()})
        for one in (now.before, now.after) if one is not None
    )  # fmt: skip
    assert again == replace(now, defense=replace(now.defense, description=""), before=before, after=after)
    assert again.schema_version == 4
    # where its images go was not measured, so that less can be said
    assert again.verdicts["badnets"] == "inconclusive"
    validate_card(build_card(again, source_card=None, repo_id=None))


@pytest.mark.parametrize("part", ["", "model", "before", "output"])
def test_unknown_fields_are_refused(part: str, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(full_report().to_dict()))
    (plain[part] if part else plain)["colour"] = "red"
    (tmp_path / "detox_report.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=r"is not a hfdetox report: unknown fields \['colour'\] for"):
        Report.load(tmp_path)


def test_missing_fields_are_refused(tmp_path: Path) -> None:
    plain = full_report().to_dict()
    del plain["model"]["library"]
    (tmp_path / "detox_report.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=r"is not a hfdetox report: .*library"):
        Report.load(tmp_path)


def test_no_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no detox_report.json; it was not written by hfdetox"):
        Report.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b'"text"', b"3", b"[" * 100_000])
def test_what_is_no_report_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "detox_report.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"is not a hfdetox report") as caught:
        Report.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_not_are_refused_and_nothing_is_written(number: float, tmp_path: Path) -> None:
    report = replace(full_report(), before=replace(measurement(1), loss=number))
    with pytest.raises(ValueError, match=r"Out of range float values"):
        report.save(tmp_path)
    assert not (tmp_path / "detox_report.json").exists()


def test_reports_cannot_be_changed_in_place() -> None:
    report = full_report()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.hfdetox_version = "2"  # type: ignore[misc]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_in_a_field_of_any_kind(number: float) -> None:
    plain = written_report().to_dict()
    settings = next(value for value in plain["defense"].values() if isinstance(value, dict) and "epsilon" in value)
    settings["epsilon"] = number
    with pytest.raises(UsageError, match="a number in it is not finite"):
        Report.from_dict(plain)
