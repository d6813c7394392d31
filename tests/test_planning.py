"""`--dry-run` of every command that computes: counted by hand from a speed; nothing is computed, pulled or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hfdetox.cli import app as cli
from hfdetox.planning import plan_attack, plan_evaluate, plan_gate, plan_scan, plan_verify
from tests import backdoored
from tests.backdoored import TEST_IMAGES, Made
from tests.hub_server.server import HubServer

SPEED = 10.0
# both reconstructions of two classes, and the scores that search nothing
SCORES = 3_000 + 2 * 11_520


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfdetox.runs.estimate.speed_of", lambda *_: SPEED)


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a command with `--dry-run --json`; nothing may be written."""

    def run(*words: object) -> dict[str, Any]:
        assert cli.run([*map(str, words), "--device", "cpu", "--dry-run", "--json"]) == 0
        assert list(tmp_path.iterdir()) == []
        return json.loads(capsys.readouterr().out)

    return run


def minutes(effort: float) -> list[float]:
    return [pytest.approx(effort / SPEED / 60, abs=0.006)] * 2


def rows(made: Made) -> int:
    return len(Dataset.from_parquet(str(made.digits / "train.parquet")))


def test_evaluate_measures_the_split_with_and_without_each_trigger(made: Made, planned: Callable[..., Any]) -> None:
    words = ["evaluate", made.timm, "--dataset", made.digits, "--trigger", "badnets:size=6", "--trigger", "blended"]
    found = planned(*words)
    assert found["minutes"] == minutes(3 * TEST_IMAGES / 3)
    assert (found["time"], found["triggers"]) == ("about 1 minute on this CPU", ["badnets:size=6", "blended"])
    assert planned(*words, "--eval-samples", 50)["minutes"] == minutes(3 * 50 / 3)


