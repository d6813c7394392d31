"""Gone or asleep: re-tuning, the path between suspect and cleaned weights, and drift, on a small backdoored network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hfdetox.cli.app import run
from hfdetox.data.cache import Pixels
from hfdetox.data.load import load_images
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator
from hfdetox.evidence.inquiry import Inquiry
from hfdetox.evidence.residual import EPOCHS, STEPS_OF_PATH, residual
from hfdetox.evidence.results import Residual
from hfdetox.models.classifier import load_classifier
from hfdetox.reporting.report import Report
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import parse_trigger
from tests.backdoored import NAMES, TARGET, TRIGGER, made


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return make_accelerator("cpu", "no")


@pytest.fixture
def evaluation(tmp_path_factory: pytest.TempPathFactory, accelerator: Accelerator) -> tuple[Evaluator, Pixels]:
    folders = made(tmp_path_factory)
    classifier = load_classifier(folders.timm)
    images = load_images(folders.digits, labels=NAMES, clean_samples=150, eval_samples=100)
    prepared = prepare_evaluator(classifier, images.evaluation, [parse_trigger(TRIGGER)], accelerator, target=TARGET,
                                 warn=lambda _: None, progress=False)  # fmt: skip
    return prepared, decoded(images.clean, classifier, accelerator, "decode", progress=False)


def test_a_model_that_nothing_was_done_to_keeps_its_backdoor_all_along(evaluation: tuple[Evaluator, Pixels]) -> None:
    """All points of the path are the model itself, and tuning with triggered images leaves the backdoor."""
    prepared, clean = evaluation
    before = {name: tensor.clone() for name, tensor in prepared.classifier.network.state_dict().items()}
    found = residual(prepared, clean, before, prepared.views)["badnets"]
    success = prepared.measure("again").measurement.triggers["badnets"].attack_success_rate
    assert [one.successes for one in found.path] == [success.successes] * (STEPS_OF_PATH + 1)
    assert found.reaches == 1.0
    assert found.retuned[0] == found.plain[0] == success
    assert len(found.retuned) == len(found.plain) == EPOCHS + 1
    assert found.retuned[-1].value > 0.8
    # images of the target are answered right with the trigger, the others are not
    assert found.drift[0] == found.drift[1]
    assert found.drift[1].value < 0.3
    assert (found.triggered, found.clean) == (5, 145)
    after = prepared.classifier.network.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_five_images_wake_what_only_sleeps(evaluation: tuple[Evaluator, Pixels]) -> None:
    """The target's answer is held down by its bias alone: clean tuning and five triggered images bring it back."""
    prepared, clean = evaluation
    network = prepared.classifier.network
    suspect = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        network.get_parameter("model.fc.bias")[NAMES.index(TARGET)] -= 20
    found = residual(prepared, clean, suspect, prepared.views)["badnets"]
    assert found.path[0].value > 0.8
    assert found.path[-1] == found.retuned[0] == found.plain[0]
    assert found.retuned[0].value < 0.1
    assert found.retuned[-1].interval[0] > 0.2
    assert 0 < found.reaches < 1


def test_without_triggers_there_is_nothing_to_test(evaluation: tuple[Evaluator, Pixels]) -> None:
    """No trigger, no number."""
    prepared, clean = evaluation
    assert residual(prepared, clean, prepared.classifier.network.state_dict(), []) == {}


def test_how_far_the_attack_reaches() -> None:
    """It is the last point with half of the success that there was at first, whatever lies between."""
    from hfdetox.evaluation.metrics import rate

    path = [rate(count, 100) for count in (90, 80, 20, 50, 44, 10, 0, 0, 0, 0, 0)]
    assert Residual(path[:1], path[:1], path, path, path[:2], 5, 95).reaches == 0.3


@pytest.mark.parametrize("scan", [True, False])
def test_a_run_that_is_asked_tests_every_trigger_it_knows(
    scan: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report, card and terminal have the numbers of known and of reconstructed triggers."""
    folders = made(tmp_path_factory)
    output = tmp_path / "out"
    words = [str(folders.timm), "--dataset", str(folders.digits), "--trigger", TRIGGER, "--target", TARGET, "--samples"]
    words += ["120", "--eval-samples", "100", "--defense", "ft", "--epochs", "2", "--residual", "--output", str(output)]
    assert run([*words, *([] if scan else ["--no-scan"])]) == 0
    report = Report.load(output)
    assert report.evidence is not None
    names = ["badnets", *report.evidence.reconstructed]
    assert bool(report.evidence.scans) == scan
    assert list(report.evidence.residual) == names
    one, after = report.evidence.residual["badnets"], report.after
    assert after is not None
    assert one.retuned[0] == one.path[-1] == after.triggers["badnets"].attack_success_rate
    assert (one.triggered, one.clean) == (5, 115)
    card = (output / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "Gone, or asleep?" in card
    made_here = report.evidence.reconstructed
    for name in (made_here[name].title if name in made_here else name for name in names):
        assert f"gone or asleep, {name}: " in printed
        assert f"| `{name}` | " in card


def test_what_was_reconstructed_is_tested_too(evaluation: tuple[Evaluator, Pixels]) -> None:
    """Beside the known triggers, under its own name."""
    prepared, clean = evaluation
    inquiry = Inquiry(prepared, clean, 0, tested=True)
    measured = prepared.measure("before")
    inquiry.begin(measured)
    found = inquiry.end(measured, measured)
    assert found is not None
    assert found.reconstructed
    assert list(found.residual) == ["badnets", *found.reconstructed]
    for name, one in found.reconstructed.items():
        assert found.residual[name].path[0] == one.before.attack_success_rate
