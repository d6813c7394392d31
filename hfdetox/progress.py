"""The progress bar of long work: on standard error, of the main process only."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

# a log file gets a line now and then instead of a redrawn one
LOG_SECONDS = 15.0


def progress_bar(title: str, total: int, unit: str, accelerator: Accelerator, *, shown: bool, done: int = 0,
                 keep: bool = False) -> tqdm[Any]:  # fmt: skip
    """Return a bar over `total` units; `keep` leaves it on the screen when it is closed."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=title, unit=unit, leave=keep, dynamic_ncols=terminal,
                mininterval=0.1 if terminal else LOG_SECONDS, delay=0 if terminal else LOG_SECONDS,
                disable=not (shown and accelerator.is_main_process))  # fmt: skip
