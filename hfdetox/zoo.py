"""Builds the zoo of a suite: every cell by a process of its own, what is there is kept, what failed is shown."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from hfdetox.errors import RunError, UsageError
from hfdetox.progress import LOG_SECONDS
from hfdetox.suite import Cell
from hfdetox.suite_file import load_suite
from hfdetox.zoo_folder import Place, Running, Zoo
from hfdetox.zoo_table import Row, SuiteOutcome, check_place, row_of

_POLL = 0.2  # seconds between two looks at the processes
_PATIENCE = 10.0  # seconds that an interrupted process gets for its last words


class Builder:
    """Runs the cells of a zoo that are not there, `jobs` at a time, each after the clean model it is made on."""

    def __init__(self, zoo: Zoo, jobs: int, *, progress: bool) -> None:
        self.zoo, self.jobs = zoo, jobs
        self.waiting = [cell for name, cell in zoo.cells.items() if zoo.rows[name].status == "not run"]
        self.running: dict[str, Running] = {}
        self.elsewhere: set[str] = set()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=len(zoo.cells), initial=len(zoo.cells) - len(self.waiting), desc="zoo", unit=" cells",
                        dynamic_ncols=terminal, mininterval=0.1 if terminal else LOG_SECONDS,
                        disable=not progress)  # fmt: skip

    def run(self) -> None:
        """Build what is not there; on Ctrl-C the processes are stopped."""
        with self.bar, self._stopping(), interruption() as interrupted:
            while self.waiting or self.running:
                if interrupted():
                    raise KeyboardInterrupt
                moved = [self._advance(cell) for cell in list(self.waiting)] + [self._collect()]
                if not any(moved):
                    time.sleep(_POLL)

    def _advance(self, cell: Cell) -> bool:
        """Start a waiting cell if it can be; return whether it is waiting no longer."""
        if len(self.running) >= self.jobs:
            return False
        control = self.zoo.surrogate(cell)
        if control is not None:
            status = self.zoo.rows[control].status
            if status == "failed":
                return self._end(cell, row_of(cell, "failed", reason=f"its clean model {control} failed"))
            if status == "not run":
                return False
        log = self.zoo.claim(cell)
        if log is None:
            if cell.name not in self.elsewhere:
                self.elsewhere.add(cell.name)
                self._say(f"waiting: {cell.name}: another run works on it")
            return False
        try:
            row = self.zoo.row(cell)
        except UsageError as error:
            row = row_of(cell, "failed", reason=str(error))
        if row.status != "not run":
            # another run has finished it
            log.close()
            return self._end(cell, row)
        self.waiting.remove(cell)
        self.running[cell.name] = self.zoo.start(cell, log)
        return True

    def _collect(self) -> bool:
        """Take in the processes that have ended; return whether there were any."""
        ended = [name for name, running in self.running.items() if running.process.poll() is not None]
        for name in ended:
            cell = self.zoo.cells[name]
            self._end(cell, self.zoo.ended(cell, self.running.pop(name)))
        return bool(ended)

    def _end(self, cell: Cell, row: Row) -> bool:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.zoo.rows[cell.name] = row
        self._say(row.line())
        self.bar.update()
        outcome(self.zoo).write()
        return True

    def _say(self, line: str) -> None:
        if not self.bar.disable:
            tqdm.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Leave no process behind, however the block ends."""
        try:
            yield
        finally:
            processes = [running.process for running in self.running.values()]
            try:
                for process in processes:
                    process.send_signal(signal.SIGINT)
                deadline = time.monotonic() + _PATIENCE
                while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                    time.sleep(_POLL)
            finally:
                # who presses Ctrl-C twice does not want to wait
                for process in processes:
                    if process.poll() is None:
                        # its workers as well, which hold the log's lock too
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C or a termination has come; nothing is torn apart in the middle by it.

    An exception out of a process's start would leave that process behind. A terminal that is closed counts too, unless
    nohup has it ignored: its signal does not reach the cells, which have sessions of their own. Threads other than the
    main one cannot catch signals and are told of none.
    """
    come: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    earlier = {number: signal.signal(number, lambda got, frame: come.append(got)) for number in numbers}
    try:
        yield lambda: bool(come)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def outcome(zoo: Zoo) -> SuiteOutcome:
    """Return the zoo's rows as they are now."""
    return SuiteOutcome(zoo.place.output, list(zoo.rows.values()))


def run_suite(file: Path, *, output: Path, dataset: str | None = None, jobs: int = 1, precision: str = "auto",
              device: str = "auto", progress: bool = False) -> SuiteOutcome:  # fmt: skip
    """Build the zoo of a suite file in `output`, whatever of it is not there; the same call goes on after a stop.

    Several suites may share a zoo: its table keeps the rows of the others.

    Args:
        dataset: Hub id or folder, in place of the suite's.
        jobs: processes at a time; each gets its share of the cores unless OMP_NUM_THREADS is set.
        precision: as `--precision` takes it.
        device: as `--device` takes it.
        progress: say on standard error how each cell ended, and draw a bar.

    Raises:
        UsageError: the suite is wrong, or a finished folder of another suite or a folder that is no zoo is in the way;
            nothing was written.
        RunError: the zoo cannot be written. A cell that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `zoo.json` says what was not run.
    """
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("a suite starts its own processes: give --jobs N instead of a launcher of several")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    place = Place(output=output, dataset=dataset, precision=precision, device=device, threads=threads)
    zoo = Zoo(load_suite(file), place)
    try:
        check_place(output)
        output.mkdir(parents=True, exist_ok=True)
        outcome(zoo).write()
        Builder(zoo, jobs, progress=progress).run()
    except OSError as error:
        raise RunError(f"cannot build the zoo in {output}: {error.strerror or error}") from error
    return outcome(zoo)
