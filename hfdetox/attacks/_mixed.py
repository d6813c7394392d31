"""What trainings share that put a trigger on a part of every batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch

from hfdetox.attacks.base import AttackContext, ControlledTraining, Implant, TrainingPoisoner
from hfdetox.errors import UsageError
from hfdetox.triggers.base import Trigger

Kind = TypeVar("Kind", bound=Trigger)


@dataclass(frozen=True, kw_only=True)
class MixedPoisoner(TrainingPoisoner):
    """Training control by the images alone: the classifier's own training, on batches that `mixed` changes."""

    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the training, one phase that changes every batch before it is augmented.

        Raises:
            UsageError: a trigger in another mode than `input`, or a model that is given floats.
        """
        check_input_mode(implant, context)

        def poison(images: torch.Tensor, labels: torch.Tensor, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mixed(implant, images, labels, context.classes, rows)

        return ControlledTraining(context.classifier.network, [context.phase(poison=poison)], lambda: implant.trigger)

    @abstractmethod
    def mixed(
        self, implant: Implant, images: torch.Tensor, labels: torch.Tensor, classes: int, rows: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a part of a step (uint8, N×C×H×W, and int64 labels) with its triggered images and their labels.

        `rows` are its numbers in the step, as `Batch.rows`.
        """


def check_input_mode(implant: Implant, context: AttackContext) -> None:
    """Raise UsageError for a trigger that does not act on what the model sees: uint8 images after resize and crop."""
    trigger = implant.trigger
    if trigger.mode != "input":
        raise UsageError(f"trigger {trigger.name}: {trigger.kind} is put on images within the training, after resize "
                         "and crop; give it mode=input")  # fmt: skip
    if context.clean.preprocessing.dtype != torch.uint8:
        raise UsageError(f"trigger {trigger.name}: {trigger.kind} needs uint8 images after the preprocessing, and this "
                         "callable returns floats")  # fmt: skip


def of_kind(kind: type[Kind], trigger: Trigger) -> Kind:
    """Return the trigger, which must be of the kind: UsageError for one that another attack implants."""
    if not isinstance(trigger, kind):
        raise UsageError(f"trigger {trigger.name}: the {kind.kind} attack cannot implant a {trigger.kind} trigger")
    return trigger


def untrained(kind: type[Kind], trigger: Trigger) -> Kind:
    """Return the trigger, of the kind and without networks: UsageError for one that has been trained already."""
    found = of_kind(kind, trigger)
    if found.fitted:
        raise UsageError(f"trigger {trigger.name}: the networks of {kind.kind} are trained with the classifier, and "
                         "this one has its own already; name the kind in place of the file")  # fmt: skip
    return found


def share(ratio: float, count: int) -> int:
    """Return how many of a step's `count` images a `ratio` takes: the floor, or one with that chance where it is 0."""
    # 0.29 · 100 is 28.999999999999996
    exact = ratio * count + 1e-9
    # drawn on the CPU: nothing waits for the device
    return math.floor(exact) if exact >= 1 else int(float(torch.rand(())) < ratio * count)


def taken(rows: range, count: int) -> int:
    """Return how many of a part's images are among the first `count` of the step; they are the part's first.

    `rows` are the part's numbers in the step, as `Batch.rows`: all parts together take `count`, however many they are.
    """
    return len(range(rows.start, min(count, rows.stop), rows.step))
