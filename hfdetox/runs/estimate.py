"""What a run will take, before its weights and images are pulled: by its counts, and a network like its model.

How fast a network is does not depend on its weights. So one is built of the model's config.json with weights that are
drawn, and timed on noise; how many images there are the dataset's header says.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfdetox.config import DetoxOptions
from hfdetox.data.load import split_names
from hfdetox.data.opened import OpenedDataset
from hfdetox.data.sampling import EVAL_MOST, EVAL_SHARE, sample_count
from hfdetox.errors import UsageError
from hfdetox.evidence.cost import Cost, speed_of, where
from hfdetox.models.classifier import load_classifier
from hfdetox.models.initial import draw_like
from hfdetox.training.devices import make_accelerator


class UncountedError(UsageError):
    """A dataset does not say how many images it has."""


@dataclass(frozen=True)
class Timed:
    """How fast a network is: images a second there and back, on what (`where`), and how many classes it tells apart."""

    speed: float
    where: str
    classes: int

    def cost(self, method: Any, images: int, measured: int, options: DetoxOptions) -> Cost:
        """Return what a run on such a network takes, see `Cost`."""
        return Cost(method, images, self.classes, measured, len(options.triggers), self.speed, self.where, options.scan,
                    options.residual)  # fmt: skip


def time_like(options: DetoxOptions) -> Timed:
    """Time the options' model, or one like it, of a Hub id whose weights are not pulled, on the options' device.

    Raises:
        UsageError, HubError: what `load_classifier` raises, and a network that cannot be built without its weights.
    """
    model, noise = str(options.model), torch.Generator().manual_seed(0)
    if Path(model).is_dir():
        classifier = load_classifier(model, trust_remote_code=options.trust_remote_code)
    else:
        classifier = draw_like(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    accelerator = make_accelerator(options.device, "no")
    size = classifier.network.input_size
    speed = speed_of(classifier.network, accelerator, lambda count: torch.randint(
        0, 256, (count, *size), dtype=torch.uint8, generator=noise))  # fmt: skip
    return Timed(speed, where(accelerator), len(classifier.labels))


def count_images(opened: OpenedDataset, options: DetoxOptions) -> tuple[int, int]:
    """Return about how many clean images, and images to measure, the options choose of a dataset; none are read.

    Raises:
        UncountedError: it does not say how many it has, and the options give a share of them.
    """
    train, [measured, *_] = split_names(opened.splits, options.split, options.eval_split)
    rows = {name: _rows(opened, name) for name in {train, measured}}
    total = rows[measured]
    if measured == train and total is not None:
        total = options.eval_samples or min(EVAL_MOST, max(1, int(EVAL_SHARE * total)))
    evaluation = options.eval_samples if total is None else min(total, options.eval_samples or total)
    clean = options.clean_samples
    if evaluation is None or (rows[train] is None and isinstance(clean, float)):
        raise UncountedError("the dataset does not say how many images it has; give --samples and --eval-samples as "
                             "counts")  # fmt: skip
    return sample_count(clean, rows[train] or 0), evaluation


def _rows(opened: OpenedDataset, split: str) -> int | None:
    # a split to measure may be without labels, where a run takes another
    with suppress(UsageError):
        return opened.open(split).rows
    return None


def estimate(options: DetoxOptions, method: Any, opened: OpenedDataset) -> Cost:
    """Return what a run of these options will take, without weights or images.

    Args:
        method: the defense's configuration.
        opened: the options' dataset.

    Raises:
        UncountedError: the dataset does not say how many images it has.
        UsageError, HubError: see `time_like`.
    """
    counts = count_images(opened, options)
    return time_like(options).cost(method, *counts, options)
