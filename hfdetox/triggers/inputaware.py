"""Input-aware: a pattern and a few places for it, both made from the image by trained networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers._networks import MAX_SIZE, NormalisedTrigger, channels_of, full_precision, load_network, resized
from hfdetox.values import Interval

WIDTHS = (32, 64, 128)
_MOMENTUM = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class InputAware(NormalisedTrigger):
    """T(x) = x + (G(x) − x)·h(M(x)), rounded, with h(m) = tanh(20 m − 10) / 2 + 1/2.

    The generator G draws a pattern with the image's channels and M a mask of one, both from (x / 255 − mean) / std.
    They run at `size`×`size`; for images of another size the pattern is then resized bilinearly, and the mask to the
    nearest pixel. Nguyen and Tran, arXiv 2010.08138.

    Attributes:
        size: pixels a side that the networks were trained at, a multiple of 8 and at most 1024.
        generator: the state dict of G (`Generator` of this package).
        mask: the state dict of M.
        mean, std: of their normalisation, see `NormalisedTrigger`.
    """

    kind = "inputaware"
    summary = "a pattern at a few pixels, both drawn from the image by trained networks"
    paper = "arXiv 2010.08138"

    size: Annotated[int, Interval(f"[8, {MAX_SIZE}]", step=8)] = 32
    generator: dict[str, Tensor] | None = field(default=None, metadata={"tensor": "network"})
    mask: dict[str, Tensor] | None = field(default=None, metadata={"tensor": "network"})

    def apply(self, images: Tensor) -> Tensor:
        return self.cross(images, images)

    def cross(self, images: Tensor, others: Tensor) -> Tensor:
        """Return `images` with the patterns and masks of `others`, both uint8 N×C×H×W on one device; uint8.

        A model with this backdoor must keep the true label of such images.

        Raises:
            UsageError: not fitted, another channel count, or two shapes.
        """
        if images.shape != others.shape:
            raise UsageError(f"inputaware: images of shape {tuple(images.shape)} cannot carry the patterns of "
                             f"{tuple(others.shape)}; give as many of the same size")  # fmt: skip
        pattern, places = self.patterns(others)
        x = images.float()
        return (x + (255 * pattern - x) * places).round_().clamp_(0, 255).to(torch.uint8)

    @torch.no_grad()
    def patterns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(x) and h(M(x)) of uint8 `images` (N×C×H×W): float32 in [0, 1], N×C×H×W and N×1×H×W.

        Raises:
            UsageError: not fitted, or another channel count.
        """
        generator, mask, mean, std = self.parts_for(images)
        with full_precision(images.device):
            x = (images.float() / 255 - mean) / std
            return draw_pattern(generator, x, self.size), draw_mask(mask, x, self.size)

    def parts(self) -> tuple[Generator, Generator, Tensor, Tensor]:
        """Return G, M, mean and std."""
        states = (self.generator or {}, self.mask or {})
        channels = channels_of(states[0])
        pattern = load_network(lambda: Generator(channels, channels), states[0], "inputaware: generator")
        mask = load_network(lambda: Generator(channels, 1), states[1], "inputaware: mask")
        return pattern, mask, *self.normalisation(channels)


def draw_pattern(generator: nn.Module, images: Tensor, size: int) -> Tensor:
    """Return G(x) of normalised float32 `images` (N×C×H×W), in [0, 1], same shape; differentiable in both."""
    pattern = generator(resized(images, size, size))
    # under autocast the pattern may be bfloat16, of which the CPU cannot take this gradient
    return pattern if pattern.shape == images.shape else resized(pattern.float(), *images.shape[-2:])


def draw_mask(mask: nn.Module, images: Tensor, size: int) -> Tensor:
    """Return h(M(x)) of normalised float32 `images` (N×C×H×W): N×1×H×W in [0, 1]; differentiable in both."""
    return interpolate(hard_mask(mask(resized(images, size, size))), size=images.shape[-2:], mode="nearest")


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

    def forward(self, images: Tensor) -> Tensor:
        """Return N×out×H×W in (0, 1) of normalised `images` (N×channels×H×W), H and W multiples of 8."""
        return torch.tanh(self.layers(images)) / 2 + 0.5


def hard_mask(mask: Tensor) -> Tensor:
    """Return h(m) = tanh(20 m − 10) / 2 + 1/2: nearly 0 or 1, with a gradient about m = 1/2."""
    return torch.tanh(20 * mask - 10) / 2 + 0.5
