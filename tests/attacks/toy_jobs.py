"""Jobs small enough for a poisoner to finish in seconds."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks.base import AttackContext
from hfdetox.models.classifier import Classifier, load_classifier
from tests.tiny_training import CLASSES, toy_pixels, toy_preprocessing


def toy_classifier(side: int = 8, seed: int = 0) -> Classifier:
    """Return a classifier with BatchNorm of `side`×`side` images (see `ToyImages`); `6` is its head."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Identity(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    return load_classifier(body, preprocessing=toy_preprocessing(side), labels=CLASSES)


def toy_job(accelerator: Accelerator, *, count: int = 48, side: int = 8, **fields: Any) -> AttackContext:
    """Return a job on `count` toy images with a fresh classifier; `fields` are the job's own."""
    return AttackContext(**{"classifier": toy_classifier(side), "clean": toy_pixels(count, side),
                            "accelerator": accelerator, "from_scratch": True, **fields})  # fmt: skip
