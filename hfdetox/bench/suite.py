"""What a suite file says: short YAML, every key known, every value of its type. Light: read before the libraries load.

dataset: uoft-cs/cifar10                # or {id: …, image_column: …, …}; --dataset is used instead of the id
training: {epochs: 10}                  # --set values of all cells
models:
  small: {model: "timm-arch:resnetv2_50", model_args: {layers: [1, 1, 1]}, input_size: 32, settings: {epochs: 12}}
triggers:                               # names for specifications with settings of their own
  ssba: {spec: "ssba:bits=32", settings: {encoder_epochs: 4}}
grids:                                  # each is models × triggers × ratios × seeds (× targets × adaptive)
  - {models: [small], triggers: [none, badnets, ssba], ratios: [0.1, 0.01], seeds: [0]}
# for the bench; without `bench` it tries every defense on every attacked model of the grids
defenses: {d3: d3:paper, strong: {defense: d3, settings: {lambda: 2}}}
subjects:                               # models that are not of the zoo, and what is known of their triggers
  hub: {model: org/model, triggers: ["badnets:size=3"], target: cat}
bench:                                  # models × defenses × clean images × seeds; model_seeds are those of the zoo
  - {models: [small], triggers: [badnets, ssba], ratios: [0.1], defenses: [d3, strong, ft], seeds: [0, 1, 2]}
  - {subjects: [hub], defenses: [d3], samples: [0.05, 500]}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from hfdetox.documents import read_yaml
from hfdetox.errors import UsageError, located
from hfdetox.specs import target_text
from hfdetox.values import Shape, read_fields, shown, to_text

T = TypeVar("T")


class SuiteError(UsageError):
    """A suite file that cannot be read or asks for what there is not; the message names the file and the key."""


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    for i, item in enumerate(items):
        if item in items[:i]:
            raise UsageError(f"{shown(item)} is there twice")
    return items


def _scalars(value: Any, *kinds: type) -> bool:
    return all(isinstance(item, (str, int, float, *kinds)) for item in (value if isinstance(value, list) else [value]))


def _settings(given: dict[str, Any]) -> dict[str, str]:
    return {key.replace("-", "_"): to_text(value) for key, value in given.items()}


_VALUE = "must be a number, text, true, false or a list of these, got {}"
Text = Annotated[str, Shape("must be text, got {}; put it in quotes", str.strip)]
Count = Annotated[int, Shape("must be a whole number of at least 1, got {}", lambda n: n >= 1)]
Seed = Annotated[int, Shape("must be a whole number of at least 0, got {}", lambda n: n >= 0)]
Share = Annotated[float, Shape("must be above 0 and at most 1, such as 0.1, got {}", lambda x: 0 < x <= 1, make=float)]
# as on the command line, a number with a point is a share
Samples = Annotated[int | float, Shape("must be above 0 and at most 1, or a whole number of at least 1, got {}",
                                       lambda n: n >= 1 if isinstance(n, int) else 0 < n <= 1)]  # fmt: skip
Target = Annotated[
    str,
    Shape("must be text or a whole number of at least 0, got {}",
          lambda x: x.strip() if isinstance(x, str) else x >= 0, str | int, target_text),
]  # fmt: skip
Items = Annotated[tuple[T, ...], Shape("must be a list with at least one entry, got {}", bool, make=_distinct)]
# `--set` values, as the command line takes them
Settings = Annotated[
    dict[str, str],
    Shape(kind=dict[str, Annotated[Any, Shape(_VALUE, lambda x: _scalars(x, type(None)))]], make=_settings),
]
Arguments = dict[str, Annotated[Any, Shape(_VALUE, _scalars)]]


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """The images of all cells, by the names of the command line's options; `id` is a Hub id or a local folder."""

    SHORT: ClassVar = "id"

    id: Text | None = None
    config: Text | None = None
    split: Text | None = None
    eval_split: Text | None = None
    image_column: Text | None = None
    label_column: Text | None = None
    revision: Text | None = None
    samples: Samples | None = None
    eval_samples: Count | None = None


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of a suite, as `hfdetox attack MODEL` takes it.

    Attributes:
        model: a Hub id, a local folder, or `timm-arch:NAME`.
        model_args: of a timm architecture, by name: scalars or lists of scalars.
        input_size: side of the square input in pixels, None for the model's own.
        init: `random` draws the weights anew, `head` the head alone.
        settings: `--set` values of this model's cells.
    """

    SHORT: ClassVar = "model"

    model: Text
    model_args: Arguments = field(default_factory=dict)
    input_size: Count | None = None
    init: Literal["random", "head"] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TriggerEntry:
    """A trigger with a name of its own: one or more specifications that go into one model, and `--set` values."""

    SHORT: ClassVar = "spec"

    spec: Annotated[tuple[str, ...], Shape(kind=Text | Items[Text], make=lambda x: (x,) if isinstance(x, str) else x)]
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GridEntry:
    """Cells: every combination of these. Models and triggers are names of the suite; a trigger may be a specification.

    Attributes:
        targets: the attacker's labels, names or indices, or `all-to-all`; None leaves the label to the attack.
        adaptive: attackers' trainings such as `sam:rho=2`; None and `none` are the usual one.
    """

    models: Items[Text]
    triggers: Items[Text]
    ratios: Items[Share] = (0.1,)
    seeds: Items[Seed] = (0,)
    targets: Items[Target | None] = (None,)
    adaptive: Items[Text | None] = (None,)


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """A defense that the bench tries, `NAME[:PRESET]`, and its `--set` values; a zoo is built without it."""

    SHORT: ClassVar = "defense"

    defense: Text
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TargetEntry:
    """A model that is not of the zoo, and what is known of its triggers, as `hfdetox detox` takes them.

    Attributes:
        model: a Hub id, a timm id or a local folder.
        revision: of the model on the Hub.
        triggers: specifications or trigger files; none for a model of which nothing is known.
        target: of triggers that name none.
    """

    SHORT: ClassVar = "model"

    model: Text
    revision: Text | None = None
    triggers: Items[Text] = ()
    target: Target | None = None


@dataclass(frozen=True, kw_only=True)
class BenchEntry(GridEntry):
    """What the bench runs: every combination of models, defenses, numbers of clean images and seeds.

    Attributes:
        models: of the zoo, as a grid has them; none for subjects alone.
        model_seeds: those of the zoo's models; `seeds` are those of the defense.
        subjects: names of the suite's subjects.
        defenses: names of the suite's defenses, or `NAME[:PRESET]` each.
        samples: clean images of a defense, a share of the split or a count.
    """

    models: Items[Text] = ()
    triggers: Items[Text] = ()
    model_seeds: Items[Seed] = (0,)
    subjects: Items[Text] = ()
    defenses: Items[Text]
    samples: Items[Samples] = (0.05,)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite file says."""

    dataset: DatasetEntry = field(default_factory=DatasetEntry)
    training: Settings = field(default_factory=dict)
    models: dict[str, ModelEntry] = field(default_factory=dict)
    triggers: dict[str, TriggerEntry] = field(default_factory=dict)
    grids: Items[GridEntry] = ()
    defenses: dict[str, DefenseEntry] = field(default_factory=dict)
    subjects: dict[str, TargetEntry] = field(default_factory=dict)
    bench: Items[BenchEntry] = ()


@dataclass(frozen=True, kw_only=True)
class SuiteFile(Suite):
    """A suite, and the file that says it."""

    file: Path


def read_plain(file: Path) -> Any:
    """Return what a suite file says, as YAML's plain types; SuiteError when it cannot be read or is empty."""
    try:
        content = read_yaml(file)
    except UsageError as error:
        raise SuiteError(str(error)) from error
    if content is None:
        raise SuiteError(f"{file}: the suite is empty; it needs models and grids, or subjects and a bench")
    return content


def read_suite(file: Path) -> SuiteFile:
    """Return what a suite file says; that the names in it mean something is for `load_suite` to see.

    Raises:
        SuiteError: it cannot be read, is no YAML, has an unknown or missing key, or a value of the wrong type or range.
    """
    content = read_plain(file)
    with located(str(file), SuiteError):
        # a bench of models that are there needs neither
        if isinstance(content, dict) and ("subjects" not in content or "grids" in content):
            for key in {"models", "grids"} - set(content):
                raise UsageError(f"{key} is missing")
        return SuiteFile(file=file, **vars(read_fields("", Suite, content)))
