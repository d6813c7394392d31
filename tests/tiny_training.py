"""Images and networks small enough to train in milliseconds, and a reference loop that is not the engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.data.cache import Pixels
from hfdetox.data.images import ImageSet
from hfdetox.models.preprocessing import TimmPreprocessing
from hfdetox.training.batches import Batch
from hfdetox.training.devices import make_accelerator
from hfdetox.training.phases import Phase

CLASSES = 3


class ToyImages:
    """Cached uint8 images N×3×side×side in which the class is visible: channel `label` is brighter."""

    def __init__(self, count: int = 48, side: int = 8, seed: int = 0, labels: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % CLASSES if labels is None else labels
        noise = torch.randint(0, 120, (count, 3, side, side), generator=generator)
        noise[torch.arange(count), self.labels] += 100
        self.images: torch.Tensor | None = noise.to(torch.uint8)
        self.positions = torch.arange(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.tensor(items)
        assert self.images is not None
        return self.positions[places], self.images[places], self.labels[places]


class Scaled(nn.Module):
    """uint8 images in, logits of `body` out, like hfdetox's Network; `convolutional` asks for channels_last."""

    normalizes = True

    def __init__(self, body: nn.Module, *, convolutional: bool = False) -> None:
        super().__init__()
        self.model = body
        self.convolutional = convolutional

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.float() / 127.5 - 1)


def mlp(seed: int = 0, dropout: float = 0.0) -> Scaled:
    """Return a network without BatchNorm for 8×8 images; `model.4` is its head."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
    return Scaled(body)


def convnet(seed: int = 0, dropout: float = 0.0) -> Scaled:
    """Return a channels_last network with BatchNorm; `model.6` is its head."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(32, CLASSES),
    )  # fmt: skip
    return Scaled(body, convolutional=True)


class NormedNet(nn.Module):
    """A network whose head is fed by an affine LayerNorm directly, as a ViT's is; takes images of any side."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)
        # the pattern of a trained norm: unequal scales and shifts
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.norm.bias.data.normal_(std=0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.features(images).relu().mean((2, 3))))


def mean_loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Cross-entropy with the batch's weights."""
    errors = cross_entropy(network(batch.images).float(), batch.labels, reduction="none")
    return {"loss": (batch.weights * errors).sum()}


def make_phase(network: nn.Module, **changes: Any) -> Phase:
    """Return a small phase on all parameters."""
    parts: dict[str, Any] = {
        "name": "toy", "parameters": list(network.parameters()), "loss": mean_loss, "epochs": 3, "batch_size": 16,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "augmentation": "none",
    }  # fmt: skip
    return Phase(**{**parts, **changes})


@contextmanager
def quick_garbage() -> Iterator[None]:
    """Accelerate collects garbage after every training: spare it the search through the libraries' own objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick_garbage() -> Iterator[None]:
    with quick_garbage():
        yield


@pytest.fixture
def accelerator() -> Accelerator:
    """A float32 Accelerator on the CPU."""
    return make_accelerator("cpu", "no")


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the network's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def norm_of(layer: nn.Module) -> float:
    """Return the Frobenius norm of a layer's weight."""
    return float(layer.weight.detach().norm())  # type: ignore[operator]


def equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def toy_set(count: int = 48, side: int = 8, wrong: Mapping[int, int] | None = None) -> ImageSet:
    """Return `ToyImages` as PIL images; `wrong` maps an image to the class it shows in place of its label."""
    labels = [i % CLASSES for i in range(count)]
    shown = torch.tensor([(wrong or {}).get(i, label) for i, label in enumerate(labels)])
    images = ToyImages(count, side, labels=shown).images
    assert images is not None
    pictures = [Image.fromarray(picture) for picture in images.permute(0, 2, 3, 1).numpy()]
    return ImageSet(pictures, labels, list(range(count)))


def toy_preprocessing(side: int = 8) -> TimmPreprocessing:
    """Return timm's own, which leaves images of this size as they are and maps 0…255 to −1…1."""
    return TimmPreprocessing({
        "input_size": (3, side, side), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3,
        "crop_pct": 1.0, "crop_mode": "center",
    })  # fmt: skip


def toy_pixels(count: int = 48, side: int = 8, wrong: Mapping[int, int] | None = None, **options: int) -> Pixels:
    """Return `toy_set` prepared."""
    return Pixels(toy_set(count, side, wrong), toy_preprocessing(side), **options)
