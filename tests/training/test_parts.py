"""Steps on large images are split on a CPU, so that what they keep for the backward pass fits into memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses.ft import FTConfig
from hfdetox.evaluation.metrics import predict
from hfdetox.models.network import Network
from hfdetox.training import engine
from hfdetox.training.devices import saved_bytes
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.tiny_training import CLASSES, ToyImages, _quick_garbage, accelerator, toy_preprocessing, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SIDE = 100


def network(*layers: nn.Module, side: int = SIDE) -> Network:
    """Return a seeded network of `side`×`side` images, with `layers` behind its convolution."""
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)]
    return Network(nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), *layers, *head), toy_preprocessing(side)).eval()


def tuned(net: Network, accelerator: Accelerator, side: int = SIDE, **settings: Any) -> tuple[Network, list[int]]:
    """Fine-tune a network on 20 images, 10 a step; returns it and the sizes of the batches that it saw."""
    config = FTConfig(**{"epochs": 2, "batch_size": 10, "learning_rate": 0.05, "augmentation": "none", **settings})
    (phase,) = config.phases(net)
    assert isinstance(phase, Phase)
    seen, loss = list[int](), phase.loss

    def noting(model: nn.Module, batch: Any) -> Any:
        seen.append(len(batch.images))
        return loss(model, batch)

    phase.loss = noting
    Engine(accelerator, ToyImages(20, side), seed=1).run(net, [phase])
    return net, seen


def test_what_is_kept_is_counted_by_hand() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 7), nn.ReLU(), nn.Linear(7, CLASSES))
    # the normalised image (for the first layer's weights), and what ReLU gave (for its own and the next layer's)
    pixels, hidden = 3 * SIDE * SIDE * 4, 7 * 4
    found = saved_bytes(Network(flat, toy_preprocessing(SIDE)).eval())
    assert pixels + hidden <= found <= 2 * pixels + 2 * hidden
    assert saved_bytes(network()) > SIDE * SIDE * 4 / 16


def test_parts_give_what_the_whole_step_gives(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = tuned(network(), accelerator)
    assert seen == [10] * 4
    monkeypatch.setattr(engine, "PART_BYTES", 3 * saved_bytes(network()))
    parts, seen = tuned(network(), accelerator)
    assert seen == [3, 3, 2, 2] * 4
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], tensor, rtol=1e-5, atol=1e-6)
    # what was asked for is not joined again
    assert tuned(network(), accelerator, gradient_accumulation_steps=5)[1] == [2] * 20


def test_batch_norm_sees_enough_images_and_small_ones_are_never_split(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PART_BYTES", 1)
    assert tuned(network(), accelerator)[1] == [2] * 20
    assert tuned(network(nn.BatchNorm2d(4)), accelerator)[1] == [10] * 4
    monkeypatch.setattr(engine, "LEAST_NORMED", 5)
    assert tuned(network(nn.BatchNorm2d(4)), accelerator)[1] == [5] * 8
    assert tuned(network(side=96), accelerator, 96)[1] == [10] * 4


@pytest.mark.parametrize(("side", "sizes"), [(8, [40]), (96, [40]), (640, [5] * 8)])
def test_large_images_are_measured_a_few_at_a_time(side: int, sizes: list[int], accelerator: Accelerator) -> None:
    net, seen = network(side=side), list[int]()
    handle = net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = predict(net, ToyImages(40, side), accelerator)
    handle.remove()
    assert seen == sizes
    assert len(found.predicted) == 40
    assert math.isfinite(float(found.losses.sum()))
