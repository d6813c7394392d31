"""A folder of cells, each made by a process of its own: what is there, what was asked for, who works on it.

A cell's folder is FOLDER/NAME; beside it NAME.log (what its process said) and NAME.json (the command that it was made
by, and of what).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Protocol, TypeVar

from hfdetox.reporting.markdown import one_line

_TAIL = 1 << 16  # bytes of a log in which the reason is looked for
_ERROR = re.compile(r"hfdetox(?: \(process \d+\))?: error: (.+)")


class Named(Protocol):
    """A cell: what it is, under the name of its folder."""

    @property
    def name(self) -> str: ...


class State(Protocol):
    """A cell's row of the table; `status` is `not run` until something came of it, `reason` why it cannot be run."""

    @property
    def status(self) -> str: ...

    @property
    def reason(self) -> str | None: ...

    def line(self) -> str: ...


CellT = TypeVar("CellT", bound=Named)
RowT = TypeVar("RowT", bound=State)


@dataclass
class Running:
    """The process of a cell, and the log it writes, which is locked as long as it lives."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]


class CellFolder(ABC, Generic[CellT, RowT]):
    """The folder, and the state of every cell.

    Attributes:
        title: what the folder is, in a word.
        folder: where it is.
        threads: of one process, None leaves them to the environment.
        cells: by name, in the order in which they are run.
        rows: the table's row of each.
    """

    title: ClassVar[str]
    folder: Path
    threads: int | None
    cells: dict[str, CellT]
    rows: dict[str, RowT]

    @abstractmethod
    def row(self, cell: CellT) -> RowT:
        """Return a cell as it lies in the folder; UsageError when what is there was not made for it."""

    @abstractmethod
    def failed(self, cell: CellT, reason: str) -> RowT:
        """Return the row of a cell that failed."""

    @abstractmethod
    def words(self, cell: CellT) -> list[str]:
        """Return the words after `hfdetox` of the cell's process."""

    @abstractmethod
    def recorded(self, cell: CellT) -> dict[str, Any]:
        """Return what NAME.json says of a cell."""

    @abstractmethod
    def write(self) -> None:
        """Write the table with the rows as they are now."""

    def obstacle(self, cell: CellT) -> str | None:
        """Return why a cell can never be run, None if nothing is in the way; see `later`."""
        return None

    def later(self, cell: CellT) -> bool:
        """Return whether a cell has to wait for another."""
        return False

    def tidy(self, cell: CellT, returncode: int) -> None:
        """Put in order what the process of a cell has left, which ended with `returncode`."""

    def remember(self, cell: CellT, reason: str) -> None:
        """Keep why a cell failed, for a table that is made before it is run again."""

    def extras(self, cell: CellT) -> dict[str, Any]:
        """Return what NAME.json says besides what a cell is: how it is run, and what came of it before."""
        return {}

    def claim(self, cell: CellT) -> IO[bytes] | None:
        """Return the cell's log, locked, or None where another run works on the cell.

        The lock is the kernel's: it ends with the last process that holds it, the cell's own included.
        """
        place = self.beside(cell, "log")
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def start(self, cell: CellT, log: IO[bytes]) -> Running:
        """Start the process of a cell whose `log` has been claimed.

        It has a session of its own, so that Ctrl-C comes to it once, from the run that started it.
        """
        words = self.words(cell)
        self.record(cell, self.extras(cell))
        log.truncate(0)
        log.write(f"$ {shlex.join(['hfdetox', *words])}\n".encode())
        log.flush()
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        process = subprocess.Popen([sys.executable, "-m", "hfdetox", *words], env={**threads, **os.environ},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
        return Running(process, log)

    def record(self, cell: CellT, extras: Mapping[str, Any]) -> None:
        """Write NAME.json."""
        text = json.dumps({**self.recorded(cell), **extras}, indent=2, ensure_ascii=False) + "\n"
        self.beside(cell, "json").write_text(text, encoding="utf-8")

    def made(self, cell: CellT) -> Any:
        """Return the content of NAME.json, None where there is none that can be read."""
        try:
            return json.loads(self.beside(cell, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def reason(self, cell: CellT, process: subprocess.Popen[bytes]) -> str:
        """Return why a process that has ended came to nothing, one line: its error, its signal or its last words."""
        log = self.beside(cell, "log")
        said = log.read_bytes()[-_TAIL:].decode(errors="replace").split("\n", 1)[-1].splitlines()
        errors = [match[1] for match in map(_ERROR.match, said) if match]
        if errors:
            return one_line(errors[-1])
        if process.returncode < 0:
            return f"killed by {signal.Signals(-process.returncode).name}; see {log}"
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return f"exit status {process.returncode}: {one_line(last)}; see {log}"

    def beside(self, cell: CellT, ending: str) -> Path:
        """Return the path of NAME.ENDING."""
        return self.folder / f"{cell.name}.{ending}"


def portable(words: Sequence[str]) -> list[str]:
    """Return a command without where on this machine things lie: paths by their last part."""
    return [Path(word).resolve().name if os.sep in word and (Path(word).is_absolute() or Path(word).exists()) else word
            for word in words]  # fmt: skip
