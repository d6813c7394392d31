"""The errors a person can act on; each carries the exit status of the command line's contract."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# white space, what moves the cursor or turns the writing around on a terminal, and halves of characters
_CONTROL = re.compile("[\\s\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
_LONGEST = 1000  # letters of an error's line
# of one that repeats what a stranger wrote, and of this at least so many
_STRANGERS, _LEAST = 290, 60


class HfdetoxError(Exception):
    """Base of every error whose message is meant for the person who runs hfdetox.

    The message is one line that says what is wrong and what to do; of a longer one the middle is left out.
    """

    exit_status = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message, _LONGEST))


class RunError(HfdetoxError, RuntimeError):
    """The run was possible but failed (loss not finite, disk full, broken image, accuracy near chance)."""


class UsageError(HfdetoxError, ValueError):
    """It cannot be run as asked (options, sizes, labels, columns, output exists, pickle-only repository)."""

    exit_status = 2


class HubError(HfdetoxError, OSError):
    """The Hub or the network (unknown, gated or unreachable repository, token, offline without the files)."""

    exit_status = 3


@contextmanager
def located(where: str, kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Put `where` in front of the line of a UsageError that is raised inside, which is one of `kind` then."""
    try:
        yield
    except UsageError as error:
        raise kind(f"{where}: {_fitting(str(error), where)}") from error


@contextmanager
def on_disk(doing: str, advice: str = "") -> Iterator[None]:
    """Turn an error of the system inside into a RunError, such as `cannot write FILE: No space left on device`."""
    try:
        yield
    except HfdetoxError:
        # the Hub's is an OSError too
        raise
    except OSError as error:
        raise RunError("; ".join(filter(None, [f"cannot {doing}: {error.strerror or error}", advice]))) from error


def one_line(value: object, most: int | None = 300) -> str:
    """Return a text of strangers, such as another library's message, on one line, its middle left out beyond `most`."""
    line = _CONTROL.sub(" ", _message(value) if isinstance(value, BaseException) else str(value)).strip()
    return line if most is None or len(line) <= most else f"{line[: most * 2 // 3]} … {line[-(most // 3) :]}"


def _message(error: BaseException) -> str:
    """Return what an exception says; many of other libraries say one word, or nothing."""
    text = str(error).strip()
    if isinstance(error, KeyError) and not isinstance(error, HfdetoxError):
        return f"it finds no {text or 'key'}"
    return text if " " in text else ": ".join(filter(None, [type(error).__name__, text]))


@contextmanager
def refusing(what: str, advice: str = "", kind: type[HfdetoxError] = UsageError) -> Iterator[None]:
    """Turn whatever another library raises inside, over a stranger's file, into `what: its message` and advice.

    Raises:
        HfdetoxError: of `kind`; one that was raised inside passes as it is.
    """
    try:
        yield
    except HfdetoxError:
        raise
    except Exception as error:
        raise kind(f"{what}: {_fitting(error, what, advice)}{advice}") from error


def _fitting(value: object, *beside: str) -> str:
    """Return what a stranger's file gave rise to, short enough for a line that has something beside it."""
    return one_line(value, max(_LEAST, _STRANGERS - sum(map(len, beside))))
