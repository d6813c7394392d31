"""Strangers' dropout and momentum: held within bounds while a network is tuned, said, and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

import hfdetox
from hfdetox.defenses.bn import BNConfig
from hfdetox.defenses.ft import FTConfig
from hfdetox.training.engine import Engine
from hfdetox.training.unusual import DROPOUT, tamed
from tests.colours import write_colours
from tests.tiny_training import CLASSES, Scaled, ToyImages, _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "augmentation": "none"}


def network(dropout: type[nn.Module] = nn.Dropout, share: float = 0.999, momentum: float = 0.99) -> Scaled:
    torch.manual_seed(0)
    return Scaled(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        dropout(share), nn.Linear(4, CLASSES),
    ))  # fmt: skip


def tune(model: Scaled, accelerator: Accelerator, config: Any, count: int = 48) -> tuple[list[str], list[str], Any]:
    """Tune as a run does; return what was said, the phases that ran, and the images."""
    said: list[str] = []
    images = ToyImages(count)
    with tamed(model, config.phases(model), said.append) as phases:
        record = Engine(accelerator, images).run(model, phases)
    return said, [str(entry["phase"]) for entry in record.history], images


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_dropout_of_nearly_all_is_held_while_tuning_and_said(
    dropout: type[nn.Module], accelerator: Accelerator
) -> None:
    model, seen = network(dropout, momentum=0.1), list[float]()
    layer: Any = model.model[5]  # type: ignore[index]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.p))
    said, phases, _ = tune(model, accelerator, FTConfig(**SHORT))
    assert set(seen) == {DROPOUT}
    assert layer.p == 0.999
    assert len(said) == 1
    assert "dropout of 0.999 was 0.2 while it was tuned" in said[0]
    assert "statistics" not in phases


@pytest.mark.parametrize(("count", "batches"), [(48, [48]), (300, [256, 44]), (257, [256])])
def test_statistics_of_the_last_batch_are_measured_anew(
    count: int, batches: list[int], accelerator: Accelerator
) -> None:
    model = network(share=0.1)
    said, phases, images = tune(model, accelerator, FTConfig(**SHORT), count)
    assert phases[-1] == "statistics"
    assert len(said) == 1
    assert "momentum 0.99" in said[0]
    assert "measured anew on all clean images" in said[0]
    body: Any = model.model
    with torch.no_grad():
        features = body[0](images.images.float() / 127.5 - 1).double()
    parts = features[: sum(batches)].split(batches)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    torch.testing.assert_close(body[1].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(body[1].running_var.double(), variance, rtol=1e-4, atol=1e-5)
    assert body[1].momentum == 0.99


@pytest.mark.parametrize(("share", "momentum"), [(0.5, 0.1), (0.2, 0.5), (0.0, None)])
def test_usual_networks_are_left_alone(share: float, momentum: Any, accelerator: Accelerator) -> None:
    said, phases, _ = tune(network(share=share, momentum=momentum), accelerator, FTConfig(**SHORT))
    assert said == []
    assert "statistics" not in phases


def test_a_method_that_does_not_tune_the_network_changes_nothing(accelerator: Accelerator) -> None:
    model = network()
    config = BNConfig()
    with tamed(model, config.phases(model), pytest.fail) as phases:
        assert len(phases) == 1
        assert model.model[5].p == 0.999  # type: ignore[index,union-attr]


def test_what_was_held_is_put_back_after_an_error() -> None:
    model = network()
    with pytest.raises(KeyboardInterrupt), tamed(model, FTConfig(**SHORT).phases(model), lambda text: None):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert (model.model[5].p, model.model[1].momentum) == (0.999, 0.99)  # type: ignore[index,union-attr]


def test_the_whole_job_says_both_on_the_card(tmp_path: Path) -> None:
    dataset = write_colours(tmp_path / "colours")
    hfdetox.implant("timm-arch:test_resnet", dataset=dataset, triggers=["none"], output=tmp_path / "clean",
                    input_size=16, settings={"epochs": "2"}, device="cpu", progress=False)  # fmt: skip
    model = timm.create_model(f"local-dir:{tmp_path / 'clean'}", pretrained=True)
    model.drop_rate = 0.9
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.997
    result = hfdetox.detoxify(model, dataset=dataset, defense="ft", settings={"epochs": "2", "batch_size": "16"},
                              clean_samples=40, output=tmp_path / "out", precision="no", progress=False)  # fmt: skip
    assert result.report.after.accuracy.value > result.report.before.accuracy.value - 0.1
    assert model.drop_rate == 0.9
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    assert "dropout of 0.9 was 0.2 while it was tuned" in card
    assert "(momentum 0.997); after tuning they were measured anew" in card
