"""What is measured, as plain data: rates with their intervals, and what one state of a model came to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """A share of images, with its exact 95 % (Clopper-Pearson) interval; every number is a fraction in [0, 1]."""

    value: float
    successes: int
    samples: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Rating:
    """A defense effectiveness rating in [0, 1] (0.5: nothing happened) with its 95 % paired-bootstrap interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class TriggerResult:
    """One trigger's effect on one state of the model; `target` is a label index or `all-to-all`."""

    kind: str
    spec: str
    mode: str
    file_sha256: str | None
    target: int | str
    attack_success_rate: Rate
    robust_accuracy: Rate


@dataclass(frozen=True)
class ClassAccuracies:
    """How evenly the accuracy is spread over the classes that the evaluation images have.

    Attributes:
        accuracies: of each label's images in the model's label order, None for a label without images.
        worst_label: index of the label with the lowest.
        worst: its accuracy.
        spread: standard deviation of the accuracies over the classes, as a fraction.
    """

    accuracies: list[float | None]
    worst_label: int
    worst: Rate
    spread: float


@dataclass(frozen=True)
class Measurement:
    """One state of the model, measured on the evaluation images; `loss` is the mean cross-entropy in nats."""

    accuracy: Rate
    loss: float
    triggers: dict[str, TriggerResult] = field(default_factory=dict)
    classes: ClassAccuracies | None = None


@dataclass(frozen=True)
class Visibility:
    """How visible a trigger is in the images it was put on, as the model sees them.

    Attributes:
        psnr: mean peak signal-to-noise ratio in dB over the images that changed; None where none did.
        max_change: largest change of any value, in grey levels (0 to 255).
        changed: share of the images in which any value changed, in [0, 1].
    """

    psnr: float | None
    max_change: int
    changed: float


@dataclass(frozen=True)
class EvalResult(Measurement):
    """What `hfdetox evaluate` finds: also how visible each trigger is, by name; nothing where pixels are floats."""

    visibility: dict[str, Visibility] = field(default_factory=dict)
