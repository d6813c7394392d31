"""A folder of tasks, each made by a process of its own and several at a time: what is there is kept.

A task's folder is FOLDER/NAME; beside it NAME.log (what its process said) and NAME.json (the command that it was made
by, and of what). Whether a task is done, failed or not run is read from these alone.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, TypeVar

from hfdetox.arguments import argv
from hfdetox.bench.suite import SuiteFile
from hfdetox.bench.tables import LOCK_SECONDS, Row, Tables, redacted
from hfdetox.bench.tasks import Run, Task
from hfdetox.config_bench import SuiteOptions
from hfdetox.documents import read_json
from hfdetox.errors import HubError, UsageError, located, one_line, refusing
from hfdetox.evidence.cost import spoken
from hfdetox.files import locked, write_atomically
from hfdetox.reporting.report import AttackReport, RunReport
from hfdetox.specs import split_items
from hfdetox.threads import VARIABLE, available_cores
from hfdetox.triggers import TRIGGERS
from hfdetox.values import check_known, read

_TAIL = 1 << 16  # bytes of a log in which the reason is looked for
_ERROR = re.compile(r"hfdetox(?: \(process \d+\))?: error: (.+)")
OPEN = ("not run", "failed")  # what is still to be done


def to_be_made(row: Row) -> bool:
    """Tell whether a task is to be run; what is not run for a reason cannot be."""
    return row["status"] == "failed" or (row["status"] == "not run" and not row["reason"])


TaskT = TypeVar("TaskT", bound=Task | Run)
OptionsT = TypeVar("OptionsT", bound=SuiteOptions)


@dataclass
class Running:
    """The process of a task, and the log it writes, which is locked as long as it lives."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]


