"""What a scan finds, as plain data."""

from dataclasses import dataclass, field
from enum import StrEnum

from hfdetox.data.info import DatasetInfo
from hfdetox.evaluation.results import LabelRate, Measurement, Rate, TriggerResult
from hfdetox.evaluation.verdict import percent
from hfdetox.models.info import ModelInfo


class Finding(StrEnum):
    """What a score, or all of them together, allows to be said; nothing says that a model has no backdoor."""

    SUSPICIOUS = "suspicious"
    NO_EVIDENCE = "no evidence found"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Threshold:
    """From which value of a score's statistic on a model is suspicious, and how often that is wrong.

    Attributes:
        value: the threshold.
        measured: whether it was fixed on never-backdoored models; else it is a guess, and nothing is known of errors.
        models: how many of these there were.
        rule: how it was fixed on them.
        false_alarms: share of other never-backdoored models that are above it; None where not measured.
        found: share of backdoored models that are above it.
    """

    value: float
    measured: bool = False
    models: int = 0
    rule: str = ""
    false_alarms: Rate | None = None
    found: Rate | None = None

    @property
    def errors(self) -> str:
        """How often it was wrong, such as "false alarms 1 of 24 (0.1–21.1 %), found 18 of 20 (68.3–98.8 %)"."""
        rates = {"false alarms": self.false_alarms, "found": self.found} if self.measured else {}
        said = [f"{what} {one.successes} of {one.samples} ({100 * one.interval[0]:.1f}–{100 * one.interval[1]:.1f} %)"
                for what, one in rates.items() if one is not None]  # fmt: skip
        return ", ".join(said) or "error rates not measured"


@dataclass(frozen=True)
class ScoreResult:
    """What one score found on one state of a model.

    Attributes:
        values: the score of each class in the model's label order, None for a class without one; None for a score
            that looks at the model as a whole.
        statistic: one number, the higher the more suspicious; None where it could not be measured.
        accused: index of the class that it names; None where it names none.
        seconds: that it took.
        passes: images that went through the network; one whose gradient is taken counts as one more.
        note: what a person should know of it, such as why there is no statistic.
        threshold: what the statistic is held against; None where there is none.
        finding: `suspicious`, `no evidence found` or `unknown`.
        label: name of the class that it names.
    """

    values: list[float | None] | None
    statistic: float | None
    accused: int | None
    seconds: float = 0.0
    passes: int = 0
    note: str = ""
    threshold: Threshold | None = None
    finding: str = str(Finding.UNKNOWN)
    label: str | None = None

    @property
    def errors(self) -> str:
        """How often its threshold is wrong, or why it found nothing, with what a person should know of it."""
        if self.statistic is None or self.threshold is None:
            return self.note or "error rates not measured"
        return f"{self.threshold.errors}; {self.note}" if self.note else self.threshold.errors


@dataclass(frozen=True)
class ScanResult:
    """What a scan of one state of a model found.

    Attributes:
        finding: `suspicious`, `no evidence found` or `unknown`.
        accused: index of the class that is suspected to be a backdoor's target; None where none is.
        label: its name.
        why: the reason in words.
        scores: by name, what each found.
        samples: how many clean images the scores looked at.
        accuracy: on these; None without images.
        passes: images that went through the network; one whose gradient is taken counts as one more.
        seconds: that it took.
        combined: how often the scores together call a model suspicious that is not, or find one that is.
    """

    finding: str
    accused: int | None
    label: str | None
    why: str
    scores: dict[str, ScoreResult]
    samples: int
    accuracy: Rate | None
    passes: int
    seconds: float
    combined: Threshold | None = None


@dataclass(frozen=True)
class Reconstructed:
    """A trigger that was reconstructed from the model as it came, measured on the evaluation images.

    Attributes:
        score: the score that made it, `patch` or `blend`.
        label: index of the class that it was made for.
        class_name: the class's name.
        before: what it does to the model as it came.
        after: what it does to the cleaned model; None where nothing was cleaned.
    """

    score: str
    label: int
    class_name: str
    before: TriggerResult
    after: TriggerResult | None = None

    @property
    def title(self) -> str:
        """What it is, such as "reconstructed patch for 'cat'"."""
        return f"reconstructed {self.score} for {self.class_name!r}"


@dataclass(frozen=True)
class Residual:
    """What three tests of a cleaned model say of one trigger (`hfdetox.evidence.residual`).

    Attributes:
        retuned: attack success before the re-tuning with triggered images and after each epoch of it.
        plain: the same with clean images alone.
        path: attack success at t = 0 (the model as it came), 0.1, … 1 (cleaned) on the straight path.
        path_accuracy: accuracy on clean images there.
        drift: accuracy on triggered images of all classes, before and after cleaning.
        triggered: images with the trigger in the re-tuning.
        clean: images in the re-tuning without it.
    """

    retuned: list[Rate]
    plain: list[Rate]
    path: list[Rate]
    path_accuracy: list[Rate]
    drift: list[Rate]
    triggered: int
    clean: int

    @property
    def reaches(self) -> float:
        """The last t of the path at which the attack still has half of the success that it had."""
        half = self.path[0].value / 2
        last = max((place for place, found in enumerate(self.path) if found.value >= half), default=0)
        return last / (len(self.path) - 1)


