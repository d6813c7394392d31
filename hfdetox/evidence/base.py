"""What a score is: a registered class that measures one thing on a suspect, without the attacker's trigger."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from hfdetox.errors import UsageError
from hfdetox.evidence.results import ScoreResult
from hfdetox.models.network import Network
from hfdetox.plugins import Registry
from hfdetox.training.shift import HeadInputs, bare_heads, head_inputs, robust_z
from hfdetox.triggers.base import Trigger

# among fewer classes none can be called an outlier
MIN_CLASSES = 4


@dataclass
class Suspect:
    """One state of a model, and what the scores may look at.

    Attributes:
        network: in eval mode and float32, on the accelerator's device.
        images: clean images as the model sees them (N×C×H×W: uint8, or a callable's own floats), anywhere; None
            without any.
        labels: their true classes (N, int64), on the CPU.
        classes: how many the model tells apart.
        limit: image passes that the score at hand may take; None for any number.
    """

    network: Network
    images: Tensor | None
    labels: Tensor | None
    classes: int
    accelerator: Accelerator
    seed: int = 0
    limit: int | None = None
    progress: bool = False
    # one pass that two scores share is taken once
    _error: UsageError | None = field(default=None, init=False, repr=False)

    @cached_property
    def heads(self) -> list[HeadInputs]:
        """What the layers that give the logits are given; of no images (0×D) where there are none.

        Raises:
            UsageError: the model has no such layer, or its answers are not those of one.
        """
        if self._error is not None:
            raise self._error
        try:
            if self.images is None or self.labels is None or not len(self.images):
                return bare_heads(self.network)
            return head_inputs(self.network, self.images, self.labels)
        except UsageError as error:
            self._error = error
            raise

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator of the CPU, seeded by the run's seed."""
        return torch.Generator().manual_seed(self.seed + offset)

    def chosen(self, count: int, offset: int = 0) -> Tensor:
        """Return at most so many of the images, drawn without replacement, as float32 on the network's device."""
        assert self.images is not None
        places = torch.randperm(len(self.images), generator=self.generator(offset))[:count]
        return self.images[places.to(self.images.device)].to(self.accelerator.device).float()

    @property
    def has_grey_levels(self) -> bool:
        """Whether images are 0 to 255, so that what is searched on them is an image too."""
        return self.network.normalizes


@dataclass(frozen=True)
class Score(ABC):
    """What a score is to the rest of the program.

    Attributes:
        name: of the score.
        summary: one line.
        paper: where it was published.
        cost: in words.
        when: whether it says anything about the model before cleaning, after it, or at both times.
        needs_images: whether it needs clean images.
        thorough: whether a scan leaves it out unless it is asked to be thorough.
        names_class: whether it accuses a class.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    when: ClassVar[Literal["before", "after", "both"]] = "both"
    needs_images: ClassVar[bool] = True
    thorough: ClassVar[bool] = False
    names_class: ClassVar[bool] = True

    @abstractmethod
    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        """Measure the score.

        Args:
            accused: label indices that a score which looks at one class after the other may restrict itself to; None
                looks at all.

        Raises:
            UsageError: it cannot be measured on this model, with these images.
        """

    def run(self, suspect: Suspect, accused: Sequence[int] | None = None) -> tuple[ScoreResult, list[Trigger]]:
        """Return what `measure` does with the seconds it took, and the triggers that were reconstructed.

        Where it cannot be measured, the note says why.
        """
        begin, triggers = time.perf_counter(), list[Trigger]()
        if self.needs_images and (suspect.images is None or not len(suspect.images)):
            return unmeasured("needs clean images"), triggers
        try:
            found, triggers = self._found(suspect, accused)
        except UsageError as error:
            found = unmeasured(str(error))
        return replace(found, seconds=time.perf_counter() - begin), triggers

    def _found(self, suspect: Suspect, accused: Sequence[int] | None) -> tuple[ScoreResult, list[Trigger]]:
        return self.measure(suspect, accused), []


class Reconstruction(Score):
    """A score that searches a trigger for each class it looks at, and gives these too."""

    @abstractmethod
    def reconstruct(self, suspect: Suspect, accused: Sequence[int] | None = None) -> tuple[ScoreResult, list[Trigger]]:
        """Return the score, and a `mask` trigger named after score and label (`patch-3`) for each class looked at."""

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        return self.reconstruct(suspect, accused)[0]

    def _found(self, suspect: Suspect, accused: Sequence[int] | None) -> tuple[ScoreResult, list[Trigger]]:
        return self.reconstruct(suspect, accused)


SCORES: Registry[Score] = Registry("evidence", Score, "name")


def unmeasured(note: str) -> ScoreResult:
    """Return the result of a score that could not be measured, and why."""
    return ScoreResult(None, None, None, note=note)


def outlier(values: Tensor, *, low: bool, passes: int = 0, note: str = "") -> ScoreResult:
    """Return a score of one value a class (K) whose statistic is how far the lowest, or the highest, is from the rest.

    That is the robust z of `robust_z`, turned so that higher is more suspicious.

    Raises:
        UsageError: too few classes.
    """
    if len(values) < MIN_CLASSES:
        raise UsageError(f"{len(values)} classes are too few to tell one that stands out")
    away = -robust_z(values) if low else robust_z(values)
    # a class that no shift leads to is none that stands out
    away = torch.where(away.isfinite(), away, -torch.inf)
    place = int(away.argmax())
    if not bool(away[place].isfinite()):
        raise UsageError("no class has a finite value")
    listed = [float(value) if bool(value.isfinite()) else None for value in values]
    return ScoreResult(listed, float(away[place]), place, passes=passes, note=note)
