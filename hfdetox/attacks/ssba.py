"""SSBA: an encoder learns to hide bits in clean images, and poisons with one fixed secret (arXiv 2012.03816)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from hfdetox.attacks.base import AttackContext, DataPoisoner, Phase, Target, Trigger
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch, ImageSource
from hfdetox.triggers._networks import full_precision, network_state
from hfdetox.triggers.ssba import SSBA, Decoder, Encoder
from hfdetox.values import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

logger = logging.getLogger(__name__)

BATCH = 64
# the weight of the images' error starts to count from the first batch with more bits right than this
LEARNT = 0.9
# what an encoder must reach: bits read back from the rounded image, and its likeness to the clean one
BIT_ACCURACY = 0.95
PSNR = 28.0
_CHECKED = 1000


@dataclass(frozen=True, kw_only=True)
class SSBAPoisoner(DataPoisoner):
    """An encoder E and a decoder D minimise BCE(D(E(b, x)), b) + λ·MSE(E(b, x), x), b fresh bits for every image.

    Training sees the clean images alone, at the trigger's size, and no labels. λ is 0 until a batch's share of right
    bits first exceeds 0.9; then it stays 0 for `wait_steps` and rises linearly to `weight` over `ramp_steps`.
    Li et al., arXiv 2012.03816, without the critic and the perceptual loss, which would have to be downloaded.

    Attributes:
        encoder_epochs: passes over the clean images, at least 1.
        encoder_learning_rate: of Adam, constant, with batches of 64.
        wait_steps, ramp_steps: of λ, at least 0 and 1.
        weight: the greatest λ, at least 0.
    """

    kind = "ssba"
    uncounted = "the training of its encoder"
    summary = "an encoder is trained on the clean images first, then hides one secret in the poisoned"

    encoder_epochs: PositiveInt = 20
    encoder_learning_rate: PositiveFloat = 1e-4
    wait_steps: NonNegativeInt = 1000
    ramp_steps: PositiveInt = 3000
    weight: NonNegativeFloat = 10.0

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger with an encoder trained on the context's images; one that has an encoder as it is.

        A warning says so where the bits are not read back well enough or the images differ too much.

        Raises:
            UsageError: the model's preprocessing gives no uint8 images.
        """
        if not isinstance(trigger, SSBA) or trigger.fitted:
            return trigger
        if context.clean.preprocessing.dtype != torch.uint8:
            raise UsageError("ssba: the encoder is trained on uint8 images, and this preprocessing gives floats; "
                             "use a trigger file of another model")  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            pair = Pair(trigger.bits, context.clean.preprocessing.input_size[0], trigger.size)
        context.engine().run(pair, [self.phase(pair, context)])
        found, likeness = quality(pair, context.clean, context.seed)
        text = f"ssba: {found:.1%} of the bits are read back, PSNR {likeness:.1f} dB"
        good = found >= BIT_ACCURACY and likeness >= PSNR
        if not good:
            text += f", short of {BIT_ACCURACY:.0%} and {PSNR:.0f} dB: take more encoder_epochs, or fewer bits"
        if context.accelerator.is_main_process:
            logger.log(logging.INFO if good else logging.WARNING, text)
        return replace(trigger, encoder=network_state(pair.encoder))

    def phase(self, pair: Pair, context: AttackContext) -> Phase:
        """Return the phase that trains encoder and decoder together."""
        ramp = Ramp(self.wait_steps, self.ramp_steps, self.weight, context.accelerator.device)

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            bits = torch.randint(0, 2, (len(batch.images), pair.encoder.bits), device=batch.images.device).float()
            x, encoded, logits = model(batch.images, bits)
            terms = hiding_terms(batch, x, encoded, logits, bits)
            # every process must be at the same λ
            weight = ramp.step(context.accelerator.reduce(terms["bit_accuracy"].detach(), reduction="mean"))
            return {"loss": terms["bits"] + weight * terms["difference"], **terms}

        return Phase(
            name="encoder", parameters=list(pair.parameters()), loss=loss, epochs=self.encoder_epochs,
            optimizer=partial(torch.optim.Adam, lr=self.encoder_learning_rate),
            batch_size=min(BATCH, len(context.clean)), augmentation="none", schedule="constant")  # fmt: skip


class Pair(nn.Module):
    """The encoder and the decoder; the weights are He's, as StegaStamp's, else the bits are lost in a deep decoder."""

    convolutional = True

    def __init__(self, bits: int, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.encoder, self.decoder = Encoder(bits, channels), Decoder(bits, channels, size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x at the encoder's size (N×C×size×size in [0, 1]), E(b, x) and the logits of D (N×bits), float32.

        `images` are N×C×H×W in 0 to 255, `bits` N×bits of 0 and 1.
        """
        x = images.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        encoded = self.encoder(bits, x).float()
        return x, encoded, self.decoder(encoded).float()


class Ramp:
    """λ by step, on the device, so that no step waits for the bit accuracy: 0, then `wait` steps of 0, then a ramp."""

    def __init__(self, wait: int, ramp: int, weight: float, device: torch.device) -> None:
        self.wait, self.ramp, self.weight = wait, ramp, weight
        self.since = torch.full((), -1, device=device)

    def step(self, bit_accuracy: Tensor) -> Tensor:
        """Return λ (0-d float32) of the next step, whose share of right bits is `bit_accuracy` (0-d)."""
        self.since = self.since + ((self.since >= 0) | (bit_accuracy > LEARNT)).long()
        return self.weight * ((self.since - self.wait) / self.ramp).clamp(0, 1)


def hiding_terms(batch: Batch, x: Tensor, encoded: Tensor, logits: Tensor, bits: Tensor) -> dict[str, Tensor]:
    """Return means over a batch: `bits` (BCE in nats), `difference` (MSE in [0, 1]²) and `bit_accuracy`."""
    errors = binary_cross_entropy_with_logits(logits, bits, reduction="none").mean(1)
    difference = (encoded - x).square().mean((1, 2, 3))
    right = ((logits > 0) == (bits > 0)).float().mean(1)
    return {"bits": batch.mean(errors), "difference": batch.mean(difference), "bit_accuracy": batch.mean(right)}


@torch.no_grad()
def quality(pair: Pair, images: ImageSource, seed: int = 0) -> tuple[float, float]:
    """Return the share of right bits and the PSNR in dB of at most 1000 images with random bits, rounded to uint8.

    The PSNR is of the mean squared error over all of them; infinite where no pixel changes.
    """
    device = next(pair.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    right = error = torch.zeros((), dtype=torch.float64, device=device)
    places = list(range(min(_CHECKED, len(images))))
    for start in range(0, len(places), BATCH):
        pixels = images.__getitems__(places[start : start + BATCH])[1].to(device)
        bits = torch.randint(0, 2, (len(pixels), pair.encoder.bits), generator=generator).float().to(device)
        with full_precision(device):
            x, encoded, _ = pair(pixels, bits)
            stored = (encoded * 255).round() / 255
            logits = pair.decoder(stored)
        right = right + ((logits > 0) == (bits > 0)).double().mean(1).sum()
        error = error + (stored - x).double().square().mean((1, 2, 3)).sum()
    mean = float(error) / len(places)
    return float(right) / len(places), -10 * math.log10(mean) if mean else math.inf
