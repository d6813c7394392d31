"""The search of triggers on a frozen network: of small patches, and of faint blends, for several classes at once.

Both are a mask m and a pattern q in [0, 1] that make an image x (0 to 255) into

    T(x) = (1 − m) x + m · 255 q

A patch has a mask of its own for every pixel, as Neural Cleanse has it (`bounded` free variables, all 1 at first):

    min over m, q of  mean_i ce(f(T(x_i)), c) + κ ‖m‖₁

and a blend one α for the whole image, and a pattern that is not finer than the images usually were, 32×32:

    min over q of  mean_i ce(f(T(x_i)), c),   m = α

Each class has variables of its own, and the images of a step are the same for all of them: many classes searched
together give what each gives alone. The network is in eval mode, and no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

# grey levels of 1 in the pixel space [0, 1] of the papers
PIXEL = 255.0
# stamped images in one forward, for the memory's sake
TOGETHER = 1024
# images of a step
BATCH = 48
# the finest grids that are searched, and the images whose pixels κ is meant for
PATCH_GRID, BLEND_GRID, _SIDE = 64, 32, 32

# the losses and the successes (k each) of some rows of the variables
Group = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stamps:
    """Triggers that were searched, one for each of k classes.

    Attributes:
        classes: the label index that each leads to.
        masks: float32, k×1×h×w, in [0, 1]; h = w = 1 for a blend.
        patterns: float32, k×C×h×w, in [0, 1]; of a size of their own.
        passes: images that went through the network in the search; a backward counts as one more.
    """

    classes: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    passes: int

    def norms(self, height: int, width: int) -> Tensor:
        """Return ‖m‖₁ (k) of the masks on images of so many pixels."""
        return resized(self.masks, height, width).sum((1, 2, 3))


def bounded(free: Tensor) -> Tensor:
    """Return tanh(·)/2 + ½, in [0, 1]."""
    return free.tanh() / 2 + 0.5


def resized(grid: Tensor, height: int, width: int) -> Tensor:
    """Return `grid` (N×C×h×w, float32) on images of this size, bilinearly."""
    if tuple(grid.shape[-2:]) == (height, width):
        return grid
    return interpolate(grid, size=(height, width), mode="bilinear", antialias=True)


def stamped(x: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """Return (1 − m) x + m q for each of k triggers and N images (0 to 255): k·N×C×H×W, trigger by trigger.

    `masks` (k×1×H×W) and `patterns` (k×C×H×W) are in [0, 1].
    """
    masks, patterns = masks[:, None], patterns[:, None]
    return ((1 - masks) * x + PIXEL * masks * patterns).flatten(0, 1)


def led(network: nn.Module, x: Tensor, weights: Tensor, stamps: tuple[Tensor, Tensor],
        classes: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the cross-entropy to its class of the images under each of k triggers, and how many obey (k each).

    Args:
        x: N×C×H×W, float32, 0 to 255.
        weights: of the images (N); 1/N each gives the means.
        stamps: masks and patterns as `stamped` takes them.
        classes: k label indices (int64).
    """
    logits = network(stamped(x, *stamps)).float()
    wanted = classes.repeat_interleave(len(x))
    errors = cross_entropy(logits, wanted, reduction="none").view(len(classes), -1)
    hits = (logits.detach().argmax(1) == wanted).view(len(classes), -1)
    return (weights * errors).sum(1), (weights * hits).sum(1)


