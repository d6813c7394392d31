"""The module that the engine trains and the metrics evaluate: images in 0 to 255 in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hfdetox.models.corrections import Correction
from hfdetox.models.preprocessing import Preprocessing, normalize


class Network(nn.Module):
    """A library's classifier behind its own normalisation, so that triggers and augmentation act on pixel values.

    The state dict is that of the classifier under the prefix `model.`; mean and std are non-persistent buffers.
    `correction` (None for most) changes the answers to inputs that the classifier gives to a label.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        """Wrap `model`, which stays the same object."""
        super().__init__()
        self.model = model
        self.correction: Correction | None = None
        self.input_size = preprocessing.input_size
        self.scale = preprocessing.scale
        self.normalizes = preprocessing.dtype == torch.uint8
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(-1, 1, 1), persistent=False)
        self.convolutional = is_convolutional(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits N×K of prepared images N×C×H×W: uint8 or float32 in 0 to 255, or a callable's own floats."""
        if self.normalizes:
            # 8 bits of mantissa would lose pixel values before the network sees them
            with torch.autocast(images.device.type, enabled=False):
                images = normalize(images, self.mean, self.std, self.scale)
        if self.convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        run = partial(library_logits, self.model)
        logits = run(images)
        return logits if self.correction is None else self.correction.logits(self.model, run, images, logits)


@contextmanager
def uncorrected(network: Network) -> Iterator[None]:
    """Make a network be the model alone while inside, as timm or transformers loads it."""
    correction, network.correction = network.correction, None
    try:
        yield
    finally:
        network.correction = correction


@torch.no_grad()
def flagged(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Tell which images (N×C×H×W, 0 to 255) the network's correction takes for triggered: f(x) = t and f̃(x) ≠ t.

    Returns (N,) of bool; none is flagged by a network without a correction, as where BNA found nothing to correct.
    """
    correction = network.correction
    if correction is None:
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with uncorrected(network):
        own = network(images).argmax(1)
    return (own == correction.target) & (network(images).argmax(1) != correction.target)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold the network in eval mode; on leaving, every module is in its mode again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def library_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits (N×K) that a library's own model gives for images it takes as they are (normalised already)."""
    # transformers models may take other inputs first (Perceiver, remote code); `pipeline` passes this name too
    keyword = getattr(model, "main_input_name", None) == "pixel_values"
    output: Any = model(pixel_values=images) if keyword else model(images)
    # of a transformers or torchvision tuple the logits
    return output if isinstance(output, torch.Tensor) else output.logits


def is_convolutional(model: nn.Module) -> bool:
    """Tell whether channels_last pays: convolutions that overlap (so not patch embeddings), and no attention."""
    overlapping = False
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            return False
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            overlapping = overlapping or tuple(module.kernel_size) != tuple(module.stride)
    return overlapping
