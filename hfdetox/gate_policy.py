"""The policy of the gate: what has to hold before a model may pass, read from YAML and checked."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from hfdetox.documents import parse_yaml, read_yaml
from hfdetox.errors import located
from hfdetox.values import Interval, check_fields, read_fields


@dataclass(frozen=True)
class ScanPolicy:
    """What a scan has to show.

    Attributes:
        suspicious: what an accused class leads to: `reject` or `unknown`.
        least_images: clean images below which nothing can be said.
        measured_rates: whether a pass needs scores whose error rates were measured.
    """

    suspicious: Literal["reject", "unknown"]
    least_images: Annotated[int, Interval("[1, inf)")]
    measured_rates: bool


@dataclass(frozen=True)
class AccuracyPolicy:
    """What accuracy a model has to have.

    Attributes:
        least: lower end of the interval on the clean images, a fraction; None for any.
        most_lost: points that cleaning may cost.
    """

    least: Annotated[float, Interval("[0, 1]")] | None
    most_lost: Annotated[float, Interval("[0, 100]")]


@dataclass(frozen=True)
class CleanedPolicy:
    """What has to hold of a model that hfdetox cleaned.

    Attributes:
        verify: whether every hash and rate has to be found again.
        signed: whether it has to carry a signature by the key that is given.
    """

    verify: bool
    signed: bool


@dataclass(frozen=True)
class CleanPolicy:
    """How `--clean` cleans; `defense` as of `--defense`."""

    defense: str


@dataclass(frozen=True)
class Policy:
    """What has to hold before a model may pass."""

    scan: ScanPolicy
    accuracy: AccuracyPolicy
    cleaned: CleanedPolicy
    clean: CleanPolicy


def load_policy(file: str | Path | None = None) -> Policy:
    """Return the default policy, or that of a YAML file over it.

    Raises:
        UsageError: the file cannot be read, has unknown keys or wrong values; the line names file and key.
    """
    text = resources.files("hfdetox").joinpath("gate_policy.yaml").read_text(encoding="utf-8")
    merged: dict[str, Any] = parse_yaml(text)
    given: dict[str, Any] = {}
    if file is not None:
        given = read_yaml(Path(file), dict[str, Any] | None, "a policy (YAML)") or {}
    with located(f"policy {file}"):
        for name, part in given.items():
            known = merged.get(name)
            merged[name] = {**known, **part} if isinstance(known, dict) and isinstance(part, dict) else part
        policy = read_fields("", Policy, merged)
        for name in ("scan", "accuracy", "cleaned", "clean"):
            check_fields(getattr(policy, name), name)
    return policy
