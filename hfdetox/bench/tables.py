"""What came of a suite's tasks: one row each, as JSON, Markdown and CSV and on a terminal; those of the bench."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.config import redact_paths
from hfdetox.errors import UsageError
from hfdetox.evaluation.results import Measurement
from hfdetox.evaluation.verdict import percent
from hfdetox.files import locked, write_atomically
from hfdetox.reporting import markdown
from hfdetox.reporting.report import Report

LOCK_SECONDS = 60.0  # that a run waits for another to write its tables
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Row:
    """A task and what came of it.

    Attributes:
        name: the task's folder.
        status: `done`, `failed` or `not run`, and of an attack `did not take`: finished, but it missed its goal.
        reason: why it failed or cannot be run, one line.
    """

    name: str
    status: str
    reason: str | None

    def numbers(self) -> list[str]:
        """Return what was measured, in words; nothing unless it is finished."""
        raise NotImplementedError

    def line(self) -> str:
        """Return what is said when the task ends, such as `done: cell/ft-s0: ACC 91.0 %, ASR 3.0 %, DER 96.1 %, …`."""
        said = ", ".join(self.numbers()) or self.reason
        return f"{self.status}: {self.name}" + (f": {said}" if said else "")


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Tables(ABC, Generic[RowT]):
    """What a run over a suite came to: one row a task, in the order in which they are run.

    Attributes:
        folder: where they are, and the tables of them.
        suite: the name of the suite's file.
    """

    title: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    folder: Path
    suite: str
    rows: Sequence[RowT]

    @property
    def exit_status(self) -> int:
        """0 when every task is done, 1 when one failed, missed its goal or was not run."""
        return int(any(row.status != "done" for row in self.rows))

    def summary(self) -> str:
        """Return how many tasks came to what, on one line."""
        return ", ".join(f"{count} {status}" for status, count in Counter(row.status for row in self.rows).items())

    @staticmethod
    @abstractmethod
    def row(task: Any, status: str = "not run", reason: str | None = None, report: Any = None) -> Any:
        """Return a task's row; of a finished one with what its report says."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """Return the content of the JSON file."""

    @abstractmethod
    def texts(self) -> dict[str, str]:
        """Return the contents of the files beside it, by name."""

    @abstractmethod
    def read(self, document: Any) -> Any:
        """Return what is asked of an earlier JSON file; KeyError or TypeError for one that is none."""

    def whole(self) -> Self:
        """Return what is to be written: also what the files that are there say of other suites."""
        return self

    def write(self) -> None:
        """Write the files, each whole or not at all.

        Raises:
            UsageError: the JSON file that is there is none of hfdetox, or another run holds the folder for long.
            RunError: they cannot be written.
        """
        with locked(self.folder, self.folder, wait=LOCK_SECONDS):
            whole = self.whole()
            text = json.dumps(whole.document(), indent=2, ensure_ascii=False) + "\n"
            for name, content in {self.files[0]: text, **whole.texts()}.items():
                write_atomically(self.folder / name, content)

    def earlier(self) -> Any:
        """Return what `read` makes of the JSON file that is there, None without one; UsageError if it is not ours."""
        file = self.folder / self.files[0]
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(document["hfdetox_version"], str):
                raise TypeError("hfdetox_version")
            return self.read(document)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} is no table that this hfdetox reads ({error!r}); choose another --output, or "
                             "remove the file: what was made beside it is kept") from error  # fmt: skip

    def check_place(self, tasks: Collection[str]) -> None:
        """Raise UsageError unless `tasks` may be run in the folder: one missing or empty, or of the same kind.

        A folder without the JSON file will do where nothing is in it but folders of these tasks, and tables to be made
        again.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--output {self.folder} is a file; name a folder for the {self.title}")
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        foreign = sorted(name for name in there - {task.split("/")[0] for task in tasks} - set(self.files)
                         if not name.startswith("."))  # fmt: skip
        if foreign and self.files[0] not in there:
            what = f"{markdown.one_line(foreign[0])}, and no {self.files[0]}"
            raise UsageError(f"--output {self.folder} holds something else than this {self.title} ({what}); choose "
                             "another folder")  # fmt: skip
        self.earlier()


def shown(value: Any, form: str = "") -> str:
    """Return a value as a table shows it; one that is not known is a dash."""
    return "–" if value is None else format(value, form)


def redacted(argv: Sequence[str]) -> list[str]:
    """Return a command without where on this machine things lie."""
    return [redact_paths(word).removeprefix("./") if os.sep in word else word for word in argv]


def rich_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str], *,
               title: str = "", caption: str = "") -> Table:  # fmt: skip
    """Return a table for the terminal; the columns `left` are texts."""
    # Text, not markup: a name may be "[red]"
    table = Table(box=SIMPLE, title=title and Text(title), caption=caption and Text(caption), title_justify="left",
                  caption_justify="left")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as CSV; a cell that a spreadsheet would run is text."""

    def safe(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

    return pd.DataFrame(rows, dtype=object).map(safe).to_csv(index=False, lineterminator="\n")


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    texts = (" | ".join(map(markdown.text, cells)) for cells in rows)
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(f"| {text} |" for text in texts)]


