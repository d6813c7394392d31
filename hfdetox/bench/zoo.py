"""Builds the zoo of a suite: every model by a process of its own, what is there is kept, what failed is shown."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from hfdetox._version import __version__
from hfdetox.arguments import argv, takes
from hfdetox.attacks import parse_attack_settings
from hfdetox.bench.folder import TaskFolder, given_files, weights_of
from hfdetox.bench.runner import run_tasks
from hfdetox.bench.suite import SuiteError, SuiteFile
from hfdetox.bench.tables import Row, Tables, redacted, rich_table, shown
from hfdetox.bench.tasks import Task, load_suite, zoo_tasks
from hfdetox.config import NONE, AttackOptions
from hfdetox.config_bench import SuiteOptions
from hfdetox.data.opened import open_dataset
from hfdetox.errors import located
from hfdetox.evaluation.verdict import percent
from hfdetox.files import sha256_file
from hfdetox.planning import attack_cost, time_attacked
from hfdetox.progress import draws, note
from hfdetox.reporting.report import AttackReport
from hfdetox.runs.estimate import Timed, count_images
from hfdetox.training.devices import accelerate_state_kept
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import parse_triggers

ZOO_JSON, ZOO_MARKDOWN = "zoo.json", "zoo.md"
_HEADINGS = ("cell", "trigger", "target", "ratio", "status", "ACC", "ASR", "RA", "cross", "PSNR", "max", "epochs",
             "seconds", "images/s")  # fmt: skip


_ASKED = ("name", "model", "trigger", "ratio", "seed", "target", "adaptive")
_SPEED = ("epochs", "seconds", "images_per_second")
_UNMEASURED: Row = {"accuracy": None, "triggers": {}, **dict.fromkeys(_SPEED)}


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "–" if rate is None else percent(rate["value"])


@dataclass(frozen=True)
class ZooTables(Tables):
    """The table of a zoo.

    In a row `model` to `adaptive` are the suite's words, see `Task`. Of a finished model it has the RATE of its
    `accuracy`; `triggers` by name: `kind`, `target`, `attack_success_rate` and `robust_accuracy` (RATEs),
    `cross_accuracy` (RATE or None), `psnr` in dB or None, `max_change` in grey levels; the `seconds` of the training.
    """

    title = "zoo"
    files = (ZOO_JSON, ZOO_MARKDOWN)

    @staticmethod
    def row(task: Task, status: str = "not run", reason: str | None = None, report: AttackReport | None = None) -> Row:
        """Return a model's row; of a finished one with what its report says."""
        row = {key: getattr(task, key) for key in _ASKED} | {"status": status, "reason": reason} | _UNMEASURED
        if report is None or report.after is None:
            return row
        plain = report.to_dict()
        attack, after = plain["attack"], plain["after"]
        triggers = {
            name: {key: made[key] for key in ("kind", "target", "cross_accuracy", "psnr", "max_change")}
            | {key: after["triggers"][name][key] for key in ("attack_success_rate", "robust_accuracy")}
            for name, made in attack["triggers"].items()
        }
        return row | {"status": "done" if report.succeeded else "did not take", "accuracy": after["accuracy"],
                      "triggers": triggers, **{key: attack[key] for key in _SPEED}}  # fmt: skip

    @staticmethod
    def numbers(row: Row) -> list[str]:
        """Return the rates, the seconds and the speed."""
        if row["accuracy"] is None:
            return []
        found = [f"ACC {_rate(row['accuracy'])}"]
        for name, result in row["triggers"].items():
            several = f"{name}: " if len(row["triggers"]) > 1 else ""
            found += [f"{several}ASR {_rate(result['attack_success_rate'])}", f"RA {_rate(result['robust_accuracy'])}"]
        return [*found, f"{row['seconds']:,.0f} s", f"{row['images_per_second']:,.0f} images/s"]

    def document(self) -> dict[str, Any]:
        """Return the content of the `zoo.json` of these rows alone."""
        return {"schema_version": 1, "hfdetox_version": __version__, "cells": list(self.rows)}

    def read(self, document: Any) -> list[Row]:
        """Return the rows of a `zoo.json`; an earlier version may have measured less."""
        return [{key: row[key] for key in _ASKED} | {"status": "not run", "reason": None} | _UNMEASURED | row
                for row in document["cells"]]  # fmt: skip

    def whole(self) -> Self:
        """Return the rows with those that other suites have in the `zoo.json` that is there."""
        rows = {row["name"]: row for row in [*(self.earlier() or []), *self.rows]}
        return replace(self, rows=list(rows.values()))

    def __rich__(self) -> Table:
        """Return the table for the terminal; failed models are named with their reasons below it."""
        return rich_table(_HEADINGS, self._cells(), _HEADINGS[:5], caption="\n".join(self._notes()))

    def texts(self) -> dict[str, str]:
        """Return the content of `zoo.md`."""
        return {
            ZOO_MARKDOWN: self.rendered("zoo.md.jinja", headings=_HEADINGS, cells=self._cells(), notes=self._notes())
        }

    def _cells(self) -> list[list[str]]:
        return [cells for row in self.rows for cells in table_rows(row)]

    def _notes(self) -> list[str]:
        return [self.line(row) for row in self.rows if row["reason"]]


