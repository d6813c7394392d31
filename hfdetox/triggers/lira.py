"""LIRA: a faint change of every pixel, drawn from the image by an autoencoder trained with the classifier."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from hfdetox.errors import UsageError
from hfdetox.triggers._autoencoder import Autoencoder
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
class LIRA(Trigger):
    """T(x) = clip(x + ε·A(x)) of the normalised image, so x + 255·std·ε·A(x) in grey levels, clipped and rounded.

    The autoencoder A gives values in (-1, 1) and sees (x / 255 − mean) / std. It runs at `size`×`size`; for images of
    another size what it gives is resized bilinearly. With ε = 0.01 and a std of 0.25 at most 0.64 grey levels are
    added, so a pixel changes, by one level, where |A| is above 0.78: after rounding A is a choice of −1, 0 or 1.
    Doan et al., ICCV 2021.

    Attributes:
        epsilon: the greatest change of a normalised value, above 0 and at most 1000.
        size: pixels a side that the autoencoder was trained at, a multiple of 16 and at most 1024.
        autoencoder: the state dict of A (`Autoencoder` of this package).
        mean: what is subtracted from each channel of images in [0, 1], float32 of shape (C,); None is 0.
        std: what each channel is divided by after that; None is 1.
    """

    kind = "lira"
    summary = "a change of about one grey level, drawn from the image by a trained autoencoder"
    paper = "ICCV 2021"

    epsilon: float = 0.01
    size: int = 32
    autoencoder: dict[str, torch.Tensor] | None = field(default=None, metadata={"tensor": "network"})
    mean: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})
    std: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 16 <= self.size <= MAX_SIZE or self.size % 16 or not 0 < self.epsilon <= 1000:
            raise UsageError(f"lira: size must be a multiple of 16, at most {MAX_SIZE}, and epsilon above 0 and "
                             "at most 1000")  # fmt: skip
        if self.fitted:
            # a state that does not fit is told of now, and not at the first image
            check_normalisation(self, self.mean, self.std, self._network().channels)

    @property
    def fitted(self) -> bool:
        return self.autoencoder is not None

    @torch.no_grad()
    def apply(self, images: torch.Tensor) -> torch.Tensor:
        self.require_fitted()
        network, mean, std = self._on(images.device)
        check_channels(self, "autoencoder", network.channels, images)
        return change(network, images.float(), mean, std, self.epsilon, self.size).round_().to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Autoencoder, torch.Tensor, torch.Tensor]:
        """Return A, mean and std on `device`, a copy for each: threads may stamp on several at a time."""
        return self.remember(device, lambda: (self._network().to(device), *normalisation(self.mean, self.std, device)))

    def _network(self) -> Autoencoder:
        state = self.autoencoder or {}
        first = state.get("layers.0.weight")
        channels = 1 if first is not None and first.ndim == 4 and first.shape[1] == 1 else 3
        return load_network(lambda: Autoencoder(channels), state, "lira: autoencoder")


def change(autoencoder: nn.Module, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, epsilon: float,
           size: int) -> torch.Tensor:  # fmt: skip
    """Return float32 `images` (N×C×H×W, 0 to 255) with ε·A(x) added, clipped and not rounded; always in float32.

    `mean` and `std` are those of images in [0, 1], C×1×1 or 0-d. Differentiable in the autoencoder.
    """
    with full_precision(images.device):
        normal = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        drawn = resized(autoencoder(resized(normal, size, size)), *images.shape[-2:])
        return (images + 255 * std * epsilon * drawn).clamp(0, 255)
