"""What a suite asks for: the models of its zoo and the runs of its bench, each under a name that stays."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from hfdetox.bench.suite import (
    BenchEntry,
    DefenseEntry,
    GridEntry,
    ModelEntry,
    Suite,
    SuiteError,
    SuiteFile,
    TargetEntry,
    TriggerEntry,
    read_suite,
)
from hfdetox.config import NONE
from hfdetox.defenses import parse_defense
from hfdetox.errors import UsageError, located
from hfdetox.files import BENCH_NAME
from hfdetox.models.initial import ARCHITECTURE
from hfdetox.triggers import parse_triggers
from hfdetox.triggers.base import ALL_TO_ALL
from hfdetox.values import shown

BENCH_FILES = (BENCH_JSON, BENCH_MARKDOWN, BENCH_CSV, TRIALS_CSV, PLOTS) = (
    BENCH_NAME, "bench.md", "bench.csv", "trials.csv", "plots")  # fmt: skip
SHARE = 0.05  # of the split, the clean images that a run's name does not say
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,39}")
_LONGEST = 24  # letters kept of a text that cannot be a folder's name as it is


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model of a zoo.

    Attributes:
        name: its folder in the zoo; the same whatever else is in the suite.
        model: name of the model, `entry` what the suite says of it.
        trigger: name of the trigger, `none` for a clean baseline.
        specs: the trigger's specifications, empty for a clean baseline.
        ratio: share of poisoned images, None for a clean baseline.
        target: as in `GridEntry`, and so is `adaptive`.
        settings: `--set` values: the suite's, then the model's, then the trigger's.
    """

    name: str
    model: str
    entry: ModelEntry
    trigger: str
    specs: tuple[str, ...] = ()
    ratio: float | None = None
    seed: int
    target: str | None = None
    adaptive: str | None = None
    settings: dict[str, str]

    @property
    def clean(self) -> bool:
        """Whether this is a clean baseline."""
        return not self.specs

    @property
    def baseline(self) -> str:
        """The name of the clean baseline of the same model and seed."""
        return f"{folder_part(self.model)}-clean-s{self.seed}"

    @property
    def from_scratch(self) -> bool:
        """Whether the weights that the training starts from are freshly drawn, those of the head at least."""
        return self.entry.init is not None or self.entry.model.startswith(ARCHITECTURE)


@dataclass(frozen=True)
class TargetModel:
    """A model that defenses are tried on.

    Attributes:
        name: its folder in the bench.
        model: the name of its row of models: the zoo's model, or the suite's own name of one that is of no zoo.
        attack: what was done to it, in a word.
        source: a task of the zoo, or a model of the suite's that is not of the zoo.
    """

    name: str
    model: str
    attack: str
    source: Task | TargetEntry

    @property
    def clean(self) -> bool:
        """Whether it is a clean baseline of the zoo."""
        return isinstance(self.source, Task) and self.source.clean


@dataclass(frozen=True)
class Run:
    """One run of a defense on a model, in the folder MODEL/DEFENSE-sSEED.

    Attributes:
        label: the suite's name of the defense, with the number of clean images where it is not the usual share.
        samples: clean images, a share of the split or a count.
    """

    target: TargetModel
    label: str
    entry: DefenseEntry
    samples: int | float
    seed: int

    @property
    def name(self) -> str:
        """The folder in the bench; the same whatever else is in the suite."""
        return f"{self.target.name}/{folder_part(self.label)}-s{self.seed}"


def load_suite(file: Path) -> SuiteFile:
    """Read and check a suite file; paths in it are relative to the working directory, as on the command line.

    Raises:
        SuiteError: what `read_suite` raises; it names a model, trigger, defense or subject that there is not; or two
            of its cells are the same.
    """
    suite = read_suite(file)
    with located(str(file), SuiteError):
        _check_names(suite)
        zoo_tasks(suite)
    return suite


def _check_names(suite: Suite) -> None:
    """Raise UsageError, which begins with the key, for what the suite names and there is not."""
    if NONE in suite.triggers:
        raise UsageError("triggers.none: none is the clean baseline's; choose another name")
    checks: list[tuple[str, Callable[[], object]]]
    checks = [(f"triggers.{name}", partial(parse_triggers, entry.spec)) for name, entry in suite.triggers.items()]
    checks += [(f"defenses.{name}", partial(parse_defense, entry.defense, entry.settings))
               for name, entry in suite.defenses.items()]  # fmt: skip
    checks += [(f"subjects.{name}.triggers", partial(parse_triggers, entry.triggers))
               for name, entry in suite.subjects.items()]  # fmt: skip
    for i, bench in enumerate(suite.bench):
        if bool(bench.models) != bool(bench.triggers):
            raise UsageError(f"bench[{i}]: {'triggers' if bench.models else 'models'} is missing")
        if not bench.models and not bench.subjects:
            raise UsageError(f"bench[{i}]: name models and triggers of the zoo, or subjects")
        _check_known(f"bench[{i}].subjects", "subject", bench.subjects, suite.subjects)
        checks += [(f"bench[{i}].defenses", partial(parse_defense, spec)) for spec in bench.defenses
                   if spec not in suite.defenses]  # fmt: skip
    grids = [(f"grids[{i}]", grid) for i, grid in enumerate(suite.grids)]
    for where, grid in [*grids, *((f"bench[{i}]", bench) for i, bench in enumerate(suite.bench))]:
        _check_known(f"{where}.models", "model", grid.models, suite.models)
        checks += [(f"{where}.triggers", partial(parse_triggers, [spec])) for spec in grid.triggers
                   if spec not in (NONE, *suite.triggers)]  # fmt: skip
    for where, parse in checks:
        with located(where):
            parse()
    if suite.dataset.samples is not None and not suite.grids:
        raise UsageError("dataset.samples is for the attacks of grids, and there are none; the clean images of a "
                         "defense are `samples` under bench")  # fmt: skip


