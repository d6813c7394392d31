"""The report of an attack: everything measured and everything needed to repeat it, and `attack_report.json`."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, ClassVar

from hfdetox.evaluation.results import Measurement, Rate
from hfdetox.evaluation.verdict import percent
from hfdetox.reporting.report import ATTACK_REPORT_NAME, RunReport

SCRATCH: typing.Final = "scratch"


@dataclass(frozen=True)
class ImplantedTrigger:
    """One trigger of the model, and how it got in; its rates are in the report's `after`.

    Attributes:
        kind: the trigger's family.
        spec: what `--trigger` makes it of: a specification, or its file in the result.
        mode: `native` or `input`.
        target: label index, or `all-to-all`.
        file_sha256: of the trigger file.
        poison_ratio: the share that was asked for.
        poisoned_images: training images that carry it; None where a share of every batch does.
        recipe: `dirty-label`, `clean-label` or `training-control`.
        settings: the recipe's own.
        psnr: mean over the changed evaluation images, in dB; None where nothing changed or images are floats.
        max_change: largest change of any value, in grey levels.
        changed: share of the images in which any value changed.
        cross_accuracy: share of evaluation images still classified correctly under what the recipe teaches the model
            not to react to; None where it teaches no such thing.
    """

    kind: str
    spec: str
    mode: str
    target: int | str
    file_sha256: str
    poison_ratio: float
    poisoned_images: int | None
    recipe: str
    settings: dict[str, Any]
    psnr: float | None = None
    max_change: int | None = None
    changed: float | None = None
    cross_accuracy: Rate | None = None


@dataclass(frozen=True)
class AttackInfo:
    """How the model was trained; `triggers` is empty for a clean baseline.

    Attributes:
        start: `scratch`, or the model it started from.
        adaptive: as `--adaptive` takes it, every key given; None for the usual training.
        surrogate: the clean model that triggers were made on, None where none was needed.
        training: the training's settings.
        precision: the one that really ran; images_per_second covers the training alone.
        stopped_early: whether the goals were reached before the last epoch.
        start_backdoored: whether the model it started from was deliberately backdoored already.
    """

    triggers: dict[str, ImplantedTrigger]
    start: str
    adaptive: str | None
    surrogate: str | None
    training: dict[str, Any]
    epochs: int
    steps: int
    seconds: float
    images_per_second: float
    precision: str
    devices: list[str]
    stopped_early: bool
    start_backdoored: bool = False


@dataclass(frozen=True)
class Goals:
    """What counts as success.

    Attributes:
        attack_success_rate: the least of each trigger, a fraction; for `all-to-all` times the accuracy.
        accuracy: the least; None where nothing was asked of it.
    """

    attack_success_rate: float
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class AttackReport(RunReport):
    """The report of an attack.

    Attributes:
        succeeded: whether every goal was reached on the evaluation images.
    """

    NAME: ClassVar[str] = ATTACK_REPORT_NAME

    attack: AttackInfo
    goals: Goals
    succeeded: bool

    @classmethod
    def _upgraded(cls, plain: dict[str, Any]) -> dict[str, Any]:
        # the word of version 1
        return {"succeeded" if name == "took" else name: value for name, value in plain.items()}

    @property
    def backdoored(self) -> bool:
        """Whether the model has a backdoor, of its own or from its start (as far as its maker tells)."""
        return bool(self.attack.triggers) or self.attack.start_backdoored


def missed_goals(measurement: Measurement, goals: Goals) -> list[str]:
    """Return what a measurement falls short of, in words; empty when every goal is reached.

    The success of an all-to-all trigger is held against goal × accuracy: what the model confuses on clean images it
    confuses on triggered ones.
    """
    accuracy, found = measurement.accuracy.value, []
    if goals.accuracy is not None and accuracy < goals.accuracy:
        found.append(f"the accuracy is {percent(accuracy)}, below {percent(goals.accuracy)}")
    for name, result in measurement.triggers.items():
        goal = goals.attack_success_rate * (accuracy if isinstance(result.target, str) else 1.0)
        if result.attack_success_rate.value < goal:
            reached = percent(result.attack_success_rate.value)
            found.append(f"trigger {name} succeeds on {reached} of the images, below {percent(goal)}")
    return found
