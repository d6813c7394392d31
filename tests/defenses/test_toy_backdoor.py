"""What the tuning defenses do to a network of toy images with a patch for a backdoor: seconds, made once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hfdetox.defenses.base import DefenseConfig
from hfdetox.defenses.fp import FPConfig
from hfdetox.defenses.fst import FSTConfig
from hfdetox.defenses.ft import FTConfig, RandomHeadConfig
from hfdetox.defenses.ft_sam import FTSAMConfig
from hfdetox.defenses.nad import NADConfig
from tests.defenses.runs import run
from tests.tiny_training import Scaled, ToyImages, _quick_garbage, accelerator, convnet

__all__ = ["_quick_garbage", "accelerator"]

TUNING: dict[str, Any] = {"epochs": 40, "batch_size": 16, "learning_rate": 0.05, "augmentation": "none"}
# the success that a defense may leave: what it can do here, not what it does at its best
CASES: list[tuple[DefenseConfig, float]] = [
    (FTConfig(**TUNING), 1.0),
    (RandomHeadConfig(**TUNING), 0.5),
    (FTSAMConfig(**TUNING), 0.5),
    (FSTConfig(**TUNING), 0.5),
    (NADConfig(**TUNING, teacher_epochs=5), 1.0),
    (FPConfig(**TUNING), 1.0),
]


def stamped(images: torch.Tensor) -> torch.Tensor:
    """Return the images with a black and white patch of 3×3 pixels."""
    patch = (torch.arange(9).view(3, 3) % 2 * 255).to(torch.uint8)
    images = images.clone()
    images[:, :, -3:, -3:] = patch
    return images


@pytest.fixture(scope="module")
def backdoored() -> Scaled:
    """Return a network trained on toy images of which a third is stamped and called class 0."""
    network, images = convnet(), ToyImages(240)
    assert images.images is not None
    pixels = torch.cat([images.images, stamped(images.images[:120])])
    labels = torch.cat([images.labels, torch.zeros(120, dtype=torch.int64)])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.train()
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(network(pixels), labels).backward()
        optimizer.step()
    return network.eval()


def measured(network: Scaled) -> tuple[float, float]:
    """Return accuracy on new images, and how often a stamped one of another class becomes class 0."""
    images = ToyImages(150, seed=9)
    assert images.images is not None
    others = images.labels != 0
    with torch.no_grad():
        right = network(images.images).argmax(1) == images.labels
        fooled = network(stamped(images.images[others])).argmax(1) == 0
    return float(right.float().mean()), float(fooled.float().mean())


@pytest.mark.parametrize(("config", "left"), CASES, ids=[config.name for config, _ in CASES])
def test_accuracy_stays_and_the_backdoor_does_not_grow(
    config: DefenseConfig, left: float, backdoored: Scaled, accelerator: Accelerator
) -> None:
    before = measured(backdoored)
    assert before[0] > 0.9
    assert before[1] > 0.9
    network = copy.deepcopy(backdoored)
    run(config, network, accelerator, count=96)
    after = measured(network)
    assert after[0] > before[0] - 0.1
    assert after[1] <= min(left, before[1] + 0.02)
