"""The progress bars of long work: one function makes them all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from hfdetox.logging import are_progress_bars_disabled, is_main_process, write_line

# a log file gets a line now and then instead of a redrawn one
LOG_SECONDS = 15.0


def progress_bar(title: str, total: int | None, unit: str, *, shown: bool, done: int = 0,
                 keep: bool = False) -> tqdm[Any]:  # fmt: skip
    """Return a bar over `total` units on standard error, of the main process only.

    Args:
        shown: False shows none, whatever else is set.
        keep: leave it on the screen when it is closed.
    """
    terminal = sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=title, unit=unit, leave=keep, dynamic_ncols=terminal,
                mininterval=0.1 if terminal else LOG_SECONDS, delay=0 if terminal else LOG_SECONDS,
                disable=not draws(shown))  # fmt: skip


def draws(shown: bool) -> bool:
    """Return whether bars are drawn, and notes written: in the main process, unless they are turned off."""
    return shown and not are_progress_bars_disabled() and is_main_process()


def note(text: str, *, shown: bool) -> None:
    """Write a line on standard error where bars are drawn."""
    if draws(shown):
        write_line(text)


def updates(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """Return a function of (done, total) that moves a bar."""

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return update
