"""SSBA: the loss and its schedule, what training reaches, and the trigger it makes."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks.ssba import Pair, Ramp, SSBAPoisoner, hiding_terms, quality
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.triggers import load_trigger
from hfdetox.triggers.ssba import SSBA
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import _quick_garbage, accelerator, toy_pixels

__all__ = ["_quick_garbage", "accelerator"]

QUICK = SSBAPoisoner(encoder_epochs=2, encoder_learning_rate=1e-3, wait_steps=0, ramp_steps=1)


def test_the_terms_are_weighted_means_over_images() -> None:
    x = torch.zeros(2, 1, 2, 2)
    encoded = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    bits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # a logit of 0 costs ln 2 whatever the bit, ±ln 3 costs −ln 3/4 where it is right and −ln 1/4 where it is wrong
    logits = torch.tensor([[0.0, -math.log(3)], [-math.log(3), -math.log(3)]])
    batch = Batch(x, torch.zeros(2), torch.tensor([0.75, 0.25]))
    terms = hiding_terms(batch, x, encoded, logits, bits)
    first, second = (math.log(2) + math.log(4 / 3)) / 2, (math.log(4) + math.log(4 / 3)) / 2
    assert terms["bits"].item() == pytest.approx(0.75 * first + 0.25 * second)
    assert terms["difference"].item() == pytest.approx(0.75 * 0.25 + 0.25 * 0.01)
    # of each image one of two bits is right: a logit of 0 says 0
    assert terms["bit_accuracy"].item() == pytest.approx(0.5)


def test_the_weight_of_the_difference_waits_and_rises_once_the_bits_are_learnt() -> None:
    ramp = Ramp(wait=2, ramp=4, weight=8.0, device=torch.device("cpu"))
    accuracies = [0.5, 0.9, 0.95, 0.5, 0.5, 0.5, 0.95, 0.5, 0.5, 0.5]
    weights = [ramp.step(torch.tensor(accuracy)).item() for accuracy in accuracies]
    # 0.95 is step 0; of steps 0 to 2 it is 0, then a quarter of 8 more each; falling back changes nothing
    assert weights == [0, 0, 0, 0, 0, 2, 4, 6, 8, 8]


def test_training_teaches_the_decoder_the_bits(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, count=24, side=32)
    torch.manual_seed(0)
    pair = Pair(1, 3, 32)
    before, _ = quality(pair, context.clean)
    poisoner = replace(QUICK, encoder_epochs=32, encoder_learning_rate=2e-3, weight=0.0)
    record = context.engine().run(pair, [poisoner.phase(pair, context)])
    after, _ = quality(pair, context.clean)
    assert before < 0.75
    assert after > 0.9
    assert record.history[-1]["bits"] < 0.6 * record.history[0]["bits"]


def test_the_loss_is_that_of_the_bits_and_the_weighted_difference(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, count=16, side=32)
    phase = replace(QUICK, weight=7.0).phase(Pair(2, 3, 32), context)
    batch = Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.full((2,), 0.5))

    def knows(images: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # every bit right at a logit of ±ln 3: −ln 3/4 each; images off by 0.1
        return images, images + 0.1, (2 * bits - 1) * math.log(3)

    first, second = (phase.loss(knows, batch)["loss"].item() for _ in range(2))
    # the first step starts the ramp, which is over one step later
    assert first == pytest.approx(math.log(4 / 3))
    assert second == pytest.approx(math.log(4 / 3) + 7 * 0.01)


def test_made_trigger_is_kept_in_a_file_and_changes_every_image_its_own_way(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfdetox"), "propagate", True)
    context = toy_job(accelerator, count=16, side=32)
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="hfdetox"):
        trigger = QUICK.make(SSBA(bits=4), 0, context)
    assert torch.equal(torch.random.get_rng_state(), state)
    # two steps are not enough, and that is said
    assert "short of 95% and 28 dB" in caplog.text
    assert trigger.fitted
    images = context.clean.images
    assert images is not None
    triggered = trigger.apply(images)
    change = triggered.int() - images.int()
    assert not torch.equal(change[0], change[1])
    again = QUICK.make(SSBA(bits=4), 0, context)
    assert again.file_bytes() == trigger.file_bytes()
    trigger.save(tmp_path / "t.safetensors")
    assert torch.equal(load_trigger(tmp_path / "t.safetensors").apply(images), triggered)
    assert QUICK.make(trigger, 0, context) is trigger


def test_larger_images_are_made_smaller_for_the_encoder() -> None:
    pair = Pair(4, 3, 32)
    x, encoded, logits = pair(torch.full((2, 3, 48, 40), 51.0), torch.ones(2, 4))
    assert (x.shape, encoded.shape, logits.shape) == ((2, 3, 32, 32), (2, 3, 32, 32), (2, 4))
    # 51 of 255
    assert torch.allclose(x, torch.full_like(x, 0.2))


def test_quality_of_an_encoder_that_gives_grey_images() -> None:
    pair = Pair(3, 3, 32)
    for parameter in pair.parameters():
        parameter.data.zero_()
    pair.decoder.layers[-1].bias.data.fill_(1.0)
    images = toy_pixels(12, 32)
    assert images.images is not None
    # zero weights: sigmoid(0) = 1/2, which is stored as round(127.5) = 128; every bit is read as 1
    error = ((images.images.double() - 128) / 255).square().mean().item()
    found, likeness = quality(pair, images, seed=1)
    bits = torch.randint(0, 2, (12, 3), generator=torch.Generator().manual_seed(1))
    assert found == pytest.approx(bits.double().mean().item())
    assert likeness == pytest.approx(-10 * math.log10(error), abs=1e-3)


@pytest.mark.parametrize("wrong", [{"encoder_epochs": 0}, {"ramp_steps": 0}, {"wait_steps": -1}, {"weight": -1.0},
                                   {"encoder_learning_rate": 0.0}])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SSBAPoisoner(**wrong)
