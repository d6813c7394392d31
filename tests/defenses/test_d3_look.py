"""The look of `d3:auto` at the model and the clean images: augmentation, ε and length."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses.auto import LEAST_EPSILON, candidates, chosen_augmentation
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.runs import SEED
from tests.defenses.test_d3_auto import auto
from tests.tiny_training import Scaled, ToyImages, _quick_garbage, accelerator, convnet, mlp

__all__ = ["_quick_garbage", "accelerator"]


class Sided(nn.Module):
    """Says 0 where the left half of the first channel is brighter, else 1: a mirrored image is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = images[:, 0].chunk(2, dim=2)
        return self.head(torch.stack([left.mean((1, 2)), right.mean((1, 2))], 1))


def sided_images(count: int = 40) -> ToyImages:
    """Return images of which one half is bright."""
    source = ToyImages(count, side=8, labels=torch.arange(count) % 2)
    assert source.images is not None
    source.images[:] = 0
    source.images[0::2, :, :, :4] = 200
    source.images[1::2, :, :, 4:] = 200
    return source


def test_flips_are_left_out_where_they_make_another_class(accelerator: Accelerator) -> None:
    network, config = Scaled(Sided()), auto(epochs=1)
    record = Engine(accelerator, sided_images(), seed=SEED).run(network, config.phases(network))  # type: ignore[arg-type]
    look = record.history[0]
    assert look["accuracy_none"] == 1
    assert look["accuracy_flip"] < 0.8
    assert chosen_augmentation(look) in ("crop", "none")
    assert chosen_augmentation(look) == ("crop" if look["accuracy_crop"] > 0.99 else "none")


def test_the_strongest_augmentation_that_costs_nothing_is_taken() -> None:
    rates = {"accuracy_crop-flip": 0.80, "accuracy_crop": 0.85, "accuracy_flip": 0.895, "accuracy_none": 0.90}
    assert chosen_augmentation(rates) == "flip"
    assert chosen_augmentation({**rates, "accuracy_crop": 0.95}) == "crop"
    assert chosen_augmentation({**rates, "accuracy_crop-flip": 0.90}) == "crop-flip"
    assert chosen_augmentation({**rates, "accuracy_flip": 0.88}) == "none"


def test_what_is_tried_depends_on_the_size_and_on_what_is_wanted() -> None:
    assert candidates("auto", 32) == ["crop-flip", "crop", "flip", "none"]
    assert candidates("auto", 224) == ["resized-crop-flip", "crop-flip", "crop", "flip", "none"]
    assert candidates("flip", 32) == ["flip", "none"]


def test_the_length_is_said_before_the_training_where_bars_are_drawn(
    accelerator: Accelerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shown, said_to_all in ((False, "0"), (True, "0"), (False, "1")):
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", said_to_all)
        network = convnet()
        phases = auto(augmentation="flip", min_steps=20, epochs=4).phases(network)  # type: ignore[arg-type]
        Engine(accelerator, ToyImages(40), seed=SEED, progress=shown or said_to_all == "1").run(network, phases[:1])
        said = capsys.readouterr().err
        assert ("d3: 7 epochs of 40 images: 280 image passes\n" in said) == shown


def test_the_phase_gets_what_the_look_found(accelerator: Accelerator) -> None:
    network = convnet()
    phases = auto(augmentation="flip", min_steps=20, epochs=4).phases(network)  # type: ignore[arg-type]
    record = Engine(accelerator, ToyImages(40), seed=SEED).run(network, phases)
    look, phase = record.history[0], phases[1]
    assert isinstance(phase, Phase)
    # 40 images in batches of 16 are 3 steps an epoch, and 7 epochs the first to make 20 steps
    assert (look["epochs"], look["steps"], phase.epochs) == (7, 21, 7)
    assert phase.augmentation == chosen_augmentation(look)
    assert (len(record.history), record.steps) == (8, 21)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_look_counts_the_steps_that_the_engine_makes(parts: int, accelerator: Accelerator) -> None:
    """A last step too small for two images a part joins the one before it, and the turn ends with the steps planned."""
    network = convnet()
    config = auto(batch_size=16, min_steps=12, epochs=1, augmentation="none", gradient_accumulation_steps=parts)
    phases = config.phases(network)  # type: ignore[arg-type]
    # 49 images, or 51 in two parts, are three steps; an image more are four
    found = Engine(accelerator, ToyImages(47 + 2 * parts), seed=SEED).run(network, phases)
    assert (found.history[0]["steps"], found.steps) == (12, 12)
    assert found.history[0]["epochs"] == 4
    assert phases[1].state.step == 12  # type: ignore[union-attr]


def test_epsilon_is_the_median_loss_and_not_too_small(accelerator: Accelerator) -> None:
    network = mlp()
    images = ToyImages(48)
    assert images.images is not None
    with torch.no_grad():
        losses = cross_entropy(network(images.images), images.labels, reduction="none")
    phases = auto(epochs=1).phases(network)  # type: ignore[arg-type]
    record = Engine(accelerator, images, seed=SEED).run(network, phases)
    assert record.history[0]["epsilon"] == pytest.approx(float(losses.median()), rel=1e-5)
    assert record.history[0]["clean_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert float(losses.median()) > LEAST_EPSILON

    sure = copy.deepcopy(Scaled(Sided()))
    sure.model.head.weight.data *= 20
    phases = auto(epochs=1).phases(sure)  # type: ignore[arg-type]
    record = Engine(accelerator, sided_images(), seed=SEED).run(sure, phases)
    assert record.history[0]["epsilon"] == LEAST_EPSILON
