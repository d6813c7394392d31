"""What the gate found, as plain data: the verdict, its reasons, and all that reports are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from hfdetox._version import __version__
from hfdetox.evaluation.results import Rate, TriggerResult
from hfdetox.evidence.results import Reconstructed, ScanResult
from hfdetox.models.info import ModelInfo


class GateVerdict(StrEnum):
    """What the gate says of a model; none says that it has no backdoor."""

    PASS = "pass"
    CLEANED = "pass after cleaning"
    REJECT = "reject"
    UNKNOWN = "unknown"


STATUSES: Final = {GateVerdict.PASS: 0, GateVerdict.CLEANED: 10, GateVerdict.REJECT: 20, GateVerdict.UNKNOWN: 30}


class Rule(StrEnum):
    """What a reason is about."""

    SUSPICIOUS = "suspicious-class"
    ALTERED = "not-as-published"
    DELIBERATE = "deliberately-backdoored"
    LEFT = "trigger-left"
    ACCURACY = "accuracy"
    UNDECIDED = "undecided"
    NO_EVIDENCE = "no-evidence-found"
    CLEANED = "cleaned"


# what each rule says, in a sentence
RULES: Final = {
    Rule.SUSPICIOUS: "A class stands out as the target of a backdoor would.",
    Rule.ALTERED: "The repository is not what hfdetox published, or its card states other numbers than the model has.",
    Rule.DELIBERATE: "The model says of itself that it was backdoored on purpose.",
    Rule.LEFT: "A trigger still works after cleaning, or was not shown to have stopped.",
    Rule.ACCURACY: "The model is less accurate than the policy asks.",
    Rule.UNDECIDED: "What was found does not allow a decision.",
    Rule.NO_EVIDENCE: "No evidence of a backdoor was found, which does not show that there is none.",
    Rule.CLEANED: "The model was cleaned, and what was found before is not found any more.",
}


@dataclass(frozen=True)
class Reason:
    """One reason of a verdict.

    Attributes:
        rule: what it is about.
        verdict: what it leads to alone.
        text: in words.
    """

    rule: Rule
    verdict: GateVerdict
    text: str


@dataclass(frozen=True)
class GatedModel:
    """The model at the gate; of what could not be pulled only the id is known.

    Attributes:
        id: as it was named: a Hub id, or the last part of a folder's path.
        revision: the commit on the Hub; None for a folder.
        weights_sha256: of the weight file; of several files that of their sorted names and hashes.
        architecture: as its configuration names it.
    """

    id: str
    revision: str | None = None
    weights_sha256: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class GateResult:
    """What the gate found.

    Attributes:
        verdict: `pass`, `pass after cleaning`, `reject` or `unknown`.
        reasons: what led to it, the decisive ones first.
        model: the model at the gate.
        dataset: the images, as they were named.
        dataset_revision: their commit on the Hub, where one was named.
        policy: what had to hold, every key.
        scan: of the model as it came, or of a model that hfdetox had cleaned; None where it was not scanned.
        rescan: of the model that `--clean` made.
        base: the model as it came, of a model that hfdetox cleaned.
        accuracy: on the evaluation images, else on the scanned ones.
        triggers: what each known trigger, of a cleaned model, and each reconstructed one does to the model.
        reconstructed: the latter, before and after cleaning.
        verified: what `hfdetox verify` said of a repository that hfdetox cleaned; None of others.
        output: where the model lies that `--clean` made.
        hfdetox_version: of the program.
    """

    verdict: GateVerdict
    reasons: list[Reason]
    model: GatedModel
    dataset: str
    dataset_revision: str | None
    policy: dict[str, Any]
    scan: ScanResult | None = None
    rescan: ScanResult | None = None
    base: ModelInfo | None = None
    accuracy: Rate | None = None
    triggers: dict[str, TriggerResult] = field(default_factory=dict)
    reconstructed: dict[str, Reconstructed] = field(default_factory=dict)
    verified: str | None = None
    output: str | None = None
    hfdetox_version: str = __version__

    @property
    def status(self) -> int:
        """The exit status: 0, 10, 20 or 30."""
        return STATUSES[self.verdict]

    @property
    def name(self) -> str:
        """The model with its commit."""
        return f"{self.model.id}@{self.model.revision}" if self.model.revision else self.model.id

    def to_dict(self) -> dict[str, Any]:
        """Return the whole as plain JSON types."""
        return {"status": self.status, **asdict(self)}


def decide(reasons: list[Reason]) -> GateVerdict:
    """Return the verdict of all reasons together: the worst of them, and `unknown` where there is none."""
    found = {reason.verdict for reason in reasons}
    for verdict in (GateVerdict.REJECT, GateVerdict.UNKNOWN, GateVerdict.CLEANED, GateVerdict.PASS):
        if verdict in found:
            return verdict
    return GateVerdict.UNKNOWN
