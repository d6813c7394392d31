"""What came of a suite's tasks: one row each, as JSON, Markdown and CSV and on a terminal."""

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox.documents import read_json
from hfdetox.errors import UsageError, one_line
from hfdetox.files import locked, write_atomically
from hfdetox.reporting.card import templates
from hfdetox.specs import redact_paths

LOCK_SECONDS = 60.0  # that a run waits for another to write its tables
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


# A task and what came of it, as the JSON file holds it:
#     name: the task's folder.
#     status: `done`, `failed` or `not run`, and of an attack `did not take`: finished, but it missed its goal.
#     reason: why it failed or cannot be run, one line; else None.
# and besides what the suite says of it, and what its report says: None unless it is finished.
Row = dict[str, Any]


@dataclass(frozen=True)
class Tables(ABC):
    """What a run over a suite came to: one row a task, in the order in which they are run.

    Attributes:
        folder: where they are, and the tables of them.
        suite: the name of the suite's file.
    """

    title: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    folder: Path
    suite: str
    rows: Sequence[Row]

    @property
    def exit_status(self) -> int:
        """0 when every task is done, 1 when one failed, missed its goal or was not run."""
        return int(any(row["status"] != "done" for row in self.rows))

    def summary(self) -> str:
        """Return how many tasks came to what, on one line."""
        counts = Counter(row["status"] for row in self.rows)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    @staticmethod
    @abstractmethod
    def row(task: Any, status: str = "not run", reason: str | None = None, report: Any = None) -> Row:
        """Return a task's row; of a finished one with what its report says."""

    @staticmethod
    @abstractmethod
    def numbers(row: Row) -> list[str]:
        """Return what was measured, in words; nothing unless the task is finished."""

    @classmethod
    def line(cls, row: Row) -> str:
        """Return what is said when the task ends, such as `done: cell/ft-s0: ACC 91.0 %, ASR 3.0 %, DER 96.1 %, …`."""
        said = ", ".join(cls.numbers(row)) or row["reason"]
        return f"{row['status']}: {row['name']}" + (f": {said}" if said else "")

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """Return the content of the JSON file."""

    @abstractmethod
    def texts(self) -> dict[str, str]:
        """Return the contents of the files beside it, by name."""

    def rendered(self, template: str, **values: Any) -> str:
        """Return Markdown that one of the templates of `cards/` makes of these rows."""
        return templates().get_template(template).render(tables=self, **values)

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
        if not file.exists():
            return None
        try:
            document = read_json(file, dict[str, Any])
            if not isinstance(document["hfdetox_version"], str):
                raise TypeError("hfdetox_version")
            return self.read(document)
        except (UsageError, LookupError, TypeError, AttributeError) as error:
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
            what = f"{one_line(foreign[0])}, and no {self.files[0]}"
            raise UsageError(f"--output {self.folder} holds something else than this {self.title} ({what}); choose "
                             "another folder")  # fmt: skip
        self.earlier()


def shown(value: Any, form: str = "") -> str:
    """Return a value as a table shows it; one that is not known is a dash."""
    return "–" if value is None else format(value, form)


def at_path(found: Any, path: str) -> Any:
    """Return what lies in plain JSON types under keys with points between, None where nothing does; `*` is the mean."""
    first, _, rest = path.partition(".")
    if first == "*":
        values = [at_path(value, rest) for value in found.values()]
        return sum(values) / len(values) if values and None not in values else None
    inner = found[int(first)] if isinstance(found, list | tuple) else found.get(first)
    return at_path(inner, rest) if rest and inner is not None else inner


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
