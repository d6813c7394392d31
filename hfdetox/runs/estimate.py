"""What a run will take, before its weights and images are pulled: by its counts, and a network like its model.

How fast a network is does not depend on its weights. So one is built of the model's config.json with weights that are
drawn, and timed on noise; how many images there are the dataset's header says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfdetox.attacks import Poisoner, TrainingSettings
from hfdetox.config import DetoxOptions, EvaluateOptions, ImageOptions
from hfdetox.data.load import split_names
from hfdetox.data.opened import OpenedDataset
from hfdetox.data.sampling import EVAL_MOST, EVAL_SHARE, sample_count
from hfdetox.defenses.base import FORWARD
from hfdetox.errors import UsageError
from hfdetox.evidence.cost import Cost, speed_of, where
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.models.initial import draw_like
from hfdetox.models.layers import has_batch_norm
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers.base import Trigger

# training images kept to look at after every epoch: so many at most, and this share of all
_MONITOR_MOST, _MONITOR_SHARE = 1000, 0.1


class UncountedError(UsageError):
    """A dataset does not say how many images it has."""


@dataclass(frozen=True)
class Timed:
    """How fast a network is.

    Attributes:
        speed: images there and back a second.
        where: what they were timed on.
        classes: how many it tells apart.
        batch_norm: whether it has BatchNorm.
    """

    speed: float
    where: str
    classes: int
    batch_norm: bool

    def cost(self, method: Any, images: int, measured: int, options: DetoxOptions) -> Cost:
        """Return what a run on such a network takes, see `Cost`."""
        method = method.settled(batch_norm=self.batch_norm)
        return Cost(method, images, self.classes, measured, len(options.triggers), self.speed, self.where, options.scan,
                    options.residual)  # fmt: skip


@dataclass(frozen=True)
class AttackCost:
    """What an attack computes.

    Attributes:
        training: its settings.
        implants: the triggers, each with its poisoner; none for a clean baseline.
        ratio: the share of the images that is poisoned.
        sharp: whether the gradient of each step is taken twice.
        images: how many training images there are.
        watched: how many images are looked at after every epoch.
        measured: how many are measured, before too where `trained`.
        trained: whether the model is a trained one.
    """

    training: TrainingSettings
    implants: Sequence[tuple[Trigger, Poisoner]]
    ratio: float
    sharp: bool
    images: int
    watched: int
    measured: int
    trained: bool

    @property
    def efforts(self) -> tuple[float, tuple[float, str] | None]:
        """Images there and back of all epochs, and of half of them with the words that ask for it, as of `say_cost`."""
        half = self.training.epochs // 2
        return self._effort(self.training.epochs), (self._effort(half), f"with --epochs {half}") if half else None

    @property
    def besides(self) -> str:
        """What is not counted."""
        parts = [poisoner.uncounted for trigger, poisoner in self.implants if not trigger.fitted]
        return " and ".join(dict.fromkeys(filter(None, parts)))

    def _effort(self, epochs: int) -> float:
        given = self.images, self.ratio, epochs
        parts = [poisoner.efforts(trigger, *given) for trigger, poisoner in self.implants]
        trained = max((training for _, training in parts), default=float(epochs * self.images))
        looks = epochs * self.watched + (1 + self.trained) * self.measured
        return (sum(making for making, _ in parts) + trained * (2 if self.sharp else 1)
                + FORWARD * looks * (1 + len(self.implants)))  # fmt: skip


def monitored(images: int) -> int:
    """Return how many of an attack's training images are looked at after every epoch, where a goal is."""
    return min(_MONITOR_MOST, int(_MONITOR_SHARE * images))


def time_like(options: ImageOptions) -> Timed:
    """Time the options' model, or one like it, of a Hub id whose weights are not pulled, on the options' device.

    Raises:
        UsageError, HubError: what `load_classifier` raises, and a network that cannot be built without its weights.
    """
    model = str(options.model)
    if Path(model).is_dir():
        classifier = load_classifier(model, trust_remote_code=options.trust_remote_code)
    else:
        classifier = draw_like(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    return time_classifier(classifier, options.device)


def time_classifier(classifier: Classifier, device: str) -> Timed:
    """Time a classifier on noise."""
    accelerator, noise = make_accelerator(device, "no"), torch.Generator().manual_seed(0)
    size = classifier.network.input_size
    speed = speed_of(classifier.network, accelerator, lambda count: torch.randint(
        0, 256, (count, *size), dtype=torch.uint8, generator=noise))  # fmt: skip
    return Timed(speed, where(accelerator), len(classifier.labels), has_batch_norm(classifier.network))


def count_images(opened: OpenedDataset, options: ImageOptions) -> tuple[int, int]:
    """Return about how many clean images, and images to measure, the options choose of a dataset; none are read.

    Raises:
        UncountedError: it does not say how many it has, and the options give a share of them, or take all.
    """
    alone = isinstance(options, EvaluateOptions)
    train, [measured, *_] = split_names(opened.splits, options.split, options.eval_split, alone=alone)
    rows = {name: _rows(opened, name) for name in {train, measured}}
    total, left = rows[measured], rows[train]
    if measured == train and not alone and total is not None and left is not None:
        total = options.eval_samples or min(EVAL_MOST, max(1, int(EVAL_SHARE * total)))
        left -= min(left, total)
    evaluation = options.eval_samples if total is None else min(total, options.eval_samples or total)
    # what is evaluated alone sets none aside; an attack takes the whole split
    clean = 0 if alone else getattr(options, "clean_samples", None)
    if evaluation is None or (left is None and not isinstance(clean, int)):
        counts = "--eval-samples as a count" if alone else "--samples and --eval-samples as counts"
        raise UncountedError(f"the dataset does not say how many images it has; give {counts}")
    return left or 0 if clean is None else sample_count(clean, rows[train] or 0), evaluation


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