def _check_known(where: str, kind: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{where}: unknown {kind} {shown(name)}; the suite has {', '.join(known)}")


def zoo_tasks(suite: Suite) -> list[Task]:
    """Return every model of a suite's zoo once: the clean baselines, then the others in the order of the file.

    Raises:
        UsageError: two grids ask for the same model, or two models would have the same folder.
    """
    found: dict[str, tuple[int, Task]] = {}
    for number, grid in enumerate(suite.grids):
        for task in _tasks_of(suite, grid, grid.seeds):
            # some file systems do not tell upper from lower case
            place, earlier = found.setdefault(task.name.casefold(), (number, task))
            if earlier is task or (place == number and task.clean and earlier == task):
                continue  # a clean baseline has no ratio or target: one of a grid for all of them
            where = f"grids[{number}]: cell {task.name}"
            if earlier == task:
                raise UsageError(f"{where} is also in grids[{place}]; leave it out of one")
            raise UsageError(f"{where} and another cell would share one folder; rename a model or a trigger")
    return sorted((task for _, task in found.values()), key=lambda task: not task.clean)


def _tasks_of(suite: Suite, grid: GridEntry, seeds: Sequence[int]) -> Iterator[Task]:
    """Yield the models of one grid; a clean baseline may come several times."""
    combinations = product(grid.models, grid.triggers, grid.targets, grid.adaptive, grid.ratios, seeds)
    for model, trigger, target, adaptive, ratio, seed in combinations:
        entry = suite.models[model]
        task = Task(name="", model=model, entry=entry, trigger=trigger, seed=seed,
                    settings=suite.training | entry.settings)  # fmt: skip
        if trigger == NONE:
            yield replace(task, name=task.baseline)
            continue
        named = suite.triggers.get(trigger) or TriggerEntry(spec=(trigger,))
        adaptive = None if adaptive == NONE else adaptive
        parts = [folder_part(model), folder_part(trigger)]
        if target is not None:
            parts.append(target if target == ALL_TO_ALL else f"to-{folder_part(target.removeprefix('index:'))}")
        parts += [repr(ratio).removesuffix(".0"), *([folder_part(adaptive)] if adaptive is not None else [])]
        yield replace(task, name="-".join([*parts, f"s{seed}"]), specs=named.spec, ratio=ratio, target=target,
                      adaptive=adaptive, settings=task.settings | named.settings)  # fmt: skip


def bench_runs(suite: SuiteFile) -> list[Run]:
    """Return what a suite's `bench` asks for, each run once and in its order.

    Without a `bench`, these are all defenses on all attacked models of the grids.

    Raises:
        SuiteError: the suite names no defense or no model, or two of its runs would share a folder.
    """
    found: dict[str, Run] = {}
    targets: dict[str, TargetModel] = {}
    entries = suite.bench or tuple(
        BenchEntry(**{**vars(grid), "seeds": (0,)}, model_seeds=grid.seeds, defenses=tuple(suite.defenses))
        for grid in suite.grids
        if suite.defenses
    )
    for number, entry in enumerate(entries):
        models = [target for target in _targets_of(suite, entry) if suite.bench or not target.clean]
        for defense, samples, seed, target in product(entry.defenses, entry.samples, entry.seeds, models):
            label = defense if samples == SHARE else f"{defense}-n{samples}"
            run = Run(target, label, suite.defenses.get(defense) or DefenseEntry(defense=defense), samples, seed)
            # some file systems do not tell upper from lower case
            if targets.setdefault(target.name.casefold(), target) != target:
                raise SuiteError(f"{suite.file}: bench[{number}]: {target.name} is the folder of two models; rename a "
                                 "model, a trigger or a subject")  # fmt: skip
            if found.setdefault(run.name.casefold(), run) != run:
                raise SuiteError(f"{suite.file}: bench[{number}]: {run.name} and another run would share one folder; "
                                 "rename a model, a trigger or a defense")  # fmt: skip
    if not found:
        raise SuiteError(f"{suite.file} asks for no bench: give it `bench`, or defenses and grids")
    return list(found.values())


def _targets_of(suite: SuiteFile, entry: BenchEntry) -> Iterator[TargetModel]:
    for task in _tasks_of(suite, entry, entry.model_seeds):
        # a zoo's model is MODEL-ATTACK…-sSEED
        attack = task.name.removeprefix(f"{folder_part(task.model)}-").removesuffix(f"-s{task.seed}")
        yield TargetModel(task.name, task.model, attack if task.seed == 0 else f"{attack}-s{task.seed}", task)
    for name in entry.subjects:
        if name in suite.models or folder_part(name).casefold() in BENCH_FILES:
            raise SuiteError(f"{suite.file}: subjects.{name}: the name is that of a model of the zoo or of a file of "
                             "the bench; choose another")  # fmt: skip
        yield TargetModel(folder_part(name), name, name, suite.subjects[name])


def folder_part(text: str) -> str:
    """Return `text` as a part of a folder's name: as it is where that is safe, else its letters and a hash of it."""
    plain = text.replace(":", "_").replace(",", "_")
    if _PLAIN.fullmatch(plain):
        return plain
    letters = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", text.rpartition("/")[2]).strip("-.")[:_LONGEST]
    return f"{letters or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
