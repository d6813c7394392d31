"""Pictures of three plain colours: what a tiny network learns to tell apart in seconds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from hfdetox import implant
from tests.image_data import cycle, write_parquet

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
NAMES = ["red", "green", "blue"]
# a network of freshly drawn weights, and what trains it
ARCHITECTURE = "timm-arch:test_resnet"
SIDE = 16
TRAINING = {"epochs": "4", "batch_size": "16", "augmentation": "none", "learning_rate": "0.05"}


def coloured(seed: int, side: int = SIDE) -> bytes:
    """Return a PNG of the class `seed` % 3, with noise of its own."""
    noise = np.random.default_rng(seed).integers(-30, 31, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray((COLOURS[seed % 3] + noise).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_colours(folder: Path, *, train: int = 120, side: int = SIDE) -> Path:
    """Write a dataset of `train` training and 30 test images, three classes in turn."""
    for split, count, first in (("train", train, 0), ("test", 30, 3000)):
        images = [coloured(first + i, side) for i in range(count)]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", cycle(count), names=NAMES, images=images)
    return folder


def train_on_colours(folder: Path) -> tuple[Path, Path]:
    """Write a model of colours, without a backdoor, and the colours; return the two folders."""
    colours = write_colours(folder / "colours")
    implant(ARCHITECTURE, dataset=colours, input_size=SIDE, triggers=["none"], settings=TRAINING, device="cpu",
            output=folder / "model", progress=False)  # fmt: skip
    return folder / "model", colours
