"""SSBA's two networks: one hides bits in an image, the other reads them (Li et al., arXiv 2012.03816).

They are those of StegaStamp (Tancik et al., arXiv 1904.05343), for small images.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, relu

# the bits become a picture of this side before they are raised to the image's size
_SIDE = 16


class Encoder(nn.Module):
    """E(bits, image): a U-Net that redraws the image with the bits in it.

    Attributes:
        bits, channels: as given.
    """

    def __init__(self, bits: int, channels: int = 3) -> None:
        """Make an encoder of `bits` bits for images of `channels` channels."""
        super().__init__()
        self.bits, self.channels = bits, channels
        self.secret = nn.Linear(bits, _SIDE * _SIDE * channels)
        widths = (32, 32, 64, 128, 256)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if level == 0 else 2, padding=1)
            for level, (before, after) in enumerate(zip((2 * channels, *widths[:-1]), widths, strict=True))
        )
        above = (128, 64, 32, 32)
        self.up = nn.ModuleList(
            nn.Conv2d(before, after, 2) for before, after in zip((256, *above[:-1]), above, strict=True)
        )
        # each level joins the same scale of the way down; the last one the input, too
        joined = (128 + 128, 64 + 64, 32 + 32, 32 + 32 + 2 * channels)
        self.join = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(joined, above, strict=True)
        )
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, channels, 1)

    def forward(self, bits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return images (N×C×H×W in [0, 1]) that carry `bits` (N×bits, 0 or 1); H and W are multiples of 16."""
        picture = relu(self.secret(bits)).view(-1, self.channels, _SIDE, _SIDE)
        inputs = torch.cat([interpolate(picture, size=images.shape[-2:], mode="nearest"), images], 1)
        levels, x = [], inputs
        for layer in self.down:
            x = relu(layer(x))
            levels.append(x)
        levels[0] = torch.cat([levels[0], inputs], 1)
        for up, join, beside in zip(self.up, self.join, levels[-2::-1], strict=True):
            raised = relu(up(pad(interpolate(x, scale_factor=2.0, mode="nearest"), (0, 1, 0, 1))))
            x = relu(join(torch.cat([beside, raised], 1)))
        return torch.sigmoid(self.out(relu(self.last(x))))


class Decoder(nn.Module):
    """D(image): logits of the bits that an image carries."""

    def __init__(self, bits: int, channels: int = 3, size: int = 32) -> None:
        """Make a decoder of `bits` bits for images of `channels` channels and `size` pixels a side, 32·k."""
        super().__init__()
        widths, strides = (32, 32, 64, 64, 64, 128, 128), (2, 1, 2, 1, 2, 2, 2)
        layers: list[nn.Module] = []
        for before, after, stride in zip((channels, *widths[:-1]), widths, strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(128 * (size // 32) ** 2, 512), nn.ReLU(), nn.Linear(512, bits)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return N×bits logits of `images` (N×C×size×size in [0, 1])."""
        return self.layers(images)
