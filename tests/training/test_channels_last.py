"""Networks whose convolutions crash torch in channels_last on CPUs are trained without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
from torch import nn

from hfdetox.models.network import is_convolutional
from tests.conftest import REPOSITORY

SCRIPT = """
import torch
from torch import nn
from hfdetox.defenses.ft import FTConfig
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.tiny_training import ToyImages, toy_preprocessing

torch.manual_seed(0)
torch.set_num_threads(1)
config = FTConfig(epochs=3, batch_size=16, augmentation="none")
for stride, hidden in ((2, 3), ((2, 1), 3), (2, 6)):
    stem = nn.Conv2d(3, hidden, 3, padding=1)
    body = nn.Sequential(stem, nn.Conv2d(hidden, 48, 1, stride=stride), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(48, 3))
    network = Network(body, toy_preprocessing())
    assert not network.convolutional
    Engine(make_accelerator("cpu", "no"), ToyImages(48)).run(network, config.phases(network))
print("survived")
"""


def test_training_survives_on_a_cpu_with_avx2() -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.endswith("survived\n"), f"{done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("name", ["fastvit_t8", "repvgg_a0", "mobileone_s0"])
def test_stems_of_strided_pointwise_convolutions(name: str) -> None:
    assert not is_convolutional(timm.create_model(name, num_classes=3))


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "convolutional"),
    [(1, 1, 2, True), (2, 1, 2, False), (7, 1, (1, 2), False), (8, 1, 2, True), (3, 1, 1, True), (3, 3, 2, True)],
)
def test_which_convolutions_they_are(channels: int, kernel: int, stride: int, convolutional: bool) -> None:
    body = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 4, kernel, stride=stride))
    assert is_convolutional(body) is convolutional
