"""The reports: everything measured and everything needed to repeat it, as dataclasses and as JSON files."""

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

from hfdetox.data.info import DatasetInfo
from hfdetox.documents import read_json
from hfdetox.errors import UsageError, located
from hfdetox.evaluation.results import AccuracyLoss, Measurement, Rate, Rating
from hfdetox.evaluation.verdict import Verdict, percent, run_verdict, trigger_verdicts
from hfdetox.evidence.results import Evidence
from hfdetox.files import ATTACK_REPORT_NAME as ATTACK_REPORT_NAME
from hfdetox.files import REPORT_NAME
from hfdetox.models.info import ModelInfo
from hfdetox.reporting.taxonomies import listed
from hfdetox.values import read_fields

SCHEMA_VERSION = 4
# where an attack starts that draws its own weights
SCRATCH: Final = "scratch"
# a text has no line breaks of its own in JSON
_NUMBERS = re.compile(r"\[\n(?: +(?:null|[-+.\deE]+),?\n)+ +\]")


@dataclass(frozen=True)
class DefenseInfo:
    """What was done to the model.

    Attributes:
        parameters: every setting by the name that `--set` knows it under.
        layers: modules that the method treats apart from the rest.
        epochs: of training; a pass that looks at the images is none.
        steps: of the optimizer.
        seconds: of the method, measuring left out.
        images_per_second: of the training alone.
        precision: the one that really ran.
        peak_memory: bytes, the most that one process held: on the GPU during the method, else the resident memory of
            the process from its start to the method's end; None where the system does not tell.
        choices: what the method chose itself and why, a sentence each.
        description: what a card says was done.
        trigger_given: whether the settings hand a known trigger to the method.
    """

    name: str
    preset: str | None
    parameters: dict[str, Any]
    layers: list[str]
    epochs: int
    steps: int
    seconds: float
    images_per_second: float
    precision: str
    devices: list[str]
    peak_memory: int | None = None
    choices: list[str] = field(default_factory=list)
    description: str = ""
    trigger_given: bool = False


