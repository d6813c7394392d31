"""What is measured, as plain data: rates with their intervals, and what one state of a model came to."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """A share of images; every number is a fraction in [0, 1].

    Attributes:
        value: successes / samples.
        successes: images that count, such as those classified correctly.
        samples: images in all.
        interval: low and high end of the exact 95 % (Clopper-Pearson) interval.
    """

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
class Difference:
    """A difference of two shares of the same images, as a fraction in [-1, 1].

    Attributes:
        value: the first share less the second.
        interval: low and high end of the paired 95 % (Tango) interval.
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class AccuracyLoss(Difference):
    """What a run cost: the accuracy before less that after, on the same images.

    Attributes:
        allowed: the most that it may cost, a fraction (`--max-accuracy-loss`).
        verdict: `accepted`, where the interval's high end is within that; `rejected: accuracy`, where its low end is
            beyond; else `inconclusive`.
    """

    allowed: float
    verdict: str


@dataclass(frozen=True)
class LabelRate:
    """A rate of one class.

    Attributes:
        label: its index in the model's label order.
        name: its label.
    """

    label: int
    name: str
    rate: Rate


@dataclass(frozen=True)
class Destination(LabelRate):
    """The class that most triggered images go to, counted for each class over the images of all others.

    Attributes:
        rate: share of the triggered images, of other classes than this one, that are classified as this one.
        without: share of those same images that are classified as this one without the trigger.
        excess: the first less the second: what the trigger moves there.
    """

    without: Rate
    excess: Difference


@dataclass(frozen=True)
class TriggerResult:
    """One trigger's effect on one state of the model.

    Attributes:
        kind: the trigger's family.
        spec: what `--trigger` makes it of: a specification, or a file.
        mode: `native` (before any resize) or `input` (on what the model sees).
        file_sha256: of the trigger file.
        target: a label index, or `all-to-all`.
        attack_success_rate: share of triggered images of other classes that are classified as the target.
        robust_accuracy: share of those same images that are classified as their true class.
        accuracy_without: share of those same images that are classified as their true class without the trigger.
        destination: the class that most of them go to. It and the above are None in reports of schema versions 1 and 2.
    """

    kind: str
    spec: str
    mode: str
    file_sha256: str | None
    target: int | str
    attack_success_rate: Rate
    robust_accuracy: Rate
    accuracy_without: Rate | None = None
    destination: Destination | None = None


@dataclass(frozen=True)
class ClassAccuracies:
    """How evenly the accuracy is spread over the classes that the evaluation images have.

    Attributes:
        accuracies: of each label's images in the model's label order, None for a label without images.
        worst_label: index of the label with the lowest.
        worst: its accuracy.
        spread: standard deviation of the accuracies over the classes, as a fraction.
        lowest: the ten classes with the lowest accuracies (of equal ones that with more images), the worst first.
    """

    accuracies: list[float | None]
    worst_label: int
    worst: Rate
    spread: float
    lowest: list[LabelRate] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """One state of the model, measured on the evaluation images.

    Attributes:
        accuracy: share of the clean images that are classified correctly.
        loss: mean cross-entropy in nats.
        triggers: what each known trigger does, by its name.
        classes: how evenly the accuracy is spread; None where that was not measured.
    """

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
