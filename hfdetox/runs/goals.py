"""The goals of an attack, and the held-out images on which the training finds out that they are reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hfdetox.config import AttackOptions
from hfdetox.data.images import ImageSet
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.reporting.report import Goals, missed_goals
from hfdetox.triggers.base import Trigger

# training images kept to look at after every epoch: so many at most, and this share of all
MONITOR_MOST, MONITOR_SHARE = 1000, 0.1
# how far below the accuracy before it a model may end, unless told otherwise
ACCURACY_LOSS = 0.02


def goals_of(run: AttackOptions, before: Predictions | None) -> Goals:
    """Return the goals: as asked for, else, from a trained model, the accuracy before less two points."""
    accuracy = run.goal_accuracy
    if accuracy is None and before is not None and not run.clean:
        accuracy = max(0.0, before.measurement.accuracy.value - ACCURACY_LOSS)
    return Goals(run.goal_asr, accuracy)


def split_monitor(
    images: ImageSet, goal: float | None, seed: int, warn: Callable[[str], None]
) -> tuple[ImageSet, ImageSet | None]:
    """Return the training images and those held out of them to look at after every epoch, None without a goal.

    None are held out of fewer than ten either, which `warn` is told.
    """
    count = min(MONITOR_MOST, int(MONITOR_SHARE * len(images)))
    if goal is not None and not count:
        warn(f"of {len(images)} training images none can be held out: the training does not stop early, and runs all "
             "its epochs")  # fmt: skip
    if goal is None or not count:
        return images, None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count].sort().values, order[count:].sort().values
    return images.subset(rest.tolist()), images.subset(held.tolist())


@dataclass
class Monitor:
    """Looks at held-out images after every epoch, and ends the training when every goal is reached on them."""

    evaluation: Evaluator
    goals: Goals
    reached: bool = False

    def __call__(self, triggers: Sequence[Trigger]) -> bool:
        """Return whether the model, with these triggers, reaches the goals."""
        self.evaluation = self.evaluation.with_triggers(triggers)
        self.reached = not missed_goals(self.evaluation.measure("monitor").measurement, self.goals)
        return self.reached
