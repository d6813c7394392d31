"""What hfdetox says while it works: messages, as in `transformers.utils.logging`, and progress bars.

Its modules log to `logging.getLogger(__name__)`. Warnings and worse go to standard error, and not to the handlers of
the root logger. `HFDETOX_VERBOSITY` (debug, info, warning, error or critical) or `set_verbosity` asks for more or less.
Bars are shown unless `HF_HUB_DISABLE_PROGRESS_BARS` or `disable_progress_bars` says otherwise; the variable wins.
"""

from __future__ import annotations

import logging
import os
import sys
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING

_LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
_root = logging.getLogger("hfdetox")
_bars = True


class _StandardError(logging.Handler):
    """Writes to what is standard error at the time, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            write_line(f"hfdetox: {record.levelname.lower()}: {self.format(record)}")


_default = _StandardError()


def _configure() -> None:
    """Set the package's own logger up, once, as far as nobody has configured it before."""
    named = os.environ.get("HFDETOX_VERBOSITY", "" if _root.level else "warning")
    if named:
        _root.setLevel(_LEVELS.get(named.lower(), WARNING))
    if not _root.handlers:
        _root.addHandler(_default)
        _root.propagate = False
    if named and named.lower() not in _LEVELS:
        _root.warning("unknown HFDETOX_VERBOSITY %r; known: %s", named, ", ".join(_LEVELS))


def write_line(text: str) -> None:
    """Write a line to standard error, above the bars that are open."""
    # who has not imported it has drawn none
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        sys.stderr.write(text + "\n")


def disable_default_handler() -> None:
    """Write no messages to standard error; they still reach the handlers that are added to the logger `hfdetox`."""
    _root.removeHandler(_default)


def get_verbosity() -> int:
    """Return the level, one of the standard library's, below which messages are dropped."""
    return _root.getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """Drop messages below a level of the standard library, such as `logging.INFO`."""
    _root.setLevel(level)


def set_verbosity_debug() -> None:
    """Show every message."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Show what is done, warnings and errors."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors, as is the default."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors alone."""
    set_verbosity(ERROR)


def enable_progress_bars() -> None:
    """Show progress bars again, unless `HF_HUB_DISABLE_PROGRESS_BARS` forbids them."""
    global _bars
    _bars = True


def disable_progress_bars() -> None:
    """Show no progress bar in this process from now on, unless `HF_HUB_DISABLE_PROGRESS_BARS` is 0."""
    global _bars
    _bars = False


def are_progress_bars_disabled() -> bool:
    """Return whether progress bars are off for the whole process."""
    said = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper()
    return said in ("1", "ON", "YES", "TRUE") if said else not _bars


class RunWarnings:
    """What a run has to say besides its numbers: shown at once on the main process, and kept for report and card."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.texts:
            self.texts.append(text)
            if is_main_process():
                _root.warning(text)


def is_main_process() -> bool:
    """Return whether this is the process that prints, writes and pushes (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


_configure()
