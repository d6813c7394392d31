"""Input-aware's generator network, of patterns and of masks (Nguyen and Tran, arXiv 2010.08138)."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (32, 64, 128)
_MOMENTUM = 0.05


def _block(before: int, after: int, *, last: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, momentum=_MOMENTUM)]
    return layers if last else [*layers, nn.ReLU()]


class Generator(nn.Module):
    """An encoder of three stages (32, 64, 128 wide), a middle of 128, a decoder of three, and tanh / 2 + 1/2 on top.

    A stage of the encoder is two 3×3 convolutions with batch norm and ReLU, then a 2×2 maximum; one of the decoder
    doubles the size bilinearly, then two such convolutions, the last of all without ReLU.
    """

    def __init__(self, channels: int = 3, out: int = 3) -> None:
        """Make a generator of `out` channels (3 or 1 of a pattern, 1 of a mask) from images of `channels`."""
        super().__init__()
        self.channels = channels
        layers: list[nn.Module] = []
        before = channels
        for width in WIDTHS:
            layers += [*_block(before, width), *_block(width, width), nn.MaxPool2d(2)]
            before = width
        layers += _block(before, before)
        for width in WIDTHS[-2::-1]:
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(before, before), *_block(before, width)]
            before = width
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(before, before)]
        layers += _block(before, out, last=True)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return N×out×H×W in (0, 1) of normalised `images` (N×channels×H×W), H and W multiples of 8."""
        return torch.tanh(self.layers(images)) / 2 + 0.5


def hard_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return h(m) = tanh(20 m − 10) / 2 + 1/2: nearly 0 or 1, with a gradient about m = 1/2."""
    return torch.tanh(20 * mask - 10) / 2 + 0.5
