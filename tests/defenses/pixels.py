"""Networks behind a real normalisation, for methods that perturb pixels: linear ones, and a small convolutional one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from hfdetox.models.network import Network
from hfdetox.models.preprocessing import Preprocessing
from tests.tiny_training import CLASSES, ToyImages, toy_preprocessing


class UnitRange(Preprocessing):
    """uint8 images of one channel and one row, which the model sees in [0, 1]."""

    def __init__(self, width: int) -> None:
        self.input_size = (1, 1, width)
        self.mean, self.std, self.scale, self.dtype = (0.0,), (1.0,), 1 / 255, torch.uint8

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """There are no pictures in these tests."""
        raise AssertionError("no picture is prepared in these tests")


def linear(weight: Sequence[Sequence[float]]) -> Network:
    """Return a network whose logits are `weight` (K×n) times the n pixels in [0, 1]; `1` is its head."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return Network(nn.Sequential(nn.Flatten(), layer), UnitRange(len(weight[0]))).eval()


def pixels(*rows: Sequence[float]) -> torch.Tensor:
    """Return images N×1×1×n (float32, 0 to 255) of rows of pixels in [0, 1]."""
    return 255 * torch.tensor(rows).view(len(rows), 1, 1, -1)


def pixel_convnet(seed: int = 0) -> Network:
    """Return a network with BatchNorm for 8×8 images; `0` and `3` are its convolutions, `7` its head.

    The convolution before BatchNorm has no bias: its gradient would be rounding alone, of which Adam makes whole steps.
    """
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    return Network(body, toy_preprocessing()).eval()


def with_corner(images: torch.Tensor) -> torch.Tensor:
    """Return the images with a white corner of 3×3 pixels."""
    images = images.clone()
    images[:, :, :3, :3] = 255
    return images


def corner_backdoored(steps: int = 80) -> Network:
    """Return `pixel_convnet` trained on toy images, half of the time with the corner and as class 0."""
    network, toys = pixel_convnet(), ToyImages(96, seed=7)
    assert toys.images is not None
    images = torch.cat([toys.images, with_corner(toys.images)])
    labels = torch.cat([toys.labels, torch.zeros_like(toys.labels)])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@torch.no_grad()
def rates(network: Network, toys: ToyImages) -> tuple[float, float]:
    """Return the accuracy, and the share of images of other classes that the corner turns into 0."""
    assert toys.images is not None
    accuracy = (network(toys.images).argmax(1) == toys.labels).float().mean()
    others = with_corner(toys.images[toys.labels != 0])
    return float(accuracy), float((network(others).argmax(1) == 0).float().mean())
