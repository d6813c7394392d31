"""Packages that add to hfdetox, installed as pip does it into folders of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "plugin_package"


def install(source: Path, into: Path) -> Path:
    """Install a package's folder into `into` without any network, and return that; nothing is written in the source."""
    copy = into.with_name(f"{into.name}-source")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", into, copy],
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return into


def write_package(folder: Path, name: str, code: str, **points: str) -> Path:
    """Write an installed package of one module, `NAME.py`, with entry points such as `defenses="shrink = NAME:Class"`.

    Returns the folder to put on the path.
    """
    information = folder / f"{name}-0.1.dist-info"
    information.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    text = "".join(f"[hfdetox.{room}]\n{line}\n" for room, line in points.items())
    (information / "entry_points.txt").write_text(text, encoding="utf-8")
    return folder
