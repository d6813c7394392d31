"""LIRA: a faint change of every pixel, drawn from the image by an autoencoder trained with the classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from hfdetox.triggers._networks import MAX_SIZE, NormalisedTrigger, channels_of, full_precision, load_network, resized
from hfdetox.values import Interval

WIDTHS = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class LIRA(NormalisedTrigger):
    """T(x) = clip(x + ε·A(x)) of the normalised image, so x + 255·std·ε·A(x) in grey levels, clipped and rounded.

    The autoencoder A gives values in (-1, 1) and sees (x / 255 − mean) / std. It runs at `size`×`size`; for images of
    another size what it gives is resized bilinearly. With ε = 0.01 and a std of 0.25 at most 0.64 grey levels are
    added, so a pixel changes, by one level, where |A| is above 0.78: after rounding A is a choice of −1, 0 or 1.
    Doan et al., ICCV 2021.

    Attributes:
        epsilon: the greatest change of a normalised value, above 0 and at most 1000.
        size: pixels a side that the autoencoder was trained at, a multiple of 16 and at most 1024.
        autoencoder: the state dict of A (`Autoencoder` of this package).
        mean, std: of its normalisation, see `NormalisedTrigger`.
    """

    kind = "lira"
    summary = "a change of about one grey level, drawn from the image by a trained autoencoder"
    paper = "ICCV 2021"

    epsilon: Annotated[float, Interval("(0, 1000]")] = 0.01
    size: Annotated[int, Interval(f"[16, {MAX_SIZE}]", step=16)] = 32
    autoencoder: dict[str, Tensor] | None = field(default=None, metadata={"tensor": "network"})

    @torch.no_grad()
    def apply(self, images: Tensor) -> Tensor:
        network, mean, std = self.parts_for(images)
        return change(network, images.float(), mean, std, self.epsilon, self.size).round_().to(torch.uint8)

    def parts(self) -> tuple[Autoencoder, Tensor, Tensor]:
        """Return A, mean and std."""
        state = self.autoencoder or {}
        channels = channels_of(state)
        network = load_network(lambda: Autoencoder(channels), state, "lira: autoencoder")
        return network, *self.normalisation(channels)


def change(autoencoder: nn.Module, images: Tensor, mean: Tensor, std: Tensor, epsilon: float, size: int) -> Tensor:
    """Return float32 `images` (N×C×H×W, 0 to 255) with ε·A(x) added, clipped and not rounded; always in float32.

    `mean` and `std` are those of images in [0, 1], C×1×1 or 0-d. Differentiable in the autoencoder.
    """
    with full_precision(images.device):
        normal = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        drawn = resized(autoencoder(resized(normal, size, size)), *images.shape[-2:])
        return (images + 255 * std * epsilon * drawn).clamp(0, 255)


class Autoencoder(nn.Module):
    """LIRA's: four 4×4 convolutions of stride 2 (16, 32, 64, 128 wide), as many transposed ones back, and tanh on top.

    Batch norm and ReLU follow every layer but the last.
    """

    def __init__(self, channels: int = 3) -> None:
        """Make an autoencoder of images of `channels`."""
        super().__init__()
        self.channels = channels
        layers: list[nn.Module] = []
        before = channels
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        for width in WIDTHS[-2::-1]:
            layers += [nn.ConvTranspose2d(before, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers.append(nn.ConvTranspose2d(before, channels, 4, stride=2, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return as many values in (-1, 1) as normalised `images` (N×channels×H×W), H and W multiples of 16, have."""
        return torch.tanh(self.layers(images))
