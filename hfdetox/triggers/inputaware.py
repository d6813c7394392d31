"""Input-aware: a pattern and a few places for it, both made from the image by trained networks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers._generator import Generator, hard_mask
from hfdetox.triggers._networks import (
    MAX_SIZE,
    check_channels,
    check_normalisation,
    full_precision,
    load_network,
    normalisation,
    resized,
)
from hfdetox.triggers.base import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class InputAware(Trigger):
    """T(x) = x + (G(x) − x)·h(M(x)), rounded, with h(m) = tanh(20 m − 10) / 2 + 1/2.

    The generator G draws a pattern with the image's channels and M a mask of one, both from (x / 255 − mean) / std.
    They run at `size`×`size`; for images of another size the pattern is then resized bilinearly, and the mask to the
    nearest pixel. Nguyen and Tran, arXiv 2010.08138.

    Attributes:
        size: pixels a side that the networks were trained at, a multiple of 8 and at most 1024.
        generator: the state dict of G (`Generator` of this package).
        mask: the state dict of M.
        mean: what is subtracted from each channel of images in [0, 1], float32 of shape (C,); None is 0.
        std: what each channel is divided by after that; None is 1.
    """

    kind = "inputaware"
    summary = "a pattern at a few pixels, both drawn from the image by trained networks"
    paper = "arXiv 2010.08138"

    size: int = 32
    generator: dict[str, torch.Tensor] | None = field(default=None, metadata={"tensor": "network"})
    mask: dict[str, torch.Tensor] | None = field(default=None, metadata={"tensor": "network"})
    mean: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})
    std: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.size <= MAX_SIZE or self.size % 8:
            raise UsageError(f"inputaware: size must be a multiple of 8, at most {MAX_SIZE}")
        if self.fitted:
            # a state that does not fit is told of now, and not at the first image
            check_normalisation(self, self.mean, self.std, self._networks()[0].channels)

    @property
    def fitted(self) -> bool:
        return self.generator is not None and self.mask is not None

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return self.cross(images, images)

    def cross(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
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
    def patterns(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return G(x) and h(M(x)) of uint8 `images` (N×C×H×W): float32 in [0, 1], N×C×H×W and N×1×H×W.

        Raises:
            UsageError: not fitted, or another channel count.
        """
        self.require_fitted()
        generator, mask, mean, std = self._on(images.device)
        check_channels(self, "generator", generator.channels, images)
        with full_precision(images.device):
            x = (images.float() / 255 - mean) / std
            return draw_pattern(generator, x, self.size), draw_mask(mask, x, self.size)

    def _on(self, device: torch.device) -> tuple[Generator, Generator, torch.Tensor, torch.Tensor]:
        """Return G, M, mean and std on `device`, a copy for each: threads may stamp on several at a time."""

        def make() -> tuple[Generator, Generator, torch.Tensor, torch.Tensor]:
            generator, mask = self._networks()
            return generator.to(device), mask.to(device), *normalisation(self.mean, self.std, device)

        return self.remember(device, make)

    def _networks(self) -> tuple[Generator, Generator]:
        states = (self.generator or {}, self.mask or {})
        first = states[0].get("layers.0.weight")
        channels = 1 if first is not None and first.ndim == 4 and first.shape[1] == 1 else 3
        return (
            load_network(lambda: Generator(channels, channels), states[0], "inputaware: generator"),
            load_network(lambda: Generator(channels, 1), states[1], "inputaware: mask"),
        )


def draw_pattern(generator: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    """Return G(x) of normalised float32 `images` (N×C×H×W), in [0, 1], same shape; differentiable in both."""
    pattern = generator(resized(images, size, size))
    # under autocast the pattern may be bfloat16, of which the CPU cannot take this gradient
    return pattern if pattern.shape == images.shape else resized(pattern.float(), *images.shape[-2:])


def draw_mask(mask: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    """Return h(M(x)) of normalised float32 `images` (N×C×H×W): N×1×H×W in [0, 1]; differentiable in both."""
    return interpolate(hard_mask(mask(resized(images, size, size))), size=images.shape[-2:], mode="nearest")
