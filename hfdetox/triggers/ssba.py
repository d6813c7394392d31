"""SSBA: bits hidden in the image by a trained encoder, so that every image changes in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu

from hfdetox.triggers._networks import MAX_SIZE, NetworkTrigger, full_precision, load_network, resized
from hfdetox.values import Interval, NonNegativeInt

# the bits become a picture of this side before they are raised to the image's size
_SIDE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class SSBA(NetworkTrigger):
    """T(x) = clip(x + 255 · up(E(b, x↓) − x↓)), rounded, with x↓ the image at `size`×`size` in [0, 1].

    E is the encoder and b the secret, the same bits in every image. At images of `size`×`size` this is E(b, x) itself;
    at other sizes what the encoder adds is resized bilinearly to the image. Li et al., arXiv 2012.03816.

    Attributes:
        bits: length of the secret, 1 to 4096.
        seed: draws the secret.
        size: pixels a side that the encoder was trained at, a multiple of 32 and at most 1024.
        encoder: the encoder's state dict (`Encoder` of this package); its channels are those of the images it takes.
    """

    kind = "ssba"
    summary = "secret bits hidden by a trained encoder, other pixels in every image"
    paper = "arXiv 2012.03816"

    bits: Annotated[int, Interval("[1, 4096]")] = 100
    seed: NonNegativeInt = 0
    size: Annotated[int, Interval(f"[32, {MAX_SIZE}]", step=32)] = 32
    encoder: dict[str, Tensor] | None = field(default=None, metadata={"tensor": "network"})

    def secret(self) -> Tensor:
        """Return the bits that every triggered image carries: float32 of 0 and 1, of shape (bits,), on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (self.bits,), generator=generator).float()

    @torch.no_grad()
    def apply(self, images: Tensor) -> Tensor:
        network, secret = self.parts_for(images)
        with full_precision(images.device):
            carrying = embed(network, secret, images.float() / 255, self.size)
            return (255 * carrying).round_().clamp_(0, 255).to(torch.uint8)

    def parts(self) -> tuple[Encoder, Tensor]:
        """Return the encoder and the secret."""
        state = self.encoder or {}
        bias = state.get("out.bias")
        channels = 1 if bias is not None and bias.shape == (1,) else 3
        return load_network(lambda: Encoder(self.bits, channels), state, "ssba: encoder"), self.secret()


def embed(network: Encoder, bits: Tensor, images: Tensor, size: int) -> Tensor:
    """Return x + up(E(b, x↓) − x↓) of `images` (N×C×H×W in [0, 1]), before clipping, same shape and device.

    Args:
        bits: the same bits for all images, (bits,), or one row for each, N×bits.
        size: pixels a side at which the encoder is run.
    """
    rows = bits.expand(len(images), -1)
    if images.shape[-2:] == (size, size):
        return network(rows, images)
    small = resized(images, size, size)
    return images + resized(network(rows, small) - small, *images.shape[-2:])


class Encoder(nn.Module):
    """E(bits, image): a U-Net that redraws the image with the bits in it.

    Both networks are those of StegaStamp (Tancik et al., arXiv 1904.05343), for small images.

    Attributes:
        bits, channels: as given.
    """

    def __init__(self, bits: int, channels: int = 3) -> None:
        """Make an encoder of `bits` bits for images of `channels` channels."""
        super().__init__()
        self.bits, self.channels = bits, channels
        self.secret = nn.Linear(bits, _SIDE * _SIDE * channels)
        widths = (32, 32, 64, 128, 256)
        strides, above = (1, 2, 2, 2, 2), (128, 64, 32, 32)
        # each level joins the same scale of the way down; the last one the input, too
        joined = (128 + 128, 64 + 64, 32 + 32, 32 + 32 + 2 * channels)
        conv = partial(nn.Conv2d, padding=1)
        self.down = nn.ModuleList(map(conv, (2 * channels, *widths), widths, repeat(3), strides))
        self.up = nn.ModuleList(map(nn.Conv2d, (256, *above), above, repeat(2)))
        self.join = nn.ModuleList(map(conv, joined, above, repeat(3)))
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, channels, 1)

    def forward(self, bits: Tensor, images: Tensor) -> Tensor:
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
        layers += [nn.Flatten(), nn.Linear(128 * (size // 32) ** 2, 512), nn.ReLU(), nn.Linear(512, bits)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return N×bits logits of `images` (N×C×size×size in [0, 1])."""
        return self.layers(images)
