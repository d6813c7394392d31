"""What hfdetox says while it works: messages, as in `transformers.utils.logging`, and progress bars.

Its modules log to `logging.getLogger(__name__)`. Warnings and worse go to standard error, and not to the handlers of
the root logger. `HFDETOX_VERBOSITY` (debug, info, warning, error or critical) or `set_verbosity` asks for more or less.
Bars are shown unless `HF_HUB_DISABLE_PROGRESS_BARS` or `disable_progress_bars` says otherwise; the variable wins.
"""

import contextlib
import logging
import os
import re
import sys
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING

from hfdetox.errors import one_line

_LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
_root = logging.getLogger("hfdetox")
_bars = True
_LONGEST = 2000  # letters of a line on standard error

MASK = "***"
# a name after a slash is a repository's ("org/hf_…"), not a token
_TOKEN = re.compile(r"(?<![A-Za-z0-9_/])hf_(?:(?:oauth|jwt|app)_[\w.\-]{8,}|[A-Za-z0-9]{16,})")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_SECRET = 8  # masking a shorter value would tear ordinary words out of a message


class _StandardError(logging.Handler):
    """Writes to what is standard error at the time, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            complain(f"{record.levelname.lower()}: {record.getMessage()}")


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


def complain(line: str) -> None:
    """Print one line on standard error, without secrets.

    Every process does: one that fails alone, or first, would take its reason with it.
    """
    rank = "" if is_main_process() else f" (process {os.environ['RANK']})"
    write_line(f"hfdetox{rank}: {mask_secrets(one_line(line, _LONGEST))}")


def write_line(text: str) -> None:
    """Write a line to standard error, above the bars that are open."""
    # who has not imported it has drawn none
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        sys.stderr.write(text + "\n")


def mask_secrets(text: str) -> str:
    """Return `text` with everything that is or looks like a token replaced by `***`."""
    # the longest first: one secret may contain another
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _URL_LOGIN.sub(MASK, _TOKEN.sub(MASK, text))


def _known_secrets() -> set[str]:
    """Return this person's own tokens, whatever their form."""
    secrets = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    # the saved token can be in a message only if the client has been imported
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        # a token that nobody may read is in no message
        with contextlib.suppress(OSError):
            secrets.add(get_token() or "")
    return {secret for secret in (s.strip() for s in secrets) if len(secret) >= _SHORTEST_SECRET}


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


_LONGEST = 2000  # letters of a line on standard error


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
