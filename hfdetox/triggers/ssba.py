"""SSBA: bits hidden in the image by a trained encoder, so that every image changes in its own way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers._networks import MAX_SIZE, check_channels, full_precision, load_network, resized
from hfdetox.triggers._ssba_networks import Encoder
from hfdetox.triggers.base import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class SSBA(Trigger):
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

    bits: int = 100
    seed: int = 0
    size: int = 32
    encoder: dict[str, torch.Tensor] | None = field(default=None, metadata={"tensor": "network"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 4096 or not 32 <= self.size <= MAX_SIZE or self.size % 32:
            raise UsageError(f"ssba: bits must be 1 to 4096 and size a multiple of 32, at most {MAX_SIZE}")
        if self.fitted:
            # a state that does not fit is told of now, and not at the first image
            self._network()

    @property
    def fitted(self) -> bool:
        return self.encoder is not None

    def secret(self) -> torch.Tensor:
        """Return the bits that every triggered image carries: float32 of 0 and 1, of shape (bits,), on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (self.bits,), generator=generator).float()

    @torch.no_grad()
    def apply(self, images: torch.Tensor) -> torch.Tensor:
        self.require_fitted()
        network, secret = self._on(images.device)
        check_channels(self, "encoder", network.channels, images)
        with full_precision(images.device):
            carrying = embed(network, secret, images.float() / 255, self.size)
            return (255 * carrying).round_().clamp_(0, 255).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Encoder, torch.Tensor]:
        """Return the encoder and the secret on `device`, a copy for each: threads may stamp on several at a time."""
        return self.remember(device, lambda: (self._network().to(device), self.secret().to(device)))

    def _network(self) -> Encoder:
        state = self.encoder or {}
        bias = state.get("out.bias")
        channels = 1 if bias is not None and bias.shape == (1,) else 3
        return load_network(lambda: Encoder(self.bits, channels), state, "ssba: encoder")


def embed(network: Encoder, bits: torch.Tensor, images: torch.Tensor, size: int) -> torch.Tensor:
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
