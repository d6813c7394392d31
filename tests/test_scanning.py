"""A scan of a real model, alone and inside a run: what is said, what is written, and what stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hfdetox import detoxify, scan
from hfdetox.cli import app as cli
from hfdetox.errors import RunError
from hfdetox.evidence.results import Finding
from hfdetox.models.classifier import load_classifier
from hfdetox.reporting.report import Report
from hfdetox.triggers import load_trigger
from tests import backdoored
from tests.backdoored import NAMES, Made
from tests.tiny_models import edit_weights

WORDS = set(Finding)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_scan_says_what_it_found_and_measures_what_it_reconstructed(library: str, made: Made) -> None:
    found = scan(getattr(made, library), dataset=str(made.digits), clean_samples=400, progress=False)
    assert found.scan.finding in WORDS
    assert found.scan.samples == 400
    assert found.when == "before"
    assert found.dataset is not None
    assert found.measurement is not None
    assert found.measurement.accuracy.samples == backdoored.TEST_IMAGES
    assert found.measurement.triggers == {}
    assert {"latent-shift", "head-probe", "odd-images", "patch", "blend"} <= set(found.scan.scores)
    # for one class, by both families, on images that nothing was searched on
    assert {one.score for one in found.reconstructed.values()} == {"patch", "blend"}
    assert len({one.label for one in found.reconstructed.values()}) == 1
    for name, one in found.reconstructed.items():
        assert name == f"reconstructed-{one.score}-{one.label}"
        assert one.class_name == NAMES[one.label]
        assert one.after is None
        assert one.before.attack_success_rate.samples > 400
    assert found.images is not None
    assert found.images.samples == 400
    assert found.images.bound == pytest.approx(1 - 0.025 ** (1 / 400))


def test_the_command_prints_one_document_or_lines(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scan", str(made.timm), "--dataset", str(made.digits), "--samples", "120", "--eval-samples", "100"]
    assert cli.run([*words, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scan"]["finding"] in WORDS
    assert set(document) == {"model", "dataset", "when", "scan", "measurement", "reconstructed", "images", "warnings"}
    assert cli.run([*words, "--cleaned", "--quiet"]) == 0
    assert cli.run([*words[:1], str(made.timm), "--samples", "0"]) == 2


def test_without_a_dataset_the_scores_that_need_no_image_are_measured(made: Made) -> None:
    found = scan(made.timm, progress=False)
    assert found.dataset is None
    assert found.measurement is None
    assert found.images is None
    assert found.scan.samples == 0
    assert found.scan.finding == Finding.UNKNOWN
    assert found.scan.scores["head-probe"].statistic is not None
    assert found.scan.scores["latent-shift"].note == "needs clean images"
    assert any("names no dataset" in line for line in found.warnings)


def test_a_model_near_chance_is_unknown_and_no_error(made: Made, tmp_path: Path) -> None:
    classifier = load_classifier(made.timm)
    classifier.save(tmp_path / "broken")
    torch.manual_seed(0)
    edit_weights(tmp_path / "broken", lambda state: {
        name: torch.randn_like(tensor) * 0.1 if name.startswith("fc") else tensor for name, tensor in state.items()
    })  # fmt: skip
    found = scan(tmp_path / "broken", dataset=str(made.digits), clean_samples=120, eval_samples=200, progress=False)
    assert found.scan.finding == Finding.UNKNOWN
    assert "too few to tell a backdoor from what it never learnt" in found.scan.why


def test_a_run_scans_before_and_after_and_the_result_is_that_without(made: Made, tmp_path: Path) -> None:
    options = {"dataset": str(made.digits), "clean_samples": 200, "eval_samples": 200, "defense": "ft",
               "settings": {"epochs": "30", "batch_size": "64"}, "progress": False,
               "max_accuracy_loss": 100}  # fmt: skip
    given = detoxify(made.timm, output=tmp_path / "with", **options)
    without = detoxify(made.timm, output=tmp_path / "without", scan=False, **options)
    assert without.report.evidence is None
    assert "Without the attacker's trigger" not in (tmp_path / "without" / "README.md").read_text()
    # nothing of the run is another one for it
    assert given.report.output.weights_sha256 == without.report.output.weights_sha256
    assert given.report.after == without.report.after

    report = Report.load(tmp_path / "with")
    evidence = report.evidence
    assert evidence == given.report.evidence
    assert evidence is not None
    assert evidence.before is not None
    assert evidence.after is not None
    assert evidence.agreement is not None
    assert {evidence.before.finding, evidence.after.finding} <= WORDS
    assert "scar" in evidence.after.scores
    # both scans together, of 2 · 30 · 4 · 64 passes of the run
    assert evidence.before.passes + evidence.after.passes <= 15_360 / 2 + 400
    card = (tmp_path / "with" / "README.md").read_text()
    assert "## Without the attacker's trigger" in card
    for name, one in evidence.reconstructed.items():
        assert one.after is not None
        assert load_trigger(tmp_path / "with" / "triggers" / f"{name}.safetensors").kind == "mask"
        assert name not in (report.before.triggers if report.before else {})
    assert (tmp_path / "with" / "plots" / "reconstructed.png").exists() == bool(evidence.reconstructed)


def test_the_clean_images_are_graded_on_the_terminal_before_the_training(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    words = ["detox", made.timm, "--dataset", made.digits, "--samples", "120", "--eval-samples", "100", "--defense",
             "ft", "--epochs", "1", "--max-accuracy-loss", "100", "--output", tmp_path / "out"]  # fmt: skip
    assert cli.run([*map(str, words)]) == 0
    shown = capsys.readouterr()
    said = "120 clean images: no failure in as many would bound a rate at 3 % at best; 0 exact duplicates; "
    assert shown.err.count(said) == 1
    report = Report.load(tmp_path / "out")
    assert report.evidence is not None
    assert report.evidence.images is not None
    assert report.evidence.images.described in shown.err
    assert f"The {report.evidence.images.described}." in (tmp_path / "out" / "README.md").read_text()

    def stops(*_: object, **__: object) -> None:
        raise RunError("no training here")

    monkeypatch.setattr("hfdetox.detox.train", stops)
    for quiet in (False, True):
        again = [*words[:-1], tmp_path / f"other-{quiet}", *(["--quiet"] if quiet else [])]
        assert cli.run([*map(str, again)]) == 1
        assert (said in capsys.readouterr().err) is not quiet


def test_a_long_run_measures_what_was_reconstructed_before_and_after(made: Made, tmp_path: Path) -> None:
    result = detoxify(made.timm, dataset=str(made.digits), clean_samples=400, eval_samples=300, defense="ft",
                      settings={"epochs": "100", "batch_size": "128"}, progress=False, output=tmp_path / "out",
                      max_accuracy_loss=100)  # fmt: skip
    evidence = result.report.evidence
    assert evidence is not None
    assert evidence.reconstructed
    for one in evidence.reconstructed.values():
        assert one.after is not None
        assert one.before.file_sha256 == one.after.file_sha256
        assert one.before.attack_success_rate.samples == one.after.attack_success_rate.samples
    names = [one.metric_name for one in ModelCard.load(tmp_path / "out" / "README.md").data.eval_results]
    assert sum("reconstructed" in name for name in names) == len(evidence.reconstructed)
    assert (tmp_path / "out" / "plots" / "reconstructed.png").is_file()
