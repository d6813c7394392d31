"""Builds the zoo of a suite: every model by a process of its own, what is there is kept, what failed is shown."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from hfdetox._version import __version__
from hfdetox.attacks import parse_attack_settings
from hfdetox.bench.folder import (
    Settings,
    TaskFolder,
    given_files,
    weights_of,
    words,
)
from hfdetox.bench.runner import run_tasks, share_of_cores
from hfdetox.bench.suite import SuiteError, SuiteFile
from hfdetox.bench.tables import Row, Tables, markdown_table, redacted, rich_table, shown
from hfdetox.bench.tasks import Task, load_suite, zoo_tasks
from hfdetox.config import NONE
from hfdetox.errors import UsageError
from hfdetox.evaluation.verdict import percent
from hfdetox.hub.checksums import sha256_file
from hfdetox.reporting import markdown
from hfdetox.reporting.report import AttackReport
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import parse_triggers

ZOO_JSON, ZOO_MARKDOWN = "zoo.json", "zoo.md"
_HEADINGS = ("cell", "trigger", "target", "ratio", "status", "ACC", "ASR", "RA", "cross", "PSNR", "max", "epochs",
             "seconds", "images/s")  # fmt: skip


def run_suite(file: Path, *, output: Path, dataset: str | None = None, jobs: int = 1, precision: str = "auto",
              device: str = "auto", progress: bool = False) -> ZooTables:  # fmt: skip
    """Build the zoo of a suite file in `output`, whatever of it is not there; the same call goes on after a stop.

    Several suites may share a zoo: its table keeps the rows of the others.

    Args:
        dataset: Hub id or folder, in place of the suite's.
        jobs: processes at a time; each gets its share of the cores unless OMP_NUM_THREADS is set.
        precision: as `--precision` takes it.
        device: as `--device` takes it.
        progress: say on standard error how each model ended, and draw a bar.

    Raises:
        UsageError: the suite is wrong, or a finished folder of another suite or a folder that is no zoo is in the way;
            nothing was written.
        RunError: the zoo cannot be written. A model that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `zoo.json` says what was not run.
    """
    settings = Settings(output=output, dataset=dataset, precision=precision, device=device,
                        threads=share_of_cores(jobs))  # fmt: skip
    zoo = Zoo(load_suite(file), settings)
    run_tasks(zoo, jobs, progress=progress)
    return zoo.outcome()


@dataclass(frozen=True, kw_only=True)
class ZooRow(Row):
    """One model of a zoo and what came of it.

    Attributes:
        model: to `adaptive` the suite's words, see `Task`.
        accuracy: the report's RATE, None unless the model is finished; so are the following.
        triggers: by name: `kind`, `target`, `attack_success_rate` and `robust_accuracy` (RATEs), `cross_accuracy`
            (RATE or None), `psnr` in dB or None, `max_change` in grey levels.
        seconds: training time.
    """

    name: str
    model: str
    trigger: str
    ratio: float | None
    seed: int
    target: str | None
    adaptive: str | None
    status: str = "not run"
    reason: str | None = None
    accuracy: dict[str, Any] | None = None
    triggers: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int | None = None
    seconds: float | None = None
    images_per_second: float | None = None

    def measured(self, report: AttackReport) -> Self:
        """Return the row of the finished model with what its report says."""
        if report.after is None:
            return self
        attack, after = report.attack, asdict(report.after)
        triggers = {
            name: {key: asdict(made)[key] for key in ("kind", "target", "cross_accuracy", "psnr", "max_change")}
            | {key: after["triggers"][name][key] for key in ("attack_success_rate", "robust_accuracy")}
            for name, made in attack.triggers.items()
        }
        speed = {key: getattr(attack, key) for key in ("epochs", "seconds", "images_per_second")}
        status = "done" if report.succeeded else "did not take"
        return replace(self, status=status, accuracy=after["accuracy"], triggers=triggers, **speed)

    def numbers(self) -> list[str]:
        """Return the rates, the seconds and the speed."""
        if self.accuracy is None:
            return []
        found = [f"ACC {_rate(self.accuracy)}"]
        for name, result in self.triggers.items():
            several = f"{name}: " if len(self.triggers) > 1 else ""
            found += [f"{several}ASR {_rate(result['attack_success_rate'])}", f"RA {_rate(result['robust_accuracy'])}"]
        return [*found, f"{self.seconds:,.0f} s", f"{self.images_per_second:,.0f} images/s"]

    def table_rows(self) -> Iterator[list[str]]:
        """Yield the model's lines of a table, one a trigger; what is not known is a dash."""
        for name, result in (self.triggers or {self.trigger: {}}).items():
            rates = [result.get(key) for key in ("attack_success_rate", "robust_accuracy", "cross_accuracy")]
            yield [self.name, name, shown(result.get("target", self.target)), shown(self.ratio), self.status,
                   *map(_rate, [self.accuracy, *rates]), shown(result.get("psnr"), ".1f"),
                   shown(result.get("max_change")), shown(self.epochs), shown(self.seconds, ",.0f"),
                   shown(self.images_per_second, ",.0f")]  # fmt: skip


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "–" if rate is None else percent(rate["value"])


