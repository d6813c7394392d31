"""The manifest of an output folder: which of its files hfdetox wrote; only those are ever replaced or removed."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from pathlib import Path

from hfdetox.documents import read_json
from hfdetox.errors import UsageError, on_disk
from hfdetox.files import LEFTOVER, MANIFEST, REPORT_NAMES, sha256_file, write_atomically
from hfdetox.reporting.plots import PLOT_FILES

# what versions without a manifest wrote
_KNOWN = (
    "config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors",
    "model.safetensors.index.json", "correction.safetensors", "README.md", "LICENSE*", "NOTICE*", "*.py", "plots/*.png",
    "triggers/*.safetensors", ".eval_results/*.yaml", *REPORT_NAMES,
)  # fmt: skip
PLOTS = (*PLOT_FILES, "gallery.png")


def write_manifest(folder: Path) -> None:
    """Record every file of a finished output folder with its SHA-256; raises RunError when it cannot be written."""
    _write(folder, {name: sha256_file(folder / name) for name in _files_in(folder)})


def write_own(folder: Path, name: str, text: str) -> None:
    """Replace one of the files of an output folder, and its line in the manifest; raises RunError."""
    write_atomically(folder / name, text)
    recorded = _recorded(folder)
    if recorded is not None:
        _write(folder, {**recorded, name: sha256_file(folder / name)})


def foreign_files(folder: Path) -> list[str]:
    """Return the paths below a folder that hfdetox did not write, or that were changed since; links are never its own.

    Of a folder without a manifest (an earlier version's, or one from the Hub) names that hfdetox is known to write are
    its own.
    """
    return sorted(set(_files_in(folder)) - set(_own_files(folder)))


def added_files(folder: Path) -> list[str]:
    """Return the paths below a folder that hfdetox never wrote, links among them; a changed file of its own is none.

    Of a folder without a manifest names that hfdetox gives are its own, of pictures those that it gives today.
    """
    recorded = _recorded(folder)
    if recorded is not None:
        return sorted(set(_files_in(folder)) - set(recorded))
    own = [*(pattern for pattern in _KNOWN if not pattern.startswith("plots/")), *(f"plots/{name}" for name in PLOTS)]
    return sorted(name for name in _files_in(folder) if not any(_fits(name, pattern) for pattern in own))


def remove_one(folder: Path, name: str) -> None:
    """Remove a file of an output folder, and its line in the manifest; raises RunError."""
    with on_disk(f"remove {folder / name}"):
        (folder / name).unlink(missing_ok=True)
    recorded = _recorded(folder)
    if recorded is not None:
        _write(folder, {known: digest for known, digest in recorded.items() if known != name})


def changed_files(folder: Path) -> list[str]:
    """Return the paths that the manifest records and that are gone or changed since; none without a manifest."""
    own = set(_own_files(folder))
    return sorted(name for name in _recorded(folder) or {} if name not in own)


def remove_own(folder: Path) -> None:
    """Remove what hfdetox wrote to a folder, and the folder if nothing but empty folders is in it then."""
    own = [*_own_files(folder), MANIFEST]  # what a kill left of a file being written is among them
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    with contextlib.suppress(OSError):
        for name in own:
            (folder / name).unlink(missing_ok=True)
    for place in sorted(places, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            place.rmdir()


def _files_in(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return [name for name in (path.relative_to(folder).as_posix() for path in paths) if name != MANIFEST]


def _own_files(folder: Path) -> list[str]:
    recorded = _recorded(folder)
    plain = [name for name in _files_in(folder) if (folder / name).is_file() and not (folder / name).is_symlink()]
    left = {name for name in plain if LEFTOVER.fullmatch(name.rpartition("/")[2])}
    if recorded is None:
        return [name for name in plain if name in left or any(_fits(name, pattern) for pattern in _KNOWN)]
    return [name for name in plain
            if name in left or (name in recorded and recorded[name] == sha256_file(folder / name))]  # fmt: skip


def _fits(name: str, pattern: str) -> bool:
    # to fnmatch a star is a slash as well
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _recorded(folder: Path) -> dict[str, str] | None:
    """Return the manifest, None without one; one that cannot be read records nothing."""
    if not (folder / MANIFEST).exists():
        return None
    with contextlib.suppress(UsageError):
        return read_json(folder / MANIFEST, dict[str, dict[str, str]]).get("files", {})
    return {}


def _write(folder: Path, files: dict[str, str]) -> None:
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