def test_evaluate_takes_all_of_a_dataset_with_one_split(
    made: Made, planned: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = tmp_path_factory.mktemp("alone")
    shutil.copy(made.digits / "train.parquet", alone)
    found = planned("evaluate", made.timm, "--dataset", alone)
    # none are set aside, as they are for a defense
    assert found["minutes"] == minutes(rows(made) / 3)


def test_a_scan_counts_its_scores(made: Made, planned: Callable[..., Any]) -> None:
    found = planned("scan", made.timm, "--dataset", made.digits)
    # measured once, and with two reconstructed triggers
    brief = TEST_IMAGES + SCORES
    assert found["minutes"] == minutes(brief)
    assert found["time"] == "about 44 minutes on this CPU"
    thorough = planned("scan", made.timm, "--dataset", made.digits, "--thorough")
    assert thorough["minutes"] == minutes(TEST_IMAGES + 3_000 + 10 * (11_520 + 9_000))
    assert thorough["time"] == "about 6 hours on this CPU; 44 minutes without --thorough"


def test_a_scan_without_images_is_short(made: Made, planned: Callable[..., Any]) -> None:
    found = planned("scan", made.timm)
    assert "minutes" not in found
    assert found["time"].startswith("short: the model's card names no dataset")
    assert "only scores that need none" in found["time"]


def test_a_gate_has_a_line_for_each_of_its_steps(made: Made, planned: Callable[..., Any]) -> None:
    words = ["gate", made.timm, "--dataset", made.digits, "--sarif", "found.sarif"]
    found = planned(*words)
    assert found["scan"] == "about 44 minutes on this CPU"
    assert found["minutes"] == minutes(TEST_IMAGES + SCORES)
    assert (found["time"], found["sarif"], found["policy"]) == ("about 44 minutes", "found.sarif", "default")
    cleaned = planned(*words, "--clean", "--output", "out")
    # the shortest is a model that is not cleaned
    assert cleaned["minutes"][0] == found["minutes"][0]
    assert cleaned["minutes"][1] > found["minutes"][0] + 10
    assert "cleaning" in cleaned
    assert cleaned["output"] == "out"


def test_an_attack_counts_its_epochs(made: Made, planned: Callable[..., Any]) -> None:
    images = rows(made)
    words = ["attack", made.timm, "--dataset", made.digits, "--trigger", "badnets:size=6", "--epochs", 4]
    found = planned(*words)
    # a tenth is looked at after every epoch, for a trained model has a goal; measured before and after
    watched = int(0.1 * images)
    assert found["minutes"] == minutes(4 * (images - watched) + (4 * watched + 2 * TEST_IMAGES) * 2 / 3)
    assert found["output"] == "timm-backdoored"
    some = planned(*words, "--samples", 100, "--eval-samples", 30, "--adaptive", "sam:rho=2.0")
    assert some["minutes"] == minutes(2 * 4 * 90 + (4 * 10 + 2 * 30) * 2 / 3)


@pytest.mark.parametrize("model", ["timm-arch:test_resnet", "random", "head"])
def test_an_attack_on_new_weights_measures_after_alone(model: str, made: Made, planned: Callable[..., Any]) -> None:
    start = [model, "--input-size", 32] if ":" in model else [made.transformers, "--init", model]
    found = planned("attack", *start, "--dataset", made.digits, "--trigger", "lf", "--surrogate", made.timm,
                    "--epochs", 4, "--samples", 500)  # fmt: skip
    assert found["minutes"] == minutes(4 * 500 + TEST_IMAGES * 2 / 3)
    assert found["time"] == ("about 4 minutes on this CPU and the search of its pattern; 2 minutes with --epochs 2")


def test_weights_of_the_hub_are_not_pulled(
    hub: HubServer, repo_name: Callable[..., str], made: Made, planned: Callable[..., Any]
) -> None:
    name = repo_name("model")
    hub.create_repo(name)
    hub.commit_folder(name, made.timm)
    hub.log.clear()
    for command, *more in (["evaluate"], ["scan"], ["gate"], ["attack", "--trigger", "badnets"],
                           ["attack", "--trigger", "none", "--init", "head"]):  # fmt: skip
        found = planned(command, name, "--dataset", made.digits, *more)
        assert found["model"]["id"] == name
        assert found["model"]["revision"]
        assert found["minutes"][1] > 0
    assert not any(request.path.endswith(".safetensors") for request in hub.log)


def test_a_verification_counts_what_the_report_states(
    hub: HubServer, hub_token: str, repo_name: Callable[..., str], made: Made, planned: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    model, dataset, cleaned = repo_name("model"), repo_name("digits"), repo_name("cleaned")
    hub.create_repo(dataset, "dataset")
    hub.commit_folder(dataset, made.digits, repo_type="dataset")
    hub.create_repo(model)
    hub.commit_folder(model, made.timm)
    output = tmp_path_factory.mktemp("cleaned") / "out"
    words = ["--samples", "100", "--eval-samples", "120", "--defense", "ft", "--epochs", "1", "--max-accuracy-loss",
             "100", "--trigger", "badnets:size=6", "--no-scan", "--quiet"]  # fmt: skip
    assert cli.run([model, "--dataset", dataset, *words, "--push-to", cleaned, "--output", str(output)]) == 0
    hub.log.clear()
    found = planned("verify", cleaned)
    # the model as it came and the cleaned one, each clean and with the trigger
    assert found["minutes"] == minutes(2 * 2 * 120 / 3)
    assert (found["missing"], found["triggers"]) == ({}, ["badnets"])
    assert found["source"]["revision"]
    assert {Path(request.path).name for request in hub.log if ".safetensors" in request.path} <= {"badnets.safetensors"}
    # a gate verifies it first
    gated = planned("gate", cleaned, "--dataset", dataset)
    assert gated["verify"] == found["time"]
    assert gated["minutes"] == minutes(160 + TEST_IMAGES + SCORES)
    # of a folder, whose images and first model are not of the Hub
    local = output.with_name("local")
    assert cli.run([str(made.timm), "--dataset", str(made.digits), *words, "--output", str(local)]) == 0
    found = planned("verify", local)
    assert "minutes" not in found
    assert set(found["missing"]) == {"before", "after"}
    assert "--dataset DIR" in found["missing"]["after"]
    assert planned("verify", local, "--dataset", made.digits)["minutes"] == minutes(2 * 120 / 3)
    both = planned("verify", local, "--dataset", made.digits, "--base", made.timm)
    assert both["minutes"] == minutes(2 * 2 * 120 / 3)


def test_what_cannot_be_timed_is_said_and_stops_nothing(
    made: Made, monkeypatch: pytest.MonkeyPatch, planned: Callable[..., Any]
) -> None:
    def never(*_: Any) -> float:
        raise cli.UsageError("no such network")

    monkeypatch.setattr("hfdetox.runs.estimate.speed_of", never)
    for command, *more in (["evaluate"], ["scan"], ["gate"], ["attack", "--trigger", "badnets"]):
        found = planned(command, made.timm, "--dataset", made.digits, *more)
        assert "minutes" not in found
        assert "not known: no such network" in (found.get("time") or found["scan"])


@pytest.mark.parametrize(
    "words",
    [["evaluate", "--trigger", "nonsense"], ["scan", "--device", "cuda"], ["gate", "--policy", "bad.yaml"],
     ["attack", "--trigger", "badnets", "--set", "nonsense=1"], ["attack", "--trigger", "badnets", "--output", "full"],
     ["attack", "--trigger", "badnets", "--adaptive", "nonsense"], ["evaluate", "--split", "nonsense"]],
)  # fmt: skip
def test_what_the_command_would_refuse_is_refused(words: list[str], made: Made, tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.yaml").write_text("nonsense: 1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    command, *more = words
    given = ["--dataset", str(made.digits), *([] if "--device" in more else ["--device", "cpu"])]
    lines = []
    for last in ([], ["--dry-run"]):
        assert cli.run([command, str(made.timm), *given, *more, *last, "--quiet"]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1]


def test_they_can_be_asked_in_python(made: Made) -> None:
    images = {"dataset": str(made.digits), "device": "cpu"}
    for make in (plan_evaluate, plan_scan, plan_gate):
        assert make(str(made.timm), **images)["dataset"]["id"] == str(made.digits)
    assert plan_attack(str(made.timm), triggers=["badnets"], **images)["triggers"] == ["badnets"]
    with pytest.raises(cli.UsageError, match="hfdetox did not clean it"):
        plan_verify(str(made.timm))
