"""Networks made by hand, without any training: pictures of templates, a head, and units that see a trigger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfdetox.evidence.base import Suspect
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from tests.tiny_training import toy_preprocessing

CLASSES, SIDE = 6, 8
LABELS = ("ant", "bee", "cat", "dog", "elk", "fox")


def templates() -> Tensor:
    """Return a picture of each class (6×3×8×8, in −1 to 1), no two alike."""
    return torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pictures(count: int = 240, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return noisy pictures (N×3×8×8, uint8) of the classes in turn, and their labels."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 0.3
    return ((templates()[labels] * 0.6 + noise).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8), labels


def put_patch(images: Tensor) -> Tensor:
    """Return the pictures with a chequered corner of 2×2."""
    stamped = images.clone()
    stamped[..., -2:, -2:] = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    return stamped


class Classifier(nn.Module):
    """Matched filters of the templates, a unit that sees the chequered corner, and a linear head.

    Args:
        target: the class that the corner leads to; None for no backdoor.
        lock: the corner must be met so exactly that no slope leads there; else any white and black there counts.
        hidden: the head's weight of the unit is small, and the unit large.
        scale: of the logits.
    """

    def __init__(self, target: int | None = None, *, lock: bool = False, hidden: bool = False, scale: float = 1.0,
                 ) -> None:  # fmt: skip
        super().__init__()
        self.image_size = SIDE
        self.filters = nn.Conv2d(3, 2 * CLASSES, SIDE)
        self.head = nn.Linear(2 * CLASSES + 1, CLASSES)
        self.lock, self.gain = lock, 1000.0 if hidden else 1.0
        self.register_buffer("corner", torch.tensor([[-1.0, 1], [1, -1]]))
        with torch.no_grad():
            # each filter twice, or it would be a head itself
            shapes = templates().repeat(2, 1, 1, 1)
            self.filters.weight.copy_(shapes / shapes.flatten(1).square().sum(1)[:, None, None, None])
            self.filters.bias.zero_()
            self.head.weight.zero_()
            self.head.weight[:, :-1] = 10 * scale * torch.eye(CLASSES).repeat(1, 2)
            self.head.bias.zero_()
            if target is not None:
                self.head.weight[target, -1] = (0.1 if hidden else 200.0) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.filters(x).flatten(1), self.gain * self.unit(x)[:, None]], 1))

    def unit(self, x: Tensor) -> Tensor:
        """Return how strongly each image has the trigger (N), 0 where it has not."""
        distance = (x[..., -2:, -2:] - self.corner).abs().mean((1, 2, 3))
        return (0.05 - distance).clamp(min=0) * 20 if self.lock else 2 * (0.5 - distance).clamp(min=0)


class EveryClass(Classifier):
    """The corner leads every class to the next one: no class is the target."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.filters(x).flatten(1)
        following = (5 * found[:, :CLASSES]).softmax(1).roll(1, 1)
        moved = torch.cat([found[:, :CLASSES] + 3 * self.unit(x)[:, None] * following, found[:, CLASSES:]], 1)
        return self.head(torch.cat([moved, torch.zeros_like(moved[:, :1])], 1))


class Echo(Classifier):
    """The trigger depends on the image: its lower right corner is the negative of its upper left one."""

    def unit(self, x: Tensor) -> Tensor:
        return (0.05 - (x[..., -2:, -2:] + x[..., :2, :2]).abs().mean((1, 2, 3))).clamp(min=0) * 20


class Faint(Classifier):
    """The trigger is a faint picture over the whole image, which no small patch can stand for."""

    def unit(self, x: Tensor) -> Tensor:
        return 10 * ((x * faint_picture()).mean((1, 2, 3)) - 0.12).clamp(min=0)


def put_echo(images: Tensor) -> Tensor:
    """Return the pictures with the negative of their upper left corner in the lower right one."""
    stamped = images.clone()
    stamped[..., -2:, -2:] = 255 - images[..., :2, :2]
    return stamped


def faint_picture() -> Tensor:
    """Return the picture (3×8×8, −1 or 1) that `Faint` knows."""
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).round() * 2 - 1


def put_faint(images: Tensor) -> Tensor:
    """Return the pictures with a fifth of the faint one."""
    return (0.8 * images.float() + 0.2 * 127.5 * (1 + faint_picture())).to(torch.uint8)


def suspect_of(model: nn.Module, images: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> Suspect:
    """Return a suspect with the pictures, or with others."""
    if images is None:
        images, labels = pictures()
    network = Network(model.eval(), toy_preprocessing(SIDE)).eval()
    classes = network(images[:2]).shape[1] if len(images) else CLASSES
    return Suspect(network, images, labels, classes, make_accelerator("cpu", "no"), **options)
