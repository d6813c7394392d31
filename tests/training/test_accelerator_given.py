"""A process in which somebody else uses Accelerate: theirs counts where it is passed, and is never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker
from torch import nn

import hfdetox
from hfdetox import UsageError
from tests.colours import write_colours
from tests.tiny_training import _quick_garbage

__all__ = ["_quick_garbage"]

FT = {"epochs": "1", "batch_size": "16", "augmentation": "none"}
Run = Callable[..., Any]


class Lines(GeneralTracker):
    """A tracker of the caller's."""

    name = "lines"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int | None, **rest: Any) -> None:
        self.lines.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def _nobody_elses() -> Iterator[None]:
    """Begin as a process does that has not used Accelerate."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and its dataset."""
    dataset = write_colours(tmp_path_factory.mktemp("colours"))
    folder = tmp_path_factory.mktemp("control") / "clean"
    hfdetox.implant("timm-arch:test_resnet", dataset=dataset, triggers=["none"], output=folder, input_size=16,
                    settings={"epochs": "2"}, device="cpu", progress=False)  # fmt: skip
    return folder, dataset


@pytest.fixture
def detoxify(model: tuple[Path, Path]) -> Run:
    def run(**changes: Any) -> hfdetox.DetoxResult:
        options = {"defense": "ft", "settings": FT, "clean_samples": 40, "progress": False, **changes}
        return hfdetox.detoxify(model[0], dataset=model[1], **options)

    return run


@pytest.fixture
def evaluate(model: tuple[Path, Path]) -> Run:
    return lambda **options: hfdetox.evaluate(model[0], dataset=model[1], progress=False, **options)


def test_the_accelerator_of_the_caller_works_on_as_if_nothing_had_been(detoxify: Run, evaluate: Run) -> None:
    mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    network = nn.Linear(4, 2)
    prepared, optimizer = mine.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))

    def settings() -> list[Any]:
        return [mine.mixed_precision, mine.device, mine.gradient_accumulation_steps, mine.sync_gradients,
                list(mine._models), list(mine._optimizers), AcceleratorState().mixed_precision,
                mine.is_main_process]  # fmt: skip

    with mine.accumulate(prepared):
        mine.backward(prepared(torch.ones(2, 4)).float().sum())
        before = settings()
        assert before[3] is False
        result = detoxify(precision="no", device="cpu")
        evaluate()
        assert result.report.defense.precision == "no"
        assert settings() == before
        assert prepared(torch.ones(2, 4)).dtype == torch.float32
        optimizer.step()


def test_nothing_is_left_in_a_process_that_had_no_accelerator(detoxify: Run, evaluate: Run) -> None:
    detoxify(precision="bf16", device="cpu").report.to_dict()
    evaluate()
    assert not PartialState._shared_state
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"


def test_a_run_takes_precision_device_and_trackers_of_an_accelerator_that_is_passed(
    detoxify: Run, model: tuple[Path, Path], tmp_path: Path
) -> None:
    tracker = Lines()
    mine = Accelerator(cpu=True, mixed_precision="bf16", log_with=tracker)
    mine.init_trackers("mine")
    result = detoxify(accelerator=mine, output=tmp_path / "out")
    assert result.report.defense.precision == "bf16"
    assert result.report.defense.devices == ["cpu"]
    # a resumed run that is given none gets the same
    assert "--precision bf16" in result.report.environment.command
    assert "--device cpu" in result.report.environment.command
    assert [line["loss"] for line in tracker.lines] == [result.report.history[0]["loss"]]
    assert not tracker.finished
    assert mine.trackers == [tracker]
    again = hfdetox.implant(
        "timm-arch:test_resnet", dataset=model[1], triggers=["none"], input_size=16, settings={"epochs": "1"},
        accelerator=mine, progress=False,
    )  # fmt: skip
    assert again.report.attack.precision == "bf16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "no"}, "precision=no contradicts the accelerator, which has bf16"),
        ({"device": "cuda"}, "device=cuda contradicts the accelerator, which has cpu"),
        ({"log_with": "tensorboard"}, "log_with beside accelerator"),
    ],
)
def test_what_contradicts_the_accelerator_is_one_line(options: dict[str, str], said: str, detoxify: Run) -> None:
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UsageError, match=said) as caught:
        detoxify(accelerator=mine, **options)
    assert "\n" not in str(caught.value)
    assert AcceleratorState().mixed_precision == "bf16"


def test_what_agrees_with_the_accelerator_may_be_said_too(evaluate: Run) -> None:
    assert evaluate(accelerator=Accelerator(cpu=True, mixed_precision="bf16"), device="cpu").accuracy.samples == 30