@dataclass(frozen=True, kw_only=True)
class BenchRow(Row):
    """One run of a defense and what came of it; the numbers are None unless it is done. Rates are fractions in [0, 1].

    Attributes:
        subject: the model it was run on; `model` and `attack` say what that is.
        defense: the suite's name of the defense; `method` is the defense's own, with all of its settings.
        dataset: of a finished run the id, of a folder the last part; `clean_images` and `eval_images` are counts.
        clean: whether the model is a clean baseline, which is in no average over attacks.
        attack_success_before: mean over the model's triggers, None for a model without; so are those after it.
        der: defense effectiveness rating, mean over the triggers, with its 95 % interval over images.
        worst_class_before: lowest accuracy of a class.
        spread_before: standard deviation of the accuracies over the classes.
        seconds: of the method alone, without measuring.
        peak_memory: bytes, see the report.
    """

    name: str
    subject: str
    model: str
    attack: str
    defense: str
    samples: int | float
    seed: int
    clean: bool = False
    status: str = "not run"
    reason: str | None = None
    method: str | None = None
    settings: dict[str, Any] | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    attack_success_before: float | None = None
    attack_success: float | None = None
    robust_accuracy_before: float | None = None
    robust_accuracy: float | None = None
    der: float | None = None
    der_low: float | None = None
    der_high: float | None = None
    worst_class_before: float | None = None
    worst_class: float | None = None
    spread_before: float | None = None
    spread: float | None = None
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    precision: str | None = None
    device: str | None = None
    dataset: str | None = None
    clean_images: int | None = None
    eval_images: int | None = None

    def measured(self, report: Report) -> Self:
        """Return the row of the finished run with what its report says."""
        if report.before is None or report.after is None:
            return self
        defense, dataset = report.defense, report.dataset
        rates: dict[str, Any] = {f"{key}_before": value for key, value in _rates(report.before).items()} | _rates(
            report.after
        )
        if report.defense_effectiveness_rating is not None:
            rating = report.defense_effectiveness_rating["mean"]
            rates |= {"der": rating.value, "der_low": rating.interval[0], "der_high": rating.interval[1]}
        run = {key: getattr(defense, key) for key in ("epochs", "steps", "seconds", "images_per_second", "peak_memory",
                                                      "precision")}  # fmt: skip
        return replace(self, status="done", method=defense.name, settings=defense.parameters, **rates, **run,
                       device=", ".join(defense.devices), dataset=redacted([str(dataset.id)])[0],
                       clean_images=dataset.clean_samples, eval_images=dataset.eval_samples)  # fmt: skip

    def numbers(self) -> list[str]:
        """Return the rates after the defense, and its seconds."""
        rates = {"ACC": self.accuracy, "ASR": self.attack_success, "DER": self.der}
        found = [f"{name} {percent(rate)}" for name, rate in rates.items() if rate is not None]
        return found if self.seconds is None else [*found, f"{self.seconds:,.0f} s"]


def _rates(state: Measurement) -> dict[str, float]:
    """Return the rates of a measurement, those of triggers as their mean."""
    found, results = {"accuracy": state.accuracy.value}, list(state.triggers.values())
    if results:
        found["attack_success"] = sum(r.attack_success_rate.value for r in results) / len(results)
        found["robust_accuracy"] = sum(r.robust_accuracy.value for r in results) / len(results)
    if state.classes is not None:
        found |= {"worst_class": state.classes.worst.value, "spread": state.classes.spread}
    return found
