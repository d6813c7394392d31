"""Runs tasks, each as a process of its own and several at a time: nothing is left running."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic

from tqdm import tqdm

from hfdetox.bench.folder import OPEN, Running, TaskFolder, TaskT, to_be_made
from hfdetox.bench.tables import Row
from hfdetox.errors import RunError, UsageError, on_disk
from hfdetox.progress import progress_bar

_POLL = 0.2  # seconds between two looks at the processes
_PATIENCE = 10.0  # seconds that an interrupted process gets for its last words


def run_tasks(folder: TaskFolder[Any, Any]) -> Any:
    """Run what is not there in a folder of tasks; return its tables.

    Raises:
        UsageError: something else is in the folder.
        RunError: it cannot be written. A task that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and the tables say what was not run.
    """
    with on_disk(f"write the {folder.title} {folder.folder}"):
        folder.outcome().check_place(folder.tasks)
        folder.folder.mkdir(parents=True, exist_ok=True)
        folder.write()
        try:
            TaskRunner(folder).run()
        except BaseException:
            # what goes wrong with the rest hides nothing
            with contextlib.suppress(RunError, OSError):
                folder.finish()
            raise
        folder.finish()
        return folder.outcome()


class TaskRunner(Generic[TaskT]):
    """Runs the tasks of a folder that are not there and can be run, so many at a time, in their order."""

    def __init__(self, folder: TaskFolder[TaskT, Any]) -> None:
        self.folder, self.settings = folder, folder.settings
        self.waiting = {name: folder.tasks[name] for name, row in folder.rows.items() if to_be_made(row)}
        self.running: dict[str, Running] = {}
        self.elsewhere: set[str] = set()
        self.bar = progress_bar(folder.title, len(folder.tasks), " cells", shown=self.settings.progress,
                                done=len(folder.tasks) - len(self.waiting), keep=True)  # fmt: skip

    def run(self) -> None:
        """Run what is not there; on Ctrl-C the processes are stopped."""
        with self.bar, contextlib.ExitStack() as last:
            last.callback(self._stop)
            interrupted = last.enter_context(interruption())
            while self.waiting or self.running:
                if interrupted():
                    raise KeyboardInterrupt
                moved = [self._advance(task) for task in list(self.waiting.values())] + [self._collect()]
                if not any(moved):
                    time.sleep(_POLL)

    def _advance(self, task: TaskT) -> bool:
        """Start a waiting task if it can be; return whether it is waiting no longer."""
        needed, rows = self.folder.needs(task), self.folder.rows
        if len(self.running) >= self.settings.jobs or needed in self.waiting or needed in self.running:
            return False
        if needed is not None and rows[needed]["status"] == "failed":
            return self._end(self.folder.tables.row(task, "failed", f"its clean model {needed} failed"))
        log = self.folder.claim(task)
        if log is None:
            if task.name not in self.elsewhere:
                self.elsewhere.add(task.name)
                self._say(f"waiting: {task.name}: another run works on it")
            return False
        row, final = self._row(task)
        if final or (task.name in self.elsewhere and row["status"] == "failed" != rows[task.name]["status"]):
            # another run has finished it, or has seen it fail since this one began
            log.close()
            return self._end(row)
        self.running[task.name] = self.folder.start(self.waiting.pop(task.name), log)
        return True

    def _collect(self) -> bool:
        """Take in the processes that have ended; return whether there were any."""
        ended = [name for name, running in self.running.items() if running.process.poll() is not None]
        for name in ended:
            task, running = self.folder.tasks[name], self.running.pop(name)
            # locked until all is in order
            with running.log:
                self.folder.tidy(task, running.process.returncode)
                row, final = self._row(task)
                if not final:
                    row = self.folder.tables.row(task, "failed", self.folder.reason(task, running.process))
                    self.folder.record(task, row["reason"])
            self._end(row)
        return bool(ended)

    def _row(self, task: TaskT) -> tuple[Row, bool]:
        """Return the row of a task as it lies in the folder, and whether it is not to be run (again)."""
        try:
            row = self.folder.row(task)
        except UsageError as error:
            return self.folder.tables.row(task, "failed", str(error)), True
        return row, row["status"] not in OPEN

    def _end(self, row: Row) -> bool:
        self.waiting.pop(row["name"], None)
        self.folder.rows[row["name"]] = row
        self._say(self.folder.tables.line(row))
        self.bar.update()
        self.folder.write()
        return True

    def _say(self, line: str) -> None:
        if self.settings.progress:
            tqdm.write(line, file=sys.stderr)

    def _stop(self) -> None:
        """Leave no process behind."""
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
    nohup has it ignored: its signal does not reach the tasks, which have sessions of their own. Threads other than the
    main one cannot catch signals and are told of none.
    """
    come: list[int] = []
    numbers = []
    if threading.current_thread() is threading.main_thread():
        closed = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        numbers = [signal.SIGINT, signal.SIGTERM, *closed]
    earlier = {number: signal.signal(number, lambda got, frame: come.append(got)) for number in numbers}
    try:
        yield lambda: bool(come)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
