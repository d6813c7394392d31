"""What a command will take: counted by hand from a speed, and measured without moving the model."""

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
from hfdetox.evidence.cost import Cost, measure_cost, measuring_effort, say_cost, scan_efforts, spoken
from hfdetox.runs.pulling import pull
from hfdetox.training.devices import make_accelerator
from tests import backdoored
from tests.backdoored import Made


def cost(images: int = 5000, scan: bool = True, speed: float = 50.0, defense: str = "ft", residual: bool = False,
         triggers: int = 0) -> Cost:  # fmt: skip
    """Ten epochs in batches of 250, 3,000 images to measure."""
    method, _ = parse_defense(defense, {"epochs": "10", "batch_size": "250"})
    return Cost(method, images, 10, 3000, triggers, speed, "this CPU", scan, residual)


def alike(minutes: float) -> Any:
    """Return what a run without two ways takes."""
    return (pytest.approx(minutes), pytest.approx(minutes))


def test_minutes_are_those_of_the_images() -> None:
    # 50,000 images there and back; a third of 3,000, before and after: 2,000
    assert cost(scan=False).minutes == alike(52_000 / 50 / 60)
    # the scan as half as much, and 4,000 to measure the two triggers that it reconstructs
    assert cost().minutes == alike(81_000 / 50 / 60)
    # of more than twice 26,040 the scan takes no half
    assert cost(50_000).minutes == alike((500_000 + 26_040 + 6_000) / 50 / 60)
    assert cost(scan=False, triggers=2).minutes == alike(56_000 / 50 / 60)
    # a known trigger: two re-tunings of 1,000 images, 5 epochs, and 2,000 images looked at 36 times
    assert cost(scan=False, triggers=1, residual=True).minutes == alike((54_000 + 10_000 + 24_000) / 50 / 60)
    assert cost(scan=False, residual=True).minutes == cost(scan=False).minutes


def test_a_defense_that_looks_first_may_take_two_ways() -> None:
    found = cost(2500, defense="d3:auto", scan=False)
    # one class unlearnt: 220 and 2 × 50 steps of 48; 75 steps are 3 epochs in batches of 96; looked at 3 times
    assert found.minutes[0] == pytest.approx((2000 + 320 * 48 + 3 * 2500 + 7500 / 3) / 50 / 60)
    # pushed: searched once, and ten classes screened; 20 epochs for 200 steps; looked at 2 and 5 times
    pushed = 2000 + 2 * 220 * 48 + 10 * 25 * 32 + 20 * 2500 + 7 * 2500 / 3
    # or four classes unlearnt, patches too
    unlearnt = 2000 + 4 * (320 + 120) * 48 + 3 * 2500 + 7500 / 3
    assert found.minutes[1] == pytest.approx(max(pushed, unlearnt) / 50 / 60)
    assert str(found) == "about 9 to 32 minutes on this CPU"
    with pytest.raises(UsageError, match="about 9 to 32 minutes on this CPU, more than --max-minutes 31"):
        found.check(31)


def test_what_would_fit_is_the_least_change() -> None:
    assert cost().fitting(30) == ("", cost())
    # 2,500 images: 25,000 and half of it, 6,000 to measure
    found = cost().fitting(15)
    assert found is not None
    assert (found[0], found[1].minutes) == ("--samples 2500", alike(43_500 / 3000))
    # without a scan 100 images take 1,000 more than the 2,000 of measuring
    assert cost().fitting(1.1) == ("--no-scan --samples 100", cost(100, scan=False))
    assert cost().fitting(0.9) is None


def test_it_is_said_above_a_minute_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    cost().say(progress=True)
    assert capsys.readouterr().err == "about 27 minutes on this CPU; 7 minutes with --samples 1000\n"
    cost(speed=100_000).say(progress=True)
    cost().say(progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("minutes", "words"),
    [((0.2,), "1 minute"), ((2.4, 2.4), "2 minutes"), ((1, 1.6), "1 to 2 minutes"), ((170,), "170 minutes"),
     ((20, 190), "1 to 3 hours"), ((4000,), "67 hours")],
)  # fmt: skip
def test_minutes_in_words(minutes: tuple[float, ...], words: str) -> None:
    assert spoken(*minutes) == words


@pytest.mark.parametrize(
    ("most", "line"),
    [
        (15, "about 27 minutes on this CPU, more than --max-minutes 15; --samples 2500 would take about 14 minutes"),
        (0.5, "more than --max-minutes 0.5; fewer clean images will not do"),
    ],
)
def test_a_run_that_takes_too_long_is_refused(most: float, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        cost().check(most)
    cost().check(None)
    cost().check(27.4)


def test_a_command_says_what_it_takes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("hfdetox.evidence.cost.speed_on", lambda _: 50.0)
    ten: Any = SimpleNamespace(classifier=SimpleNamespace(labels=list("abcdefghij")), clean=range(3000), views=[],
                               accelerator=SimpleNamespace(device=torch.device("cpu")))  # fmt: skip
    # two classes: 26,040 images there and back; all ten, and their margins: 208,200; 3,000 to measure
    say_cost(ten, "the scan", *scan_efforts(measuring_effort(ten), 3000, 10, thorough=False), progress=True)
    assert capsys.readouterr().err == "the scan takes about 10 minutes on this CPU\n"
    say_cost(ten, "the scan", *scan_efforts(measuring_effort(ten), 3000, 10, thorough=True), progress=True)
    said = "the scan takes about 70 minutes on this CPU; 10 minutes without --thorough\n"
    assert capsys.readouterr().err == said
    say_cost(ten, "the attack", 2900, besides="the search of its pattern", progress=True)
    assert capsys.readouterr().err == "the attack takes about 1 minute on this CPU and the search of its pattern\n"
    say_cost(ten, "the training", 2900, progress=True)
    say_cost(ten, "the training", 60_000, progress=False)
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
    found = measure_cost(evaluation, parse_defense("ft", {})[0], 100, scan=True, residual=False)
    assert found.speed > 0
    assert (found.measured, found.classes, found.where) == (100, 10, "this CPU")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier.network.training
    assert all(torch.equal(before[name], value) for name, value in classifier.network.state_dict().items())
    assert all(weight.grad is None for weight in classifier.network.parameters())
    assert not replace(found, speed=1e9).minutes[1] > 1
    # and from the command line
    words = [str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "100"]
    assert cli.run([*words, "--max-minutes", "0.00001", "--output", str(made.timm.parent / "never")]) == 2
    assert "more than --max-minutes 1e-05" in capsys.readouterr().err
    assert not (made.timm.parent / "never").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--trigger", "badnets"], "measuring takes about "),
        (["scan"], "the scan takes about "),
        (["gate"], "the scan takes about "),
    ],
)
def test_each_command_says_it_before_its_work(
    words: list[str], said: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class EnoughError(Exception):
        pass

    def measure(*_: Any, **__: Any) -> Any:
        raise EnoughError

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("hfdetox.evidence.cost.speed_on", lambda _: 0.1)
    monkeypatch.setattr("hfdetox.evaluation.evaluator.measure", measure)
    made = backdoored.made(tmp_path_factory)
    command, *more = words
    images = ["--dataset", str(made.digits), "--eval-samples", "50", "--device", "cpu"]
    for quiet in ([], ["--quiet"]):
        with pytest.raises(EnoughError):
            cli.run([command, str(made.timm), *images, *more, *quiet])
        assert (said in capsys.readouterr().err) is not bool(quiet)