@dataclass(frozen=True)
class OutputInfo:
    """What was written and where it went.

    Attributes:
        weights_sha256: of the weight file that was written.
        pushed_to: the repository.
        commit: the commit of the push.
    """

    weights_sha256: str | None = None
    pushed_to: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class EnvironmentInfo:
    """What the run ran on: versions, and what repeats it.

    Attributes:
        command: what repeats the run; empty where objects took part, which no command can name.
        threads: that torch computed with on the CPU; None in reports of earlier versions.
    """

    python: str
    torch: str
    accelerate: str
    transformers: str
    timm: str
    datasets: str
    device: str
    seed: int
    command: str
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunReport(ABC):
    """What both reports hold, and how they become a JSON file and back.

    Attributes:
        hfdetox_version: of the program that wrote it.
        before: the model as it came; None for one that is trained from scratch.
        after: None until it is known: the card is built and checked before the training starts.
        history: one entry an epoch or pass of the method, with its losses.
        uncorrected: of a model with a correction, which hfdetox alone applies, what timm or transformers gives; `after`
            is with it.
        warnings: lines that a person should know of.
        schema_version: rises when a change would break a reader.
    """

    NAME: ClassVar[str]

    hfdetox_version: str
    model: ModelInfo
    dataset: DatasetInfo
    before: Measurement | None
    after: Measurement | None
    history: list[dict[str, Any]]
    output: OutputInfo
    environment: EnvironmentInfo
    uncorrected: Measurement | None = None
    warnings: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types, `schema_version` and `hfdetox_version` first, the history late."""
        plain = dataclasses.asdict(self)
        late = {name: plain.pop(name) for name in ("history", "output", "environment", "warnings")}
        return {"schema_version": plain.pop("schema_version"), **plain, **late}

    def save(self, folder: Path) -> Path:
        """Write the report into `folder` under its name and return its path."""
        path = folder / self.NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    def to_json(self) -> str:
        """Return the text of the file; a list of numbers, such as a class's accuracy each, is one line."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return _NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"

    @property
    @abstractmethod
    def triggers(self) -> Mapping[str, Any]:
        """The triggers by name, each with `spec`, `mode` and `target`."""

    @property
    def published(self) -> Measurement | None:
        """What anybody finds who loads the model with its own library: the numbers for the Hub's metadata."""
        return self.uncorrected or self.after

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """Rebuild a report from `to_dict`'s result, or from that of an earlier version.

        Raises:
            UsageError: the report of a newer hfdetox, or none; unknown, missing or wrong fields.
        """
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise UsageError(f"report has schema version {version!r}; this hfdetox reads 1 to {SCHEMA_VERSION}, "
                             "a newer one may read more")  # fmt: skip
        report = cast(Self, read_fields("", cls, {**cls._upgraded(plain), "schema_version": SCHEMA_VERSION}))
        try:
            report.to_json()
        except ValueError as error:
            # in a field of any kind, such as a setting
            raise UsageError("a number in it is not finite") from error
        return report

    @classmethod
    def _upgraded(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return a report of any known version with this version's fields; new ones have defaults."""
        return plain

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the report from `folder`; raises UsageError when it is missing or not a report."""
        path = folder / cls.NAME
        if not path.exists():
            raise UsageError(f"{folder} has no {cls.NAME}; it was not written by hfdetox")
        plain = read_json(path, dict[str, Any], "a hfdetox report")
        with located(f"{path} is not a hfdetox report"):
            return cls.from_dict(plain)


@dataclass(frozen=True, kw_only=True)
class Report(RunReport):
    """The report of a cleaning run.

    Attributes:
        defense_effectiveness_rating: of each trigger by its name, and `mean`; None without triggers, and until it is
            known.
        accuracy_loss: what the run cost, and whether that is too much; None until it is known, and in reports of schema
            versions 1 and 2.
        evidence: what is known without the attacker's trigger; None of a run without a scan, and in reports of schema
            versions 1 to 3.
        taxonomies: what such attacks and their remedy are called by others, the ids by taxonomy and release.
    """

    NAME: ClassVar[str] = REPORT_NAME

    defense: DefenseInfo
    defense_effectiveness_rating: dict[str, Rating] | None
    accuracy_loss: AccuracyLoss | None = None
    evidence: Evidence | None = None
    taxonomies: dict[str, list[str]] = field(default_factory=listed)

    @property
    def rejected(self) -> AccuracyLoss | None:
        """The loss of a run that cost more accuracy than it may (published on purpose only), else None."""
        return self.accuracy_loss if self.accuracy_loss and self.accuracy_loss.verdict == Verdict.REJECTED else None

    @property
    def verdict(self) -> Verdict | None:
        """The worst of what may be said of its triggers; None where none was measured."""
        return run_verdict(self.before, self.after, self.accuracy_loss)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What may be said of each trigger, by its name; empty before the first measurement."""
        return trigger_verdicts(self.before, self.after, self.accuracy_loss)

    @property
    def triggers(self) -> Mapping[str, Any]:
        """Those that were measured before: by name, what was found."""
        return self.before.triggers if self.before else {}


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
        settings: the poisoner's own.
        psnr: mean over the changed evaluation images, in dB; None where nothing changed or images are floats.
        max_change: largest change of any value, in grey levels.
        changed: share of the images in which any value changed.
        cross_accuracy: share of evaluation images still classified correctly under what the poisoner teaches the model
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
    def triggers(self) -> Mapping[str, Any]:
        """Those that were implanted, by name."""
        return self.attack.triggers

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


def describe_target(target: int | str, labels: Sequence[str] | None = None) -> str:
    """Return a target in words: its label (its index without `labels`), or what `all-to-all` means."""
    if isinstance(target, str):
        return "every class to the next one"
    return labels[target] if labels else str(target)
