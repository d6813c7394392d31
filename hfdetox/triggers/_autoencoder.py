"""LIRA's autoencoder, which draws what is added to an image (Doan et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (16, 32, 64, 128)


class Autoencoder(nn.Module):
    """Four 4×4 convolutions of stride 2 (16, 32, 64, 128 wide), as many transposed ones back, and tanh on top.

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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return as many values in (-1, 1) as normalised `images` (N×channels×H×W), H and W multiples of 16, have."""
        return torch.tanh(self.layers(images))
