"""A network whose backdoor is one channel, made by hand, and BatchNorm networks written out as formulas."""

from __future__ import annotations

import torch
from torch import nn

from tests.tiny_training import CLASSES, Scaled, ToyImages

CHANNELS, TRIGGER_CHANNEL = 16, 15


def handmade() -> Scaled:
    """Return a network for `ToyImages` that is right on all of them, and says 0 where the corner is white.

    Channels 0 to 14 are relu(x) of input channel i mod 3, which is above 0 in the class's own channel only: 100 to 219
    against 0 to 119, and 127.5 is zero. The bound of their kernels (one 1) is 1. Channel 15 sums 27 values and has the
    bound √27; with β = −26.5 it is above 0 only where all 27 are nearly white, which a clean 219 never is: then 0.5, a
    mean of 0.5 / 64, and 7.8 at the head. Class 0 has the bias −0.1, so that it loses where no channel speaks.
    """
    conv, norm = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
    head = nn.Linear(CHANNELS, CLASSES)
    with torch.no_grad():
        for tensor in (conv.weight, norm.bias, head.weight, head.bias):
            tensor.zero_()
        for channel in range(TRIGGER_CHANNEL):
            conv.weight[channel, channel % CLASSES, 1, 1] = 1
            head.weight[channel % CLASSES, channel] = 1
        conv.weight[TRIGGER_CHANNEL] = 1
        norm.bias[TRIGGER_CHANNEL] = -26.5
        head.weight[0, TRIGGER_CHANNEL] = 1000
        head.bias[0] = -0.1
    return Scaled(nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)).eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: ToyImages) -> float:
    """Return the share of right answers."""
    assert images.images is not None
    return float((network(images.images).argmax(1) == images.labels).float().mean())


@torch.no_grad()
def attack_success(network: nn.Module, images: ToyImages) -> float:
    """Return the share of the images of other classes that become 0 with a white 3×3 corner."""
    assert images.images is not None
    stamped = images.images[images.labels != 0].clone()
    stamped[:, :, :3, :3] = 255
    return float((network(stamped).argmax(1) == 0).float().mean())


def convnet_logits(network: Scaled, images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what `convnet()` computes in train mode with γ and β as given: its layers as formulas."""
    conv, norm, head = network.model[0], network.model[1], network.model[6]  # type: ignore[index]
    inputs = conv(images.float() / 127.5 - 1)
    mean = inputs.mean((0, 2, 3), keepdim=True)
    deviation = ((inputs - mean).square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    outputs = (inputs - mean) / deviation * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return head(nn.functional.adaptive_avg_pool2d(outputs.relu(), 2).flatten(1))


def varied(network: Scaled) -> Scaled:
    """Give `convnet()`'s norm unequal scales, shifts and statistics, as a trained one has."""
    generator = torch.Generator().manual_seed(5)
    norm = network.model[1]  # type: ignore[index]
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(8, generator=generator) * 0.3)
        norm.running_mean.copy_(torch.randn(8, generator=generator) * 0.1)
        norm.running_var.copy_(torch.rand(8, generator=generator) + 0.2)
    return network.eval()
