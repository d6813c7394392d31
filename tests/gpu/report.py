"""What a part of `make gpu` has found so far: one JSON file, whole at every moment."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()


class Report:
    """Findings of a part, written anew with every one of them, so that a cut-off leaves what was done.

    Args:
        path: the file; what is in it already is read where `keep`.
        command: what made it.
    """

    def __init__(self, path: Path, command: str, *, keep: bool = False) -> None:
        self.path = path
        self.found: dict[str, Any] = {"command": command, "rows": []}
        if keep and path.is_file():
            self.found |= json.loads(path.read_text(encoding="utf-8"))
        self.write()

    def put(self, **named: Any) -> None:
        """Keep values under their names."""
        self.found |= named
        self.write()
        print(*(f"{name}: {value}" for name, value in named.items()), sep="\n", flush=True)

    def add(self, **row: Any) -> None:
        """Keep a row."""
        self.found["rows"].append(row)
        self.write()
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def write(self) -> None:
        """Write everything in one rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


def machine() -> dict[str, Any]:
    """Return what this process computes with: the device's name, and versions."""
    # `make gpu` itself needs neither
    import torch

    from hfdetox import __version__

    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name(0) if cuda else "cpu", "cores": os.cpu_count(),
            "torch": torch.__version__, "python": platform.python_version(), "hfdetox": __version__}  # fmt: skip


def arguments_of(doc: str | None) -> argparse.Namespace:
    """Read a part's command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would not end by then")
    parser.add_argument("--toy", action="store_true", help="small enough for a CPU")
    return parser.parse_args()
