"""Gratings: images with a wave of one frequency over the whole of them, drawn at random.

A picture that is added to every image is a sum of such waves (the Fourier basis), and how a network reads each of them
tells how it will read what is added (Yin et al., arXiv 1906.08988). A network that is taught to see past all of them
sees past triggers that are a texture, which no search of a patch or of a blend finds.
"""

import math

import torch
from torch import Tensor

# waves across an image at most, in each direction; grey levels
MOST_TURNS, AMPLITUDES = 8, (10.0, 50.0)


def with_gratings(images: Tensor, share: float) -> Tensor:
    """Return images (N×C×H×W, 0 to 255; float32 returned) of which about a `share`, drawn at random, have a grating.

    The same wave is added to all channels; frequency, phase and amplitude are uniform, and each image has its own. All
    is drawn from torch's CPU generator, so nothing waits for the device.
    """
    chosen = (torch.rand(len(images)) < share).nonzero().flatten()
    drawn = torch.rand(4, len(chosen), 1, 1)
    chosen, drawn = (part.to(images.device, non_blocking=True) for part in (chosen, drawn))
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(-1, 1) / height
    columns = torch.arange(width, device=images.device) / width
    down, across = (MOST_TURNS * (2 * part - 1) for part in drawn[:2])
    low, high = AMPLITUDES
    waves = (low + (high - low) * drawn[3]) * torch.sin(2 * math.pi * (down * rows + across * columns + drawn[2]))
    found = images.float().clone()
    found[chosen] = (found[chosen] + waves[:, None]).clamp(0, 255)
    return found