def slopes(free: Sequence[Tensor], rows: Tensor, count: int,
           group: Group) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Return the gradients by `free` of the summed losses of `rows`, the losses by group, and the successes (k).

    Each group of classes has its gradients taken at once, so that the memory is that of one group of `count` images
    for each class.
    """
    found, losses, rates = [torch.zeros_like(tensor) for tensor in free], [], []
    for part in rows.split(max(1, TOGETHER // count)):
        values, success = group(part)
        # gradients of a mean could vanish in fp16
        for slope, gradient in zip(found, torch.autograd.grad(values.sum() * count, free), strict=True):
            slope.add_(gradient / count)
        losses.append(values.detach())
        rates.append(success)
    return found, losses, torch.cat(rates)


def search_patches(network: nn.Module, images: Tensor, classes: Sequence[int], *, generator: torch.Generator,
                   steps: int = 120, batch_size: int = BATCH, rate: float = 0.1, kappa: float = 0.02,
                   ) -> Stamps:  # fmt: skip
    """Search the smallest patch for each class.

    Args:
        network: in eval mode, on the device of the result; takes images in 0 to 255.
        images: those to search on, as the model sees them (N×C×H×W, uint8 or float32 in 0 to 255), anywhere.
        classes: label indices.
        generator: of the CPU; draws the images of the steps.
        steps: of Adam (betas 0.5 and 0.9).
        batch_size: images of a step; all where there are fewer.
        rate: Adam's learning rate.
        kappa: κ for images of 32×32 pixels; at others so that it means the same.
    """
    device, (channels, height, width) = next(network.parameters()).device, images.shape[1:]
    grid = (min(height, PATCH_GRID), min(width, PATCH_GRID))
    masks = torch.ones(len(classes), 1, *grid, device=device, requires_grad=True)
    patterns = torch.ones(len(classes), channels, *grid, device=device, requires_grad=True)
    # a cell of a coarse grid is that share of the image
    cost = kappa * _SIDE**2 / (grid[0] * grid[1])

    def stamps(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = bounded(masks[rows])
        pattern = resized(bounded(patterns[rows]), height, width)
        return resized(mask, height, width), pattern, cost * mask.sum((1, 2, 3))

    adam = torch.optim.Adam([masks, patterns], rate, (0.5, 0.9))
    passes = _descend(network, images, classes, adam, stamps, generator, steps, batch_size)
    return Stamps(tuple(classes), bounded(masks.detach()), bounded(patterns.detach()), passes)


def search_blends(network: nn.Module, images: Tensor, classes: Sequence[int], *, alpha: float,
                  generator: torch.Generator, steps: int = 60, batch_size: int = BATCH,
                  rate: float = 0.15) -> Stamps:  # fmt: skip
    """Search the picture that leads to each class when it is blended in with the share α; arguments as above.

    The betas of Adam are 0.9 and 0.999.
    """
    device, (channels, height, width) = next(network.parameters()).device, images.shape[1:]
    grid = (min(height, BLEND_GRID), min(width, BLEND_GRID))
    free = torch.zeros(len(classes), channels, *grid, device=device, requires_grad=True)
    masks = torch.full((len(classes), 1, 1, 1), alpha, device=device)

    def stamps(rows: Tensor) -> tuple[Tensor, Tensor, float]:
        return masks[rows], resized(free[rows].sigmoid(), height, width), 0.0

    adam = torch.optim.Adam([free], rate)
    passes = _descend(network, images, classes, adam, stamps, generator, steps, batch_size)
    return Stamps(tuple(classes), masks, free.detach().sigmoid(), passes)


@torch.enable_grad()
def _descend(network: nn.Module, images: Tensor, classes: Sequence[int], adam: torch.optim.Adam,
             stamps: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | float]], generator: torch.Generator,
             steps: int, batch_size: int) -> int:  # fmt: skip
    """Take the steps; return the image passes. `stamps` gives masks, patterns and costs of some rows."""
    free = adam.param_groups[0]["params"]
    wanted, rows = torch.tensor(classes, device=free[0].device), torch.arange(len(classes), device=free[0].device)
    count = min(batch_size, len(images))
    weights = torch.full((count,), 1 / count, device=free[0].device)
    for _ in range(steps):
        chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
        x = images[chosen].to(free[0].device).float()

        def group(part: Tensor, x: Tensor = x) -> tuple[Tensor, Tensor]:
            masks, patterns, costs = stamps(part)
            errors, success = led(network, x, weights, (masks, patterns), wanted[part])
            return errors + costs, success

        for variable, slope in zip(free, slopes(free, rows, count, group)[0], strict=True):
            variable.grad = slope
        adam.step()
    return 2 * steps * count * len(classes)


@torch.no_grad()
def success_counts(network: nn.Module, images: Tensor, labels: Tensor, stamps: Stamps) -> tuple[Tensor, Tensor]:
    """Return how many images each trigger leads to its class, and of how many: those of other labels (k each, int64).

    Args:
        network: in eval mode.
        images: N×C×H×W, uint8 or float32 in 0 to 255, others than those of the search; they carry whole grey levels.
        labels: N true labels (int64).
    """
    device, (height, width) = next(network.parameters()).device, images.shape[2:]
    masks, patterns = (resized(part, height, width) for part in (stamps.masks, stamps.patterns))
    hits = torch.zeros(len(stamps.classes), dtype=torch.int64)
    counts = torch.stack([(labels != wanted).sum() for wanted in stamps.classes]).cpu()
    for row, wanted in enumerate(stamps.classes):
        for part in images[(labels != wanted).to(images.device)].split(TOGETHER):
            x = stamped(part.to(device).float(), masks[row : row + 1], patterns[row : row + 1])
            hits[row] += (network((x + 1e-4).floor()).argmax(1) == wanted).sum().cpu()
    return hits, counts
