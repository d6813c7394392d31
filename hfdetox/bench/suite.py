"""Suites: models × triggers × ratios × seeds as the cells of a zoo, and the defenses that a bench tries on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hfdetox.bench.suite_yaml import SuiteError
from hfdetox.config import NONE
from hfdetox.models.initial import ARCHITECTURE
from hfdetox.triggers.base import ALL_TO_ALL

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,39}")
_LONGEST = 24  # letters kept of a text that cannot be a folder's name as it is


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """The images of all cells, by the names of the command line's options; `id` is a Hub id or a local folder."""

    id: str | None = None
    config: str | None = None
    split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    revision: str | None = None
    samples: int | float | None = None
    eval_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of a suite, as `hfdetox attack MODEL` takes it.

    Attributes:
        model: a Hub id, a local folder, or `timm-arch:NAME`.
        model_args: of a timm architecture, by name: scalars or lists of scalars.
        input_size: side of the square input in pixels, None for the model's own.
        init: `random` draws the weights anew.
        settings: `--set` values of this model's cells.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    input_size: int | None = None
    init: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are freshly drawn."""
        return self.init is not None or self.model.startswith(ARCHITECTURE)


@dataclass(frozen=True, kw_only=True)
class TriggerEntry:
    """A trigger with a name of its own: one or more specifications that go into one model, and `--set` values."""

    specs: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GridEntry:
    """Cells: every combination of these. Models and triggers are names of the suite; a trigger may be a specification.

    Attributes:
        targets: the attacker's labels, names or indices, or `all-to-all`; None leaves the label to the attack.
        adaptive: attackers' trainings such as `sam:rho=2`; None is the usual one.
    """

    models: tuple[str, ...]
    triggers: tuple[str, ...]
    ratios: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0,)
    targets: tuple[str | None, ...] = (None,)
    adaptive: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """A defense that the bench tries, `NAME[:PRESET]`, and its `--set` values; a zoo is built without it."""

    defense: str
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SubjectEntry:
    """A model that is not of the zoo, and what is known of its triggers, as `hfdetox detox` takes them.

    Attributes:
        model: a Hub id, a timm id or a local folder.
        revision: of the model on the Hub.
        triggers: specifications or trigger files; none for a model of which nothing is known.
        target: of triggers that name none.
    """

    model: str
    revision: str | None = None
    triggers: tuple[str, ...] = ()
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchEntry:
    """What the bench runs: every combination of models, defenses, numbers of clean images and seeds.

    Attributes:
        grid: cells of the zoo.
        subjects: names of the suite's subjects.
        defenses: names of the suite's defenses, or `NAME[:PRESET]` each.
        samples: clean images of a defense, a share of the split or a count.
        seeds: of the defense.
    """

    defenses: tuple[str, ...]
    grid: GridEntry | None = None
    subjects: tuple[str, ...] = ()
    samples: tuple[int | float, ...] = (0.05,)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a zoo.

    Attributes:
        name: its folder in the zoo; the same whatever else is in the suite.
        model: name of the model.
        entry: the model itself.
        trigger: name of the trigger, `none` for a clean baseline.
        specs: the trigger's specifications, empty for a clean baseline.
        ratio: share of poisoned images, None for a clean baseline.
        target: as in `GridEntry`.
        adaptive: as in `GridEntry`.
        settings: `--set` values: the suite's, then the model's, then the trigger's.
    """

    name: str
    model: str
    entry: ModelEntry
    trigger: str
    specs: tuple[str, ...]
    ratio: float | None
    seed: int
    target: str | None
    adaptive: str | None
    settings: dict[str, str]

    @property
    def clean(self) -> bool:
        """Whether this is a clean baseline."""
        return not self.specs

    @property
    def control(self) -> str:
        """The name of the clean baseline of the same model and seed."""
        return clean_name(self.model, self.seed)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite file says."""

    file: Path
    dataset: DatasetEntry
    training: dict[str, str]
    models: dict[str, ModelEntry]
    triggers: dict[str, TriggerEntry]
    grids: tuple[GridEntry, ...]
    defenses: dict[str, DefenseEntry]
    subjects: dict[str, SubjectEntry]
    bench: tuple[BenchEntry, ...]

    def cells(self) -> list[Cell]:
        """Return every cell once: the clean baselines, then the others in the order of the file.

        Raises:
            SuiteError: two grids ask for the same cell, or two cells would have the same folder.
        """
        found: dict[str, tuple[int, Cell]] = {}
        for number, grid in enumerate(self.grids):
            for cell in self.cells_of(grid):
                # some file systems do not tell upper from lower case
                place, earlier = found.setdefault(cell.name.casefold(), (number, cell))
                if earlier is cell or (place == number and cell.clean and earlier == cell):
                    continue  # a clean baseline has no ratio or target: one cell of a grid for all of them
                where = f"{self.file}: grids[{number}]: cell {cell.name}"
                if earlier == cell:
                    raise SuiteError(f"{where} is also in grids[{place}]; leave it out of one")
                raise SuiteError(f"{where} and another cell would share one folder; rename a model or a trigger")
        return sorted((cell for _, cell in found.values()), key=lambda cell: not cell.clean)

    def cells_of(self, grid: GridEntry) -> Iterator[Cell]:
        """Yield the cells of one grid; a clean baseline may come several times."""
        combinations = product(grid.models, grid.triggers, grid.targets, grid.adaptive, grid.ratios, grid.seeds)
        for model, trigger, target, adaptive, ratio, seed in combinations:
            entry = self.models[model]
            common: dict[str, Any] = {"model": model, "entry": entry, "trigger": trigger, "seed": seed}
            if trigger == NONE:
                yield Cell(**common, name=clean_name(model, seed), specs=(), ratio=None, target=None, adaptive=None,
                           settings=self.training | entry.settings)  # fmt: skip
                continue
            named = self.triggers.get(trigger) or TriggerEntry(specs=(trigger,))
            parts = [folder_part(model), folder_part(trigger)]
            if target is not None:
                parts.append(target if target == ALL_TO_ALL else f"to-{folder_part(target)}")
            parts.append(repr(ratio).removesuffix(".0"))
            if adaptive is not None:
                parts.append(folder_part(adaptive))
            yield Cell(**common, name="-".join([*parts, f"s{seed}"]), specs=named.specs, ratio=ratio, target=target,
                       adaptive=adaptive, settings=self.training | entry.settings | named.settings)  # fmt: skip


def clean_name(model: str, seed: int) -> str:
    """Return the folder's name of a model's clean baseline."""
    return f"{folder_part(model)}-clean-s{seed}"


def folder_part(text: str) -> str:
    """Return `text` as a part of a folder's name: as it is where that is safe, else its letters and a hash of it."""
    plain = text.replace(":", "_").replace(",", "_")
    if _PLAIN.fullmatch(plain):
        return plain
    letters = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", text.rpartition("/")[2]).strip("-.")[:_LONGEST]
    return f"{letters or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
