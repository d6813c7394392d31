"""What is said when a command is interrupted: what was written, and how to go on."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from hfdetox.files import REPORT_NAMES


def written(output: Path | None) -> tuple[int, int] | None:
    """Return what tells the result in `output` from one written later, None where there is none."""
    for name in REPORT_NAMES if output is not None else ():
        with contextlib.suppress(OSError):
            found = (output / name).stat()  # type: ignore[operator]
            return found.st_ino, found.st_mtime_ns
    return None


def output_of(run_folder: Path | None) -> Path | None:
    """Return the output folder that a run folder belongs to."""
    return run_folder and run_folder.with_name(run_folder.name.removesuffix(".run"))


def attack_advice(output: Path | None, earlier: tuple[int, int] | None) -> str:
    """Return whether anything of an interrupted attack was written; `earlier` is what `written` gave before it."""
    if output is not None and written(output) not in (None, earlier):
        return f"the result in {output} is whole; publish it with: {shlex.join(['hfdetox', 'push', str(output)])} REPO"
    return "nothing was written: give the same command again to start anew"


def resume_advice(run_folder: Path | None, *, earlier: tuple[int, int] | None = None) -> str:
    """Return how to go on with the run in `run_folder`, that only the push was left, or that it had not begun.

    Args:
        earlier: what `written` gave before the run.
    """
    if run_folder is not None and run_folder.is_dir():
        return f"resume with: {shlex.join(['hfdetox', '--resume', str(run_folder)])}"
    output = output_of(run_folder)
    if output is not None and written(output) not in (None, earlier):
        return f"the result in {output} is whole; publish it with: {shlex.join(['hfdetox', 'push', str(output)])} REPO"
    return "the run had not begun, and nothing was written"
