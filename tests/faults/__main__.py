"""`make faults`: malformed inputs, kills, full disks, faults of the Hub, two runs at once, modes and rights.

Every figure is written as it comes, and another call goes on where it stopped. `--size 0.5` tries half as many.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hub_server.server import HubServer

PARTS = ("inputs", "kills", "disk", "hub", "forever", "two", "modes", "rights")


class Figures:
    """What was found, in a JSON file: by part, one entry a case."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def case(self, part: str, name: str, trial: Callable[[], Any]) -> Any:
        """Return what a case gave, from the file if it was tried before."""
        cases = self.found.setdefault(part, {})
        if name not in cases:
            began = time.monotonic()
            cases[name] = {"found": trial(), "seconds": round(time.monotonic() - began, 1)}
            fresh = self.file.with_suffix(".new")
            fresh.write_text(json.dumps(self.found, indent=1) + "\n")
            os.replace(fresh, self.file)
            print(f"{part}: {name}: {json.dumps(cases[name])[:300]}", flush=True)
        return cases[name]["found"]


def environment(root: Path) -> HubServer:
    """Start a Hub and point the client libraries at it, before they are imported."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        del os.environ[name]
    server = HubServer(root / "hub")
    server.start()
    os.environ.update(
        HF_ENDPOINT=server.url, HF_HOME=str(root / "hf_home"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_UPDATE_DOWNLOAD_COUNTS="0",
        DISABLE_SAFETENSORS_CONVERSION="1", NO_PROXY="127.0.0.1,localhost", MPLBACKEND="Agg", OMP_NUM_THREADS="1",
    )  # fmt: skip
    return server


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table, one line a part."""
    rows = ["| what | tried | as promised | not | seconds |", "|---|---:|---:|---:|---:|"]
    for part, cases in found.items():
        tried = good = 0
        for case in cases.values():
            counts = case["found"]
            if isinstance(counts, dict) and "tried" in counts:
                tried, good = tried + counts["tried"], good + counts["value"] + counts["refused"]
            else:
                tried, good = tried + 1, good + (not counts or counts in ("recovered", "refused"))
        seconds = sum(case["seconds"] for case in cases.values())
        rows.append(f"| {part} | {tried:,} | {good:,} | {tried - good} | {seconds:.0f} |")
    return "\n".join(rows)


def main() -> int:
    """Run the parts that are asked for and print the table; the status is 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--output", type=Path, default=Path("build/faults/faults.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figures = Figures(arguments.output)
    root = Path(tempfile.mkdtemp(prefix="hfdetox-faults-"))
    server = environment(root)
    try:
        # the client libraries read the environment when they are imported
        from tests.faults import parts

        for part in arguments.part:
            getattr(parts, part)(parts.Context(figures, root, server, arguments.size))
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    print(f"\ncommit {commit.stdout.strip()}, {time.strftime('%Y-%m-%d')}\n\n{table(figures.found)}")
    return int(any(line.split(" | ")[3] != "0" for line in table(figures.found).splitlines()[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
