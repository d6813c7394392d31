"""What a file on disk is: its checksums as the Hub names them, and whether it is a safetensors file at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hfdetox.errors import UsageError

_LFS_POINTER = b"version https://git-lfs"


class NotSafetensorsError(UsageError):
    """A file that is called `.safetensors` and is not one."""


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
        start = file.read(8 + len(_LFS_POINTER))
        if start.startswith(_LFS_POINTER):
            raise NotSafetensorsError(f"{path.name} is a git-lfs pointer, not weights; run `git lfs pull` there")
        try:
            with safe_open(str(path), framework="numpy"):
                pass
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            message = f"{path.name} is not a safetensors file ({reason}); get a whole copy of it"
            raise NotSafetensorsError(message) from error
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header
