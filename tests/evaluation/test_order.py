"""Classes of which only an order says which they are: both usual orders are tried on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchvision import transforms

from hfdetox import evaluate, load_images
from hfdetox.evaluation.evaluator import settle_order
from hfdetox.models.classifier import load_classifier

COUNT = 12
PREPARE = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])


class Levels(nn.Module):
    """Knows grey levels: output i is for images of the level `order[i]` of twelve."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor([20.0 * level / 255 for level in order]))
        self.head = nn.Linear(COUNT, COUNT, bias=False)
        self.head.weight.data = torch.eye(COUNT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = (x.mean((1, 2, 3))[:, None] - self.levels).abs()
        return self.head(-100 * distance)


def folder(root, names):
    for split, count in (("train", 25), ("test", 4)):
        for level, name in enumerate(names):
            for i in range(count):
                pixels = np.full((8, 8, 3), 20 * level, dtype=np.uint8)
                pixels[0, 0, 0] = 20 * level + (i if split == "train" else 30 + i)
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def orders(names):
    """Return the level that output i has in the order of the numbers, and in that of the names."""
    return list(range(COUNT)), [names.index(name) for name in sorted(names)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("which", ["first", "second"])
def test_numbered_folders_take_the_order_that_fits_the_model(tmp_path, caplog, first, which):
    names = [str(first + level) for level in range(COUNT)]
    order = orders(names)[which == "second"]
    with caplog.at_level("WARNING"):
        result = evaluate(Levels(order), preprocessing=PREPARE, labels=COUNT, dataset=folder(tmp_path / "d", names))
    assert result.accuracy.value == 1.0
    assert f"the {which} was taken" in caplog.text


def test_the_clean_images_take_the_same_order(tmp_path):
    names = [str(level) for level in range(COUNT)]
    order = orders(names)[1]
    classifier, notes = load_classifier(Levels(order), preprocessing=PREPARE, labels=COUNT), []
    images = load_images(folder(tmp_path / "d", names), labels=classifier.labels, clean_samples=24)
    settled = settle_order(images, classifier, Accelerator(cpu=True), notes.append, False)
    assert settled.other is None
    assert len(notes) == 1
    for part in (settled.clean, settled.evaluation):
        levels = [part.image(i).getpixel((4, 4))[0] // 20 for i in range(len(part))]
        assert [order[label] for label in part.labels.tolist()] == levels
    assert settled.info.label_map["10"] == "2"
    assert settled.clean.indices == images.clean.indices
