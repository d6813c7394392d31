"""What a bench runs: every model with every defense that its suite asks for, as often as it asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hfdetox.bench.suite import BenchEntry, Cell, DefenseEntry, SubjectEntry, Suite, folder_part
from hfdetox.bench.suite_yaml import SuiteError

# what a bench has in its folder besides the runs
_TAKEN = frozenset({"bench.json", "bench.md", "bench.csv", "trials.csv", "plots"})
SHARE = 0.05  # of the split, the clean images that a trial's name does not say


@dataclass(frozen=True)
class Subject:
    """A model that defenses are tried on.

    Attributes:
        name: its folder in the bench.
        model: the name of its row of models: the zoo's model, or the subject's own name.
        attack: what was done to it, in a word.
        source: a cell of the zoo, or a model of the suite's that is not of the zoo.
        clean: whether it is a clean baseline of the zoo.
    """

    name: str
    model: str
    attack: str
    source: Cell | SubjectEntry
    clean: bool = False


@dataclass(frozen=True)
class Trial:
    """One run of a defense on a model: a cell of the bench, in the folder SUBJECT/DEFENSE-sSEED.

    Attributes:
        label: the suite's name of the defense, with the number of clean images where it is not the usual share.
        samples: clean images, a share of the split or a count.
    """

    subject: Subject
    label: str
    entry: DefenseEntry
    samples: int | float
    seed: int

    @property
    def name(self) -> str:
        """The folder in the bench; the same whatever else is in the suite."""
        return f"{self.subject.name}/{folder_part(self.label)}-s{self.seed}"


def trials_of(suite: Suite) -> list[Trial]:
    """Return what a suite's `bench` asks for, each trial once and in its order.

    Without a `bench`, these are all defenses on all attacked models of the grids.

    Raises:
        SuiteError: the suite names no defense or no model, or two of its trials would share a folder.
    """
    entries = suite.bench or tuple(
        BenchEntry(defenses=tuple(suite.defenses), grid=grid) for grid in suite.grids if suite.defenses
    )
    found: dict[str, Trial] = {}
    subjects: dict[str, Subject] = {}
    for number, entry in enumerate(entries):
        for trial in _trials_of(suite, entry, clean=bool(suite.bench)):
            # some file systems do not tell upper from lower case
            folder = subjects.setdefault(trial.subject.name.casefold(), trial.subject)
            if folder != trial.subject:
                raise SuiteError(f"{suite.file}: bench[{number}]: {trial.subject.name} is the folder of two models; "
                                 "rename a model, a trigger or a subject")  # fmt: skip
            earlier = found.setdefault(trial.name.casefold(), trial)
            if earlier != trial:
                raise SuiteError(f"{suite.file}: bench[{number}]: {trial.name} and another run would share one folder; "
                                 "rename a model, a trigger or a defense")  # fmt: skip
    if not found:
        raise SuiteError(f"{suite.file} asks for no bench: give it `bench`, or defenses and grids")
    return list(found.values())


def _trials_of(suite: Suite, entry: BenchEntry, *, clean: bool) -> Iterator[Trial]:
    subjects = list(_subjects_of(suite, entry, clean=clean))
    for name in entry.defenses:
        defense = suite.defenses.get(name) or DefenseEntry(defense=name)
        for samples in entry.samples:
            label = name if samples == SHARE else f"{name}-n{samples}"
            for seed in entry.seeds:
                for subject in subjects:
                    yield Trial(subject, label, defense, samples, seed)


def _subjects_of(suite: Suite, entry: BenchEntry, *, clean: bool) -> Iterator[Subject]:
    for cell in suite.cells_of(entry.grid) if entry.grid is not None else ():
        if clean or not cell.clean:
            # a zoo's cell is MODEL-ATTACK…-sSEED
            attack = cell.name.removeprefix(f"{folder_part(cell.model)}-").removesuffix(f"-s{cell.seed}")
            yield Subject(
                cell.name, cell.model, attack if cell.seed == 0 else f"{attack}-s{cell.seed}", cell, cell.clean
            )
    for name in entry.subjects:
        if name in suite.models or folder_part(name).casefold() in _TAKEN:
            where = f"{suite.file}: subjects.{name}"
            raise SuiteError(
                f"{where}: the name is that of a model of the zoo or of a file of the bench; choose another"
            )
        yield Subject(folder_part(name), name, name, suite.subjects[name])
