"""What a run will take: counted by hand from a speed, and measured without moving the model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfdetox.cli import app as cli
from hfdetox.config import DetoxOptions
from hfdetox.defenses import parse_defense
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import prepare_evaluator
from hfdetox.evidence.cost import Cost, measure_cost, say_scan, say_training
from hfdetox.runs.pulling import pull
from hfdetox.training.devices import make_accelerator
from tests import backdoored
from tests.backdoored import Made


def cost(images: int = 5000, scan: bool = True, speed: float = 100.0) -> Cost:
    """Fine-tuning of 10 epochs in batches of 250, 6,000 passes to measure."""
    method, _ = parse_defense("ft", {"epochs": "10", "batch_size": "250"})
    return Cost(method, images, 6000, scan, speed, "this CPU")


def test_minutes_are_those_of_the_passes() -> None:
    # 20 steps × 10 epochs × 250 images × 2, half as many for the scan, and measuring: 156,000 passes
    assert cost().minutes == pytest.approx(156_000 / 100 / 60)
    assert cost(scan=False).minutes == pytest.approx(106_000 / 100 / 60)


def test_what_would_fit_is_the_least_change() -> None:
    assert cost().fitting(30) == ("", pytest.approx(26))
    # 2,500 images: 81,000 passes
    assert cost().fitting(14) == ("--samples 2500", pytest.approx(13.5))
    # without a scan 100 images, in batches of as many, take 2,000 passes more than the 6,000 of measuring
    assert cost().fitting(1.4) == ("--no-scan --samples 100", pytest.approx(8000 / 6000))
    assert cost().fitting(1) is None


def test_it_is_said_above_a_minute_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    cost().check(None, progress=True)
    assert capsys.readouterr().err == "about 26 minutes on this CPU; 6 minutes with --samples 1000\n"
    cost(speed=100_000).check(None, progress=True)
    cost().check(30, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("most", "line"),
    [
        (14, "about 26 minutes on this CPU, more than --max-minutes 14; --samples 2500 would take about 14 minutes"),
        (0.5, "more than --max-minutes 0.5; fewer clean images will not do"),
    ],
)
def test_a_run_that_takes_too_long_is_refused(most: float, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        cost().check(most, progress=True)


def test_a_scan_says_what_it_takes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    speeds = iter([100.0, 100.0, 100_000.0])
    monkeypatch.setattr("hfdetox.evidence.cost.second_passes", lambda _: next(speeds))
    ten: Any = SimpleNamespace(classifier=SimpleNamespace(labels=list("abcdefghij")),
                               accelerator=SimpleNamespace(device=torch.device("cpu")))  # fmt: skip
    # two classes: 52,080 passes; all ten, and their margins: 416,400
    say_scan(ten, thorough=False, progress=True)
    assert capsys.readouterr().err == "the scan takes about 9 minutes on this CPU\n"
    say_scan(ten, thorough=True, progress=True)
    said = "the scan takes about 69 minutes on this CPU; 9 minutes without --thorough\n"
    assert capsys.readouterr().err == said
    say_scan(ten, thorough=False, progress=True)
    assert capsys.readouterr().err == ""


def test_a_training_says_what_it_takes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("hfdetox.evidence.cost.second_passes", lambda _: 100.0)
    one: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    say_training(one, 60_000, progress=True)
    assert (
        capsys.readouterr().err == "the training takes about 10 minutes on this CPU; fewer --set epochs=… take less\n"
    )
    say_training(one, 5_000, progress=True)
    say_training(one, 60_000, progress=False)
    assert capsys.readouterr().err == ""


def test_measuring_it_moves_nothing(tmp_path_factory: pytest.TempPathFactory, capsys) -> None:
    made: Made = backdoored.made(tmp_path_factory)
    options = DetoxOptions(str(made.timm), dataset=str(made.digits), clean_samples=100, eval_samples=100)
    classifier, images = pull(options, options, pytest.fail)
    evaluation = prepare_evaluator(classifier, images.evaluation, [], make_accelerator("cpu", "no"), target=None,
                                   warn=pytest.fail, progress=False)  # fmt: skip
    before = {name: value.clone() for name, value in classifier.network.state_dict().items()}
    classifier.network.train()
    state = torch.random.get_rng_state()
    found = measure_cost(evaluation, parse_defense("ft", {})[0], 100, scan=True)
    assert found.second_passes > 0
    assert found.measuring == 200
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier.network.training
    assert all(torch.equal(before[name], value) for name, value in classifier.network.state_dict().items())
    assert all(weight.grad is None for weight in classifier.network.parameters())
    assert not replace(found, second_passes=1e9).minutes > 1
    # and from the command line
    words = [str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "100"]
    assert cli.run([*words, "--max-minutes", "0.00001", "--output", str(made.timm.parent / "never")]) == 2
    assert "more than --max-minutes 1e-05" in capsys.readouterr().err
    assert not (made.timm.parent / "never").exists()