@dataclass(frozen=True)
class ZooTables(Tables[ZooRow]):
    """The table of a zoo."""

    title = "zoo"
    files = (ZOO_JSON, ZOO_MARKDOWN)

    @staticmethod
    def row(task: Task, status: str = "not run", reason: str | None = None, report: Any = None) -> ZooRow:
        """Return a model's row; of a finished one with what its report says."""
        asked = {key: getattr(task, key) for key in ("name", "model", "trigger", "ratio", "seed", "target", "adaptive")}
        row = ZooRow(**asked, status=status, reason=reason)
        return row if report is None else row.measured(report)

    def document(self) -> dict[str, Any]:
        """Return the content of the `zoo.json` of these rows alone."""
        return {"schema_version": 1, "hfdetox_version": __version__, "cells": [asdict(row) for row in self.rows]}

    def read(self, document: Any) -> list[ZooRow]:
        """Return the rows of a `zoo.json`."""
        return [ZooRow(**row) for row in document["cells"]]

    def whole(self) -> Self:
        """Return the rows with those that other suites have in the `zoo.json` that is there."""
        rows = {row.name: row for row in [*(self.earlier() or []), *self.rows]}
        return replace(self, rows=list(rows.values()))

    def table(self) -> Table:
        """Return the table for the terminal; failed models are named with their reasons below it."""
        return rich_table(_HEADINGS, self._cells(), _HEADINGS[:5], caption="\n".join(self._notes()))

    def texts(self) -> dict[str, str]:
        """Return the content of `zoo.md`."""
        notes = [f"- {markdown.text(note)}" for note in self._notes()]
        lines = ["# Zoo", "", self.summary(), "", *markdown_table(_HEADINGS, self._cells())]
        return {ZOO_MARKDOWN: "\n".join([*lines, *(["", *notes] if notes else []), ""])}

    def _cells(self) -> list[list[str]]:
        return [cells for row in self.rows for cells in row.table_rows()]

    def _notes(self) -> list[str]:
        return [row.line() for row in self.rows if row.reason]


class Zoo(TaskFolder[Task]):
    """The folder of a suite's models, and the state of each.

    Raises:
        UsageError: no dataset; a setting, or a clean model that another is made on, is not known; a folder is there
            that another suite made.
    """

    title = "zoo"
    report = AttackReport
    tables = ZooTables

    def prepare(self, suite: SuiteFile) -> list[Task]:
        """Return the models; the clean model that each is made on, where it is made on one, is there too."""
        tasks = zoo_tasks(suite)
        names = {task.name for task in tasks}
        self._surrogates = {task.name: self._surrogate(task, names) for task in tasks}
        return tasks

    def command(self, task: Task) -> list[str]:
        """Return the words after `hfdetox` that make a model, without where it goes and what it is made on."""
        entry = task.entry
        arguments = {key: json.dumps(value) for key, value in entry.model_args.items()}
        return ["attack", entry.model, *self.options({"seed": task.seed}, {
            "model-arg": arguments, "input-size": entry.input_size, "init": entry.init, "trigger": task.specs or NONE,
            "poison-ratio": task.ratio, "target": task.target, "adaptive": task.adaptive, "set": task.settings,
        })]  # fmt: skip

    def argv(self, task: Task) -> list[str]:
        """Return the words after `hfdetox` of the process that makes a model."""
        surrogate = self.needs(task)
        on = words({"surrogate": surrogate and self.folder / surrogate})
        return [*self.command(task), *self.place(task), *on]

    def recorded(self, task: Task) -> dict[str, Any]:
        """Return what NAME.json says of a model: its command, without where things lie, and its sources.

        `files` are the SHA-256 of the trigger files and pictures that it names, `surrogate_weights` that of the clean
        model it is made on, None where there is none (yet).
        """
        surrogate = self.needs(task)
        return {
            "schema_version": 1, "command": redacted(self.command(task)), "surrogate": surrogate,
            "files": [sha256_file(path) for path in given_files(task.specs)],
            "surrogate_weights": surrogate and weights_of(self.folder / surrogate),
        }  # fmt: skip

    def needs(self, task: Task) -> str | None:
        """Return the name of the clean baseline that a model is made on, None for one that is made on none."""
        return self._surrogates[task.name]

    def _surrogate(self, task: Task, names: Collection[str]) -> str | None:
        where = f"{self.suite.file}: cell {task.name}"
        try:
            triggers = parse_triggers(task.specs)
            _, recipes = parse_attack_settings([trigger.kind for trigger in triggers], task.settings)
            parse_adaptive(task.adaptive)
        except UsageError as error:
            raise SuiteError(f"{where}: {error}") from error
        if not any(recipes[trigger.kind].on_clean_model(trigger) for trigger in triggers):
            return None
        if task.baseline in names:
            return task.baseline
        if not task.from_scratch:
            return None  # a trained model is clean before the attack
        raise SuiteError(f"{where} is made on a clean model: add the trigger none for model {task.model} and seed "
                         f"{task.seed} to a grid")  # fmt: skip

    def difference(self, task: Task, report: AttackReport) -> str | None:
        """Return what a finished model is that is not this one.

        What an earlier version did not write, and a clean model that is not there, are held against nothing.
        """
        made, expected = self.made(task), self.recorded(task)
        sources = {key: expected.pop(key) for key in ("files", "surrogate_weights")}
        if made != made | expected:
            return "model that another suite or command made"
        other = [key for key, value in sources.items() if value is not None and made.get(key, value) != value]
        return "model that was made with other trigger files or on another clean model" if other else None
