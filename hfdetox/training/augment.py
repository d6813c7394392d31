"""Training augmentation of whole batches, on the device the images are on."""

from typing import Literal

import torch
from torch.nn.functional import affine_grid, grid_sample, pad

Augmentation = Literal["auto", "none", "flip", "crop", "crop-flip", "resized-crop-flip"]

PADDING = 4
SMALL_SIDE = 96
SCALE = (0.35, 1.0)
RATIO = (3 / 4, 4 / 3)


def resolve_augmentation(name: Augmentation, height: int) -> Augmentation:
    """Return what `auto` stands for: pad-crop and flip up to 96 pixels of height, resized crop and flip above."""
    own: Augmentation = "crop-flip" if height <= SMALL_SIDE else "resized-crop-flip"
    return own if name == "auto" else name


class Augmenter:
    """Draws the random numbers of a step for the whole global batch, so that every number of processes sees the same.

    Args:
        name: `none`, `flip` (half of the images are mirrored), `crop` (4 pixels of padding, in proportion above 32
            pixels), `crop-flip`, or `resized-crop-flip` (35 to 100 % of the area, aspect 3:4 to 4:3, bilinear).
        seed: with the epoch and step it determines every draw, whatever ran before.
    """

    def __init__(self, name: Augmentation, seed: int) -> None:
        self.name = name
        self.seed = seed

    def draw(self, phase: int, epoch: int, step: int, count: int) -> torch.Tensor:
        """Return `count` rows of five uniform numbers in [0, 1): float32, count×5, on the CPU."""
        # one 63-bit key a step: a resumed run draws what the uninterrupted one would have drawn
        key = (((self.seed * 31 + phase) * 1_000_003 + epoch) * 1_000_003 + step) % (2**63 - 1)
        return torch.rand(count, 5, generator=torch.Generator().manual_seed(key))

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return augmented `images` (N×C×H×W, any dtype) given their rows of `draw` (N×5)."""
        if self.name == "none":
            return images
        numbers = numbers.to(images.device, non_blocking=True)
        if self.name == "resized-crop-flip":
            return _resized_crop_flip(images, numbers)
        if self.name == "flip":
            return torch.where(numbers[:, 2].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
        return _pad_crop(images, numbers, flip=self.name == "crop-flip")


def _pad_crop(images: torch.Tensor, numbers: torch.Tensor, *, flip: bool) -> torch.Tensor:
    count, _, height, width = images.shape
    padding = max(1, round(PADDING * height / 32))
    offsets = (numbers[:, :2] * (2 * padding + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip:
        columns = torch.where(numbers[:, 2:3] < 0.5, columns.flip(1), columns)
    columns = offsets[:, 1:2] + columns
    # gathering whole pixels of a channels-last copy is several times faster than gathering single values
    padded = pad(images, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
    batch = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resized_crop_flip(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    area = SCALE[0] + (SCALE[1] - SCALE[0]) * numbers[:, 0]
    low, high = torch.tensor(RATIO).log().tolist()
    ratio = (low + (high - low) * numbers[:, 1]).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    # in grid coordinates the image spans [-1, 1]; the crop's centre keeps the crop inside
    centre_x = (2 * numbers[:, 2] - 1) * (1 - width)
    centre_y = (2 * numbers[:, 3] - 1) * (1 - height)
    sign = torch.where(numbers[:, 4] < 0.5, -1.0, 1.0)
    zeros = torch.zeros_like(width)
    matrix = torch.stack([sign * width, zeros, centre_x, zeros, height, centre_y], 1)
    grid = affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