def table_rows(row: Row) -> Iterator[list[str]]:
    """Yield a model's lines of a table, one a trigger; what is not known is a dash."""
    for name, result in (row["triggers"] or {row["trigger"]: {}}).items():
        rates = [result.get(key) for key in ("attack_success_rate", "robust_accuracy", "cross_accuracy")]
        yield [row["name"], name, shown(result.get("target", row["target"])), shown(row["ratio"]), row["status"],
               *map(_rate, [row["accuracy"], *rates]), shown(result.get("psnr"), ".1f"),
               shown(result.get("max_change")), shown(row["epochs"]), shown(row["seconds"], ",.0f"),
               shown(row["images_per_second"], ",.0f")]  # fmt: skip


class Zoo(TaskFolder[Task, SuiteOptions]):
    """The folder of a suite's models, and the state of each.

    Raises:
        UsageError: no dataset; a setting, or a clean model that another is made on, is not known; a folder is there
            that another suite made.
    """

    title, word = "zoo", "model"
    report = AttackReport
    tables = ZooTables

    def prepare(self, suite: SuiteFile) -> list[Task]:
        """Return the models; the clean model that each is made on, where it is made on one, is there too."""
        tasks = zoo_tasks(suite)
        names = {task.name for task in tasks}
        self._counts: tuple[int, int] | None = None
        self._timed: dict[str, Timed] = {}
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
        return [*self.command(task), *self.place(task), *argv({"surrogate": surrogate and self.folder / surrogate})]

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

    def minutes_of(self, task: Task) -> tuple[float, float]:
        """Return how long a model takes; one model of each row of the suite's models is timed."""
        options = self._options(task)
        if self._counts is None:
            self._counts = count_images(open_dataset(self.dataset, options, warn=lambda _: None), options)
        if task.model not in self._timed:
            self._timed[task.model] = time_attacked(options)
        timed = self._timed[task.model]
        minutes = attack_cost(options, *self._counts).efforts[0] / timed.speed / 60
        return minutes, minutes

    def _options(self, task: Task) -> AttackOptions:
        """Return the options of a model, as far as they decide how long it takes."""
        entry, read = task.entry, self.suite.dataset
        return AttackOptions(
            entry.model, dataset=self.dataset, dataset_config=read.config, split=read.split,
            eval_split=read.eval_split, image_column=read.image_column, label_column=read.label_column,
            dataset_revision=None if self.settings.dataset else read.revision, clean_samples=read.samples,
            eval_samples=read.eval_samples, triggers=list(task.specs) or [NONE], poison_ratio=task.ratio or 0.1,
            adaptive=task.adaptive, init=entry.init, model_args=entry.model_args or None, input_size=entry.input_size,
            settings=task.settings, seed=task.seed, device=self.settings.device)  # fmt: skip

    def needs(self, task: Task) -> str | None:
        """Return the name of the clean baseline that a model is made on, None for one that is made on none."""
        return self._surrogates[task.name]

    def _surrogate(self, task: Task, names: Collection[str]) -> str | None:
        where = f"{self.suite.file}: cell {task.name}"
        with located(where, SuiteError):
            triggers = parse_triggers(task.specs)
            _, poisoners = parse_attack_settings([trigger.kind for trigger in triggers], task.settings)
            parse_adaptive(task.adaptive)
        if not any(poisoners[trigger.kind].on_clean_model(trigger) for trigger in triggers):
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


@takes(SuiteOptions)
@accelerate_state_kept()
def run_suite(given: SuiteOptions) -> ZooTables:
    """Build the zoo of a suite file in `output`, whatever of it is not there; the same call goes on after a stop.

    Several suites may share a zoo: its table keeps the rows of the others.

    Args:
        {arguments}

    Raises:
        UsageError: the suite is wrong, or a finished folder of another suite or a folder that is no zoo is in the way;
            nothing was written.
        RunError: the zoo cannot be written. A model that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `zoo.json` says what was not run.
    """
    zoo = Zoo(load_suite(given.suite or Path()), given)
    if draws(given.progress):
        note(zoo.describe_cost(), shown=True)
    tables: ZooTables = run_tasks(zoo)
    return tables


@takes(SuiteOptions)
@accelerate_state_kept()
def plan_suite(given: SuiteOptions) -> dict[str, Any]:
    """Return which models `run_suite` with these arguments would build, and how long that takes; nothing is written.

    Args:
        {arguments}

    Raises:
        UsageError: as `run_suite` does.
    """
    return Zoo(load_suite(given.suite or Path()), given).plan()
