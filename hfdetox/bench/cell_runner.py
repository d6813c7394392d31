"""Runs cells, each as a process of its own and several at a time: what is there is kept, nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic

from tqdm import tqdm

from hfdetox.bench.cells import CellFolder, CellT, RowT, Running
from hfdetox.errors import UsageError
from hfdetox.progress import progress_bar

_OPEN = ("not run", "failed")  # what is still to be done
_POLL = 0.2  # seconds between two looks at the processes
_PATIENCE = 10.0  # seconds that an interrupted process gets for its last words


class CellRunner(Generic[CellT, RowT]):
    """Runs the cells of a folder that are not there and can be run, `jobs` at a time, in their order."""

    def __init__(self, folder: CellFolder[CellT, RowT], jobs: int, *, progress: bool) -> None:
        self.folder, self.jobs = folder, jobs
        rows = folder.rows
        self.waiting = [cell for name, cell in folder.cells.items()
                        if rows[name].status == "failed" or (rows[name].status == "not run" and not rows[name].reason)
                        ]  # fmt: skip
        self.running: dict[str, Running] = {}
        self.elsewhere: set[str] = set()
        self.progress = progress
        self.bar = progress_bar(folder.title, len(folder.cells), " cells", shown=progress,
                                done=len(folder.cells) - len(self.waiting), keep=True)  # fmt: skip

    def run(self) -> None:
        """Run what is not there; on Ctrl-C the processes are stopped."""
        with self.bar, self._stopping(), interruption() as interrupted:
            while self.waiting or self.running:
                if interrupted():
                    raise KeyboardInterrupt
                moved = [self._advance(cell) for cell in list(self.waiting)] + [self._collect()]
                if not any(moved):
                    time.sleep(_POLL)

    def _advance(self, cell: CellT) -> bool:
        """Start a waiting cell if it can be; return whether it is waiting no longer."""
        if len(self.running) >= self.jobs:
            return False
        obstacle = self.folder.obstacle(cell)
        if obstacle is not None:
            return self._end(cell, self.folder.failed(cell, obstacle))
        if self.folder.later(cell):
            return False
        log = self.folder.claim(cell)
        if log is None:
            if cell.name not in self.elsewhere:
                self.elsewhere.add(cell.name)
                self._say(f"waiting: {cell.name}: another run works on it")
            return False
        try:
            row = self.folder.row(cell)
        except UsageError as error:
            log.close()
            return self._end(cell, self.folder.failed(cell, str(error)))
        failed_there = cell.name in self.elsewhere and row.status == "failed" != self.folder.rows[cell.name].status
        if row.status not in _OPEN or failed_there:
            # another run has finished it, or has seen it fail since this one began
            log.close()
            return self._end(cell, row)
        self.waiting.remove(cell)
        self.running[cell.name] = self.folder.start(cell, log)
        return True

    def _collect(self) -> bool:
        """Take in the processes that have ended; return whether there were any."""
        ended = [name for name, running in self.running.items() if running.process.poll() is not None]
        for name in ended:
            cell = self.folder.cells[name]
            self._end(cell, self._ended(cell, self.running.pop(name)))
        return bool(ended)

    def _ended(self, cell: CellT, running: Running) -> RowT:
        """Return the row of a cell whose process has ended."""
        # locked until all is in order
        with running.log:
            self.folder.tidy(cell, running.process.returncode)
            try:
                row = self.folder.row(cell)
            except UsageError as error:
                return self.folder.failed(cell, str(error))
            if row.status not in _OPEN:
                return row
            reason = self.folder.reason(cell, running.process)
            self.folder.remember(cell, reason)
            return self.folder.failed(cell, reason)

    def _end(self, cell: CellT, row: RowT) -> bool:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.folder.rows[cell.name] = row
        self._say(row.line())
        self.bar.update()
        self.folder.write()
        return True

    def _say(self, line: str) -> None:
        if self.progress:
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


def share_of_cores(jobs: int) -> int:
    """Return the threads of one of `jobs` processes.

    Raises:
        UsageError: no job at all, or a launcher has started several of this process.
    """
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("a suite starts its own processes: give --jobs N instead of a launcher of several")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)