@dataclass(frozen=True)
class ImageGrade:
    """How much the clean images can tell, before anything is trained.

    Attributes:
        samples: how many there are.
        duplicates: how many have the same pixels as an earlier one.
        smallest: of the model's classes, the fewest images that one has.
        largest: the most.
        accuracy: of the model as it came on them.
        bound: the lowest upper end of a 95 % interval that as many images without one failure give.
        far: share of the images whose features lie further from those of their class that the model is sure of than
            nearly all of these do; None where that cannot be told. Of images of the model's own kind it is 5 to 62 %,
            the more the less sure the model is, so it is compared with nothing.
        notes: what a person should know, a sentence each.
        sure: share of the images that the model is right and sure of; None where that is not known.
    """

    samples: int
    duplicates: int
    smallest: int
    largest: int
    accuracy: Rate | None
    bound: float
    far: float | None = None
    notes: list[str] = field(default_factory=list)
    sure: float | None = None

    @property
    def described(self) -> str:
        """How much they can tell, such as "500 clean images: no failure in as many would bound a rate at 0.7 % …"."""
        bound = f"{100 * self.bound:.2g} %"
        parts = [
            f"{self.samples:,} clean images: no failure in as many would bound a rate at {bound} at best",
            f"{self.duplicates:,} exact duplicates",
            f"{self.smallest:,} to {self.largest:,} images a class",
        ]
        if self.sure is not None:
            parts.append(f"the model is right and sure of {percent(self.sure)}")
        if self.far is not None:
            parts[-1] += f", and {percent(self.far)} lie further from their class in its features than 99 % of those do"
        return "; ".join(parts)


@dataclass(frozen=True)
class Moved(LabelRate):
    """A class whose images the cleaned model answers otherwise than the model did as it came.

    Attributes:
        rate: share of the class's evaluation images that are answered otherwise.
        to: index of the class that most of these are given now.
        to_name: its name.
    """

    to: int
    to_name: str


@dataclass(frozen=True)
class Agreement:
    """How far the cleaned model answers as the model did as it came, right or wrong.

    Attributes:
        rate: share of the evaluation images that both give the same class.
        moved: the classes with the most images that are answered otherwise, the first has the largest share.
    """

    rate: Rate
    moved: list[Moved] = field(default_factory=list)


@dataclass(frozen=True)
class ClassShift:
    """How far a class's latent shift is from those of the other classes, before and after cleaning.

    Attributes:
        label: index of the class.
        name: its name.
        before: its robust z on the model as it came, far below the others for a backdoor's target; None without one.
        after: the same on the cleaned model, far above the others for a class that was pushed away.
    """

    label: int
    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Evidence:
    """What is known of the model without the attacker's trigger.

    Attributes:
        before: the scan of the model as it came.
        after: the scan of the cleaned model.
        reconstructed: triggers reconstructed on the model as it came, by their names.
        images: how much the clean images can tell.
        agreement: of the cleaned model with the one that came.
        residual: by trigger, known or reconstructed, whether it is gone or asleep; empty where not asked for.
        shifts: the latent shift of every class, of many classes those that stand out; empty where not measured twice.
    """

    before: ScanResult | None = None
    after: ScanResult | None = None
    reconstructed: dict[str, Reconstructed] = field(default_factory=dict)
    images: ImageGrade | None = None
    agreement: Agreement | None = None
    residual: dict[str, Residual] = field(default_factory=dict)
    shifts: list[ClassShift] = field(default_factory=list)

    @property
    def scans(self) -> dict[str, ScanResult]:
        """The scans that there are, by the state of the model, `before` or `after`."""
        return {state: scan for state, scan in (("before", self.before), ("after", self.after)) if scan is not None}

    @property
    def scar(self) -> ScoreResult | None:
        """The score `scar` where it accuses a class of having been a backdoor's target once, else None."""
        found = self.after.scores.get("scar") if self.after is not None else None
        return found if found is not None and found.finding == Finding.SUSPICIOUS else None

    @property
    def awakened(self) -> Residual | None:
        """What the tests say of the trigger whose success the re-tuning raised most; None where none was tested."""
        return max(self.residual.values(), key=lambda one: one.retuned[-1].value - one.retuned[0].value, default=None)


@dataclass(frozen=True)
class ScanReport:
    """What `hfdetox scan` finds.

    Attributes:
        model: which model.
        dataset: which images; None without any.
        when: `after` for a model that was cleaned, whose scores have thresholds of their own; else `before`.
        scan: what the scores found, and what they allow to be said.
        measurement: of the model on the evaluation images, known triggers included; None without images.
        reconstructed: triggers reconstructed on the model, measured on the evaluation images, by their names.
        images: how much the clean images can tell; None without images.
        warnings: lines that a person should know of.
    """

    model: ModelInfo
    dataset: DatasetInfo | None
    when: str
    scan: ScanResult
    measurement: Measurement | None
    reconstructed: dict[str, Reconstructed]
    images: ImageGrade | None
    warnings: list[str]
