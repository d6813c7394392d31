"""Files and folders: there whole or not at all, changed by one process at a time, and known by what is in them.

Their checksums are those that the Hub names them by.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open

from hfdetox.errors import UsageError, on_disk, one_line

# by which a folder or repository is known as hfdetox's own
REPORT_NAMES = (REPORT_NAME, ATTACK_REPORT_NAME) = ("detox_report.json", "attack_report.json")
BENCH_NAME = "bench.json"
# which files of an output folder hfdetox wrote; it stays out of repositories
MANIFEST = ".hfdetox-manifest.json"
# the signature of an output in the OpenSSF's format
SIGNATURE = "model.sig"
LOCK_FILES = (LOCK, HOLDER) = (".lock", ".lock-holder.json")
# what a process that was killed while it wrote a file leaves beside it
LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.new")
# how often a folder that vanishes while its lock is taken is made anew
_TRIES = 20
LFS_POINTER = b"version https://git-lfs"


class NotSafetensorsError(UsageError):
    """A file that is called `.safetensors` and is not one."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that a reader, or a kill, finds the old content or the new one.

    Raises:
        RunError: it cannot be written; what was there is still there.
    """
    fresh = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with on_disk(f"write {path}", "free some space or choose another place"):
            fresh.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(fresh, path)
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
    with on_disk(f"write {folder}", "choose another place"):
        try:
            lock, outermost = _acquire(folder, time.monotonic() + wait)
        except Timeout:
            raise UsageError(f"{what} is in use{_holder(folder)}: wait for it, or choose another place") from None
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


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits; this is how the Hub names a large (LFS) file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_file(path: Path) -> str:
    """Return the id git gives a file's bytes, 40 hex digits; this is how the Hub names a regular file."""
    head = b"blob %d\0" % path.stat().st_size
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(head, usedforsecurity=False)).hexdigest()


def check_safetensors(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: tensor name to dtype, shape and offsets, plus `__metadata__`.

    The offsets are checked against the size of the file by the format's own reader; no tensor is read.
    Raises NotSafetensorsError (a UsageError) when the file is something else, a git-lfs pointer for instance.
    """
    with path.open("rb") as file:
        start = file.read(8 + len(LFS_POINTER))
        if start.startswith(LFS_POINTER):
            raise NotSafetensorsError(f"{path.name} is a git-lfs pointer, not weights; run `git lfs pull` there")
        try:
            with safe_open(str(path), framework="numpy"):
                pass
        except SafetensorError as error:
            message = f"{path.name} is not a safetensors file ({one_line(error, 200)}); get a whole copy of it"
            raise NotSafetensorsError(message) from error
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header


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