class TaskFolder(ABC, Generic[TaskT, OptionsT]):
    """The folder of a suite's tasks, and the state of each.

    Attributes:
        title: what the folder is, in a word.
        word: what a task is, in a word.
        report: what a finished task has in its folder.
        tables: what is made of the rows.
        tasks: by name, in the order in which they are run.
        rows: the table's row of each.

    Raises:
        UsageError: no dataset, no output, or a folder is there that another suite or command made; a launcher has
            started several of this process. Nothing was written.
    """

    title: ClassVar[str]
    word: ClassVar[str]
    report: ClassVar[type[RunReport]]
    tables: ClassVar[type[Tables]]

    def __init__(self, suite: SuiteFile, settings: OptionsT) -> None:
        if settings.output is None:
            raise UsageError(f"a {self.title} is a folder: name it with --output")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("a suite starts its own processes: give --jobs N instead of a launcher of several")
        self.suite, self.settings, self.folder = suite, settings, settings.output
        dataset = settings.dataset or suite.dataset.id
        if dataset is None:
            raise UsageError(f"{suite.file} names no dataset: add one to it, or give --dataset")
        self.dataset = dataset
        self.tasks = {task.name: task for task in self.prepare(suite)}
        self.rows = {name: self.row(task) for name, task in self.tasks.items()}

    @abstractmethod
    def prepare(self, suite: SuiteFile) -> Sequence[TaskT]:
        """Return the tasks; UsageError for what they need that is not there."""

    @abstractmethod
    def argv(self, task: TaskT) -> list[str]:
        """Return the words after `hfdetox` of the task's process."""

    @abstractmethod
    def recorded(self, task: TaskT) -> dict[str, Any]:
        """Return what NAME.json says of a task, which decides whether a folder is that of this very task."""

    @abstractmethod
    def difference(self, task: TaskT, report: Any) -> str | None:
        """Return what a finished task is that is not this one, None where it is."""

    @abstractmethod
    def minutes_of(self, task: TaskT) -> tuple[float, float]:
        """Return how long a task takes, at least and at most.

        Raises:
            UsageError, HubError: that is not known.
        """

    def waiting(self) -> list[TaskT]:
        """Return the tasks that are to be made, in their order."""
        return [self.tasks[name] for name, row in self.rows.items() if to_be_made(row)]

    @cached_property
    def minutes(self) -> tuple[float, float] | None:
        """How long the tasks that are to be made take one after the other, at least and at most; None where unknown."""
        # what is wrong with a model or the images each task says
        with contextlib.suppress(UsageError, HubError):
            pairs = [self.minutes_of(task) for task in self.waiting()]
            return sum(least for least, _ in pairs), sum(most for _, most in pairs)
        return None

    def describe_cost(self) -> str:
        """Return how long the tasks that are to be made take, in words."""
        tasks = len(self.waiting())
        if not tasks:
            return f"nothing is to be {'built' if self.word == 'model' else 'run'}"
        how = "how long is not known" if self.minutes is None else f"about {spoken(*self.minutes)}"
        return f"{tasks} {self.word}{'s' if tasks > 1 else ''}: {how}"

    def plan(self) -> dict[str, Any]:
        """Return what is to be made, and how long that takes; nothing is written."""
        waiting = [task.name for task in self.waiting()]
        left = {name: row["reason"] for name, row in self.rows.items() if row["status"] == "not run" and row["reason"]}
        cost = {} if (minutes := self.minutes) is None else {"minutes": [round(one, 2) for one in minutes]}
        return {"dataset": self.dataset, f"{self.word}s": waiting, "done": len(self.rows) - len(waiting) - len(left),
                "cannot be run": left, **cost, "time": self.describe_cost(),
                "output": str(self.folder)}  # fmt: skip

    def missing(self, task: TaskT) -> str | None:
        """Return why a task cannot be run, None where it can."""
        return None

    def row(self, task: TaskT) -> Row:
        """Return a task as it lies in the folder: finished, `failed`, or `not run`, with the reason where it cannot be.

        Raises:
            UsageError: its folder was made by another command or of something else, or its report cannot be read.
        """
        folder, again = self.folder / task.name, "remove the folder to make it again"
        file = folder / self.report.NAME
        if not file.is_file():
            if missing := self.missing(task):
                return self.tables.row(task, reason=missing)
            failed = self.failed_before(task)
            return self.tables.row(task, "failed" if failed else "not run", failed)
        with located(f"{file} cannot be read, {again}"):
            report = self.report.load(folder)
        if wrong := self.difference(task, report):
            raise UsageError(f"{folder} is a finished {wrong}; it is not replaced: choose another --output, or {again}")
        with refusing(f"{file} cannot be used, {again}"):
            return self.tables.row(task, report=report)

    def outcome(self) -> Any:
        """Return the rows as this run knows them."""
        return self.tables(self.folder, self.suite.file.name, list(self.rows.values()))

    def needs(self, task: TaskT) -> str | None:
        """Return the name of the task that has to be done before this one."""
        return None

    def how(self) -> dict[str, Any]:
        """Return what NAME.json says besides what a task is: how it is run."""
        return {}

    def tidy(self, task: TaskT, returncode: int) -> None:
        """Put in order what the process of a task has left, which ended with `returncode`."""

    def finish(self) -> None:
        """Make what is made of all rows."""

    def options(self, first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
        """Return the options of a task's command: the images, what is `first`, how they are read, and what is `last`.

        What an option of `last` says is not said before; a revision is that of the suite's own dataset.
        """
        read = vars(replace(self.suite.dataset, id=None, **({"revision": None} if self.settings.dataset else {})))
        read = {"dataset-revision" if name == "revision" else name.replace("_", "-"): value
                for name, value in read.items()}  # fmt: skip
        read = {name: value for name, value in read.items() if name not in last}
        return argv(
            {"dataset": self.dataset, **first, **read, **last, "precision": self.settings.changed().get("precision")}
        )

    def place(self, task: TaskT) -> list[str]:
        """Return the words that say where a task is run and where its result goes."""
        return argv({"output": self.folder / task.name, "device": self.settings.changed().get("device")})

    def claim(self, task: TaskT) -> IO[bytes] | None:
        """Return the task's log, locked, or None where another run works on the task.

        The lock is the kernel's: it ends with the last process that holds it, the task's own included.
        """
        place = self.beside(task, "log")
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def start(self, task: TaskT, log: IO[bytes]) -> Running:
        """Start the process of a task whose `log` has been claimed.

        It has a session of its own, so that Ctrl-C comes to it once, from the run that started it.
        """
        words = self.argv(task)
        self.record(task)
        log.truncate(0)
        log.write(f"$ {shlex.join(['hfdetox', *words])}\n".encode())
        log.flush()
        threads = {VARIABLE: str(max(1, int(available_cores() / self.settings.jobs)))}
        process = subprocess.Popen([sys.executable, "-m", "hfdetox", *words], env={**threads, **os.environ},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
        return Running(process, log)

    def record(self, task: TaskT, failed: str | None = None) -> None:
        """Write NAME.json; why a task failed stays in it, and the task failed in the tables, until it is done."""
        failed = failed or self.failed_before(task)
        content = {**self.recorded(task), **self.how(), **({} if failed is None else {"failed": failed})}
        write_atomically(self.beside(task, "json"), json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def made(self, task: TaskT) -> dict[str, Any]:
        """Return the content of NAME.json, nothing where there is none that can be read."""
        with contextlib.suppress(UsageError):
            found = read_json(self.beside(task, "json"), dict[str, Any])
            check_known("", found, {"failed": str, "device": str})
            # an earlier version wrote paths that are within a word
            return {**found, "command": redacted(read("command", list[str], found.get("command", [])))}
        return {}

    def same(self, task: TaskT) -> bool:
        """Tell whether NAME.json is of this very task."""
        made = self.made(task)
        return all(made.get(key) == value for key, value in self.recorded(task).items())

    def failed_before(self, task: TaskT) -> str | None:
        """Return why the task failed when it was run last, None where it did not."""
        return self.made(task).get("failed") if self.same(task) else None

    def reason(self, task: TaskT, process: subprocess.Popen[bytes]) -> str:
        """Return why a process that has ended came to nothing, one line: its error, its signal or its last words."""
        log = self.beside(task, "log")
        said = log.read_bytes()[-_TAIL:].decode(errors="replace").split("\n", 1)[-1].splitlines()
        errors = [match[1] for match in map(_ERROR.match, said) if match]
        if errors:
            return one_line(errors[-1])
        if process.returncode < 0:
            return f"killed by {signal.Signals(-process.returncode).name}; see {log}"
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return f"exit status {process.returncode}: {one_line(last)}; see {log}"

    def beside(self, task: TaskT, ending: str) -> Path:
        """Return the path of NAME.ENDING."""
        return self.folder / f"{task.name}.{ending}"

    def write(self) -> None:
        """Write the tables; what another run has done meanwhile is in them too."""
        with locked(self.folder, self.folder, wait=LOCK_SECONDS):
            replace(self.outcome(), rows=[self._newest(row) for row in self.rows.values()]).write()

    def _newest(self, row: Row) -> Row:
        with contextlib.suppress(UsageError):
            found = row if row["status"] not in OPEN else self.row(self.tasks[row["name"]])
            return row if found["status"] == "not run" else found
        return row


def given_files(specs: Sequence[str]) -> Iterator[Path]:
    """Yield the trigger files and pictures that specifications name."""
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if spec.endswith(".safetensors"):
            yield Path(spec)
        else:
            pairs = [item.partition("=") for item in split_items(spec, rest)]
            yield from (Path(value) for key, _, value in pairs if key in TRIGGERS[kind].tensor_fields())


def weights_of(folder: Path) -> str | None:
    """Return the SHA-256 of the weights that an attack's report names, None where there is no such report."""
    with contextlib.suppress(UsageError):
        return AttackReport.load(folder).output.weights_sha256
    return None
