"""`make faults`: malformed inputs, kills, full disks, faults of the Hub, two runs at once, modes and rights.

Every figure is written as it comes, and another call goes on where it stopped: it tries what is not there, and again
what was not as promised. `--size 0.5` tries half as many.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.hub_server.server import HubServer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# the longest first
PARTS = ("inputs", "kills", "hub", "together", "forever", "instants", "disk", "two", "modes", "rights")


class Figures:
    """What one part found, in a JSON file of its own: one entry a case, each with the commit it was tried on."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock, self.commit = file, threading.Lock(), commit()
        self.cases: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def case(self, name: str, trial: Callable[[], Any]) -> Any:
        """Return what a case gave, from the file if it was tried before and was as promised."""
        if name not in self.cases or counted(self.cases[name]["found"])[1]:
            began = time.monotonic()
            found = {"found": trial(), "seconds": round(time.monotonic() - began, 1), "commit": self.commit}
            with self.lock:
                self.cases[name] = found
                fresh = self.file.with_suffix(".new")
                fresh.write_text(json.dumps(self.cases, indent=1) + "\n")
                os.replace(fresh, self.file)
                print(f"{self.file.stem}: {name}: {json.dumps(found)[:300]}", flush=True)
        return self.cases[name]["found"]


def counted(found: Any) -> tuple[Counter[str], int]:
    """Return how many trials of a case were as promised, by what became of them, and how many were not."""
    if isinstance(found, dict):
        good = Counter({word: found[word] for word in ("value", "refused")})
        return good, found["tried"] - good.total()
    good = Counter({found or "as promised": 1}) if found in ("", "recovered", "refused") else Counter()
    return good, 1 - good.total()


def commit() -> str:
    """Return the commit of the checkout, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY).stdout.strip()


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


def table(folder: Path) -> tuple[str, int]:
    """Return the figures of all parts as a Markdown table, one line a part, and how many were not as promised."""
    rows, left = ["| part | tried | as promised | not | minutes | commit |", "|---|---:|---|---:|---:|---|"], 0
    for part in PARTS:
        cases = Figures(folder / f"{part}.json").cases.values()
        if not cases:
            continue
        good, bad = Counter[str](), 0
        for case in cases:
            fine, wrong = counted(case["found"])
            good, bad = good + fine, bad + wrong
        said = ", ".join(f"{count:,} {word}" for word, count in sorted(good.items()))
        minutes = sum(case["seconds"] for case in cases) / 60
        commits = " ".join(sorted({case["commit"] for case in cases}))
        rows.append(f"| {part} | {good.total() + bad:,} | {said} | {bad} | {minutes:.0f} | {commits} |")
        left += bad
    return "\n".join(rows), left


def run_part(part: str, folder: Path, size: float) -> None:
    """Try the cases of one part that the file of its figures does not have."""
    root, folder = Path(tempfile.mkdtemp(prefix="hfdetox-faults-")), folder.absolute()
    server = environment(root)
    try:
        # the client libraries read the environment when they are imported
        from tests.faults import parts

        getattr(parts, part)(parts.Context(Figures(folder / f"{part}.json"), root, server, size, folder))
    finally:
        server.stop()
        gc.unfreeze()
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    """Run the parts that are asked for, each in a process of its own; the status is 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time")
    parser.add_argument("--output", type=Path, default=Path("build/faults"), help="folder of the figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if len(arguments.part) == 1:
        run_part(arguments.part[0], arguments.output, arguments.size)
        failed = []
    else:
        words = [sys.executable, "-m", "tests.faults", "--size", str(arguments.size), "--output", arguments.output]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            ended = pool.map(lambda part: subprocess.run([*words, "--part", part], check=False), arguments.part)
            failed = [part for part, one in zip(arguments.part, ended, strict=True) if one.returncode not in (0, 1)]
    text, left = table(arguments.output)
    print(f"\n{time.strftime('%Y-%m-%d')}\n\n{text}" + "".join(f"\npart {part} broke off" for part in failed))
    return int(left > 0 or bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
