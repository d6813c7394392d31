"""How images reach a step: sources, the order of an epoch and its split over processes, and the loader of both uses."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader

from hfdetox.errors import UsageError

MAX_WORKERS = 8


class ImageSource(Protocol):
    """Labelled images to train on or to measure with.

    `images` is the cache (N×C×H×W, uint8 or a callable's own floats), or None when they are decoded on demand;
    `positions` (N, int64) is what `__getitems__` gives first: each image's own number, whatever the order.
    """

    images: torch.Tensor | None
    labels: torch.Tensor
    positions: torch.Tensor

    def __len__(self) -> int: ...

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Batch:
    """This process's part of a step: augmented images (N×C×H×W, 0 to 255), labels (N, int64) and weights (N, float32).

    `positions` (N, int64, on the CPU) are the images' own numbers in their source, empty in a batch made by hand.
    The weights make Σ w_i l_i, averaged over processes and accumulated parts, the mean of l over the whole batch,
    however unevenly the batch was split.

    `rows` are the numbers of these images in the step over all processes and parts, which has `rows.stop` images; None
    where the batch is the whole step.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rows: range | None = None
    _drawn: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return Σ_i w_i v_i (0-d) of a value for each image (N)."""
        return (self.weights * values).sum()

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor | None = None,
                      smoothing: float = 0.0) -> torch.Tensor:  # fmt: skip
        """Return Σ_i w_i ce(z_i, q_i), 0-d float32, for logits N×K and labels y (N, int64), by default the images' own.

        The target q is 1 − s on the label and s / (K − 1) on every other class, with s = `smoothing` in [0, 1).
        (PyTorch's own smoothing puts s / K on every class, the label too.)
        """
        with torch.autocast(logits.device.type, enabled=False):
            logs = log_softmax(logits.float(), dim=1)
            right = logs.gather(1, (self.labels if labels is None else labels)[:, None]).squeeze(1)
            errors = -right
            if smoothing:
                errors = -(1 - smoothing) * right - smoothing / (logits.shape[1] - 1) * (logs.sum(1) - right)
            return self.mean(errors)

    def once(self, name: str, draw: Callable[[], Any]) -> Any:
        """Return what `draw` gave for this batch when first asked for `name`: a loss may be asked twice in a step."""
        if name not in self._drawn:
            self._drawn[name] = draw()
        return self._drawn[name]


def step_bounds(count: int, batch_size: int, parts: int) -> list[tuple[int, int]]:
    """Return first and end position of every optimiser step of an epoch over `count` images, in `parts` parts each.

    A last step too small for two images a part (BatchNorm needs two) joins the one before it.
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < 2 * parts:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


class StepPlan:
    """The order of an epoch and its split: yields, part by part, the places this process takes of every step.

    A step of `batch_size` images is dealt in turn to its parts (processes × accumulated parts), so that they differ by
    one image at most. With `steps`, an epoch ends after so many, and the images of each epoch are drawn anew. `places`
    (int64, in a source) are the images of a part of it; without, `count` are all.
    """

    def __init__(self, count: int, batch_size: int, accumulated: int, accelerator: Accelerator, seed: int,
                 steps: int | None = None, places: torch.Tensor | None = None) -> None:  # fmt: skip
        self.accumulated = accumulated
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        self.parts = self.accumulated * self.processes
        if min(count, batch_size) < 2 * self.parts:
            raise UsageError(f"{count} images in batches of {batch_size} are too few for {self.parts} parts (processes "
                             "times accumulation steps) of two images; use fewer parts or more --samples")  # fmt: skip
        self.bounds = step_bounds(count, batch_size, self.parts)[:steps]
        self.count, self.seed, self.epoch = self.bounds[-1][1], seed, 0
        self.places = torch.arange(count) if places is None else places

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.bounds)

    def size(self, step: int) -> int:
        """Return how many images a step sees over all parts."""
        return self.bounds[step][1] - self.bounds[step][0]

    def share(self, part: int) -> slice:
        """Return which of a whole step's images this process takes for one accumulated part."""
        return slice(part * self.processes + self.rank, None, self.parts)

    def rows(self, step: int, part: int) -> range:
        """Return the numbers, in the whole step, of the images that this process takes of it for one part."""
        return range(self.size(step))[self.share(part)]

    def __len__(self) -> int:
        return self.steps * self.accumulated

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * (self.epoch + 1))
        order = self.places[torch.randperm(len(self.places), generator=generator)]
        for begin, end in self.bounds:
            for part in range(self.accumulated):
                yield order[begin:end][self.share(part)].tolist()


def source_loader(source: ImageSource, batches: StepPlan | Sequence[list[int]] | int,
                  device: torch.device) -> DataLoader[Any]:  # fmt: skip
    """Return a loader of (positions, images, labels): a plan's parts, given places, or batches of a size in order.

    A cached source is indexed in this process; one that decodes on demand gets worker processes.
    """
    cached = source.images is not None
    workers = 0 if cached else min(MAX_WORKERS, os.cpu_count() or 1)
    order: dict[str, Any] = {"batch_size" if isinstance(batches, int) else "batch_sampler": batches}
    return DataLoader(source, collate_fn=_as_it_is, num_workers=workers, persistent_workers=workers > 0,  # type: ignore[arg-type]
                      pin_memory=not cached and device.type == "cuda", **order)  # fmt: skip


def _as_it_is(batch: Any) -> Any:
    return batch
