"""Files and folders that are there whole or not at all, and are changed by one process at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from hfdetox.errors import RunError, UsageError

# by which a folder or repository is known as hfdetox's own
REPORT_NAMES = (REPORT_NAME, ATTACK_REPORT_NAME) = ("detox_report.json", "attack_report.json")
# which files of an output folder hfdetox wrote; it stays out of repositories
MANIFEST = ".hfdetox-manifest.json"
LOCK_FILES = (LOCK, HOLDER) = (".lock", ".lock-holder.json")
# how often a folder that vanishes while its lock is taken is made anew
_TRIES = 20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that a reader, or a kill, finds the old content or the new one.

    Raises:
        RunError: it cannot be written; what was there is still there.
    """
    fresh = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(fresh, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def replace_folder(fresh: Path, target: Path, old: Path) -> None:
    """Rename the folder `fresh` to `target`; what was at `target` is at `old` then, for the caller to remove.

    All three lie on one disk; what a killed process left at `old` has to be gone. Raises OSError, after which the
    earlier folder is at `target` again; a kill leaves it at one of the two places.
    """
    moved = target.exists()
    if moved:
        os.replace(target, old)
    try:
        os.replace(fresh, target)
    except OSError:
        if moved:
            os.replace(old, target)
        raise


@contextlib.contextmanager
def locked(folder: Path, what: str | Path, *, wait: float = 0.5) -> Iterator[None]:
    """Hold `folder` (made if missing) against other processes and threads; one thread may hold it several times.

    The lock is the system's own: it ends with its process, so that a dead one holds nothing. Its two files lie in the
    folder and are removed at the end, as is the folder, with the parents made for it, if nothing else is in it.

    Args:
        what: what the folder stands for in the message, such as the output.
        wait: seconds to wait for another holder.

    Raises:
        UsageError: another process holds it; the message says which, where and since when.
        RunError: the folder cannot be written.
    """
    made = [folder, *itertools.takewhile(lambda parent: not parent.exists(), folder.parents)]
    try:
        lock, outermost = _acquire(folder, time.monotonic() + wait)
    except Timeout:
        raise UsageError(f"{what} is in use{_holder(folder)}: wait for it, or choose another place") from None
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}; choose another place") from error
    try:
        if outermost:
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            write_atomically(folder / HOLDER, json.dumps(holder) + "\n")
        yield
    finally:
        if outermost:
            # the lock last: whoever takes the next one writes its own name
            for name in (HOLDER, LOCK):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in made if outermost else ():
                path.rmdir()


def _acquire(folder: Path, deadline: float) -> tuple[BaseFileLock, bool]:
    """Return the acquired lock, and whether it was not held before."""
    for more in reversed(range(_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
            outermost = not lock.is_locked
            lock.acquire(timeout=max(0.0, deadline - time.monotonic()), poll_interval=0.05)
            return lock, outermost
        except (FileNotFoundError, FileExistsError):
            # the holder removed the folder when it was done, maybe in the middle of `mkdir`
            if not more:
                raise
    raise AssertionError


def _holder(folder: Path) -> str:
    """Return who holds a folder, "" where the file that says it is missing or damaged."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f" by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_inside(path: Path, root: Path) -> bool:
    """Return whether `path` leads, all links followed, to something in the folder `root`.

    Of a snapshot in the Hub's cache, whose files are links, the blobs of its repository count as well.
    """
    # unlike Path.resolve, realpath takes a circle of links as it is
    here, there = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    roots = [there]
    for folder in (there, *there.parents):
        repo = folder.parent.parent
        if folder.parent.name == "snapshots" and repo.name.startswith(("models--", "datasets--")):
            # a link in this place would lead anywhere
            roots += [repo / "blobs"] if not (repo / "blobs").is_symlink() else []
    return any(here.is_relative_to(one) for one in roots)
