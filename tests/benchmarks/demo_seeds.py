"""The demo over many seeds and settings: how its settings were chosen (seeds 100 to 104), and what they give (0 to 4).

    python -m tests.benchmarks.demo_seeds --output demo_seeds_tuning.json --seeds 100 101 102 103 104 \\
        --settings lambda=10,epochs=100 lambda=1.5,epochs=40 lambda=1.5,epochs=40,learning_rate=0.05,batch_size=128
    python -m tests.benchmarks.demo_seeds --output demo_seeds.json --seeds 0 1 2 3 4 \\
        --settings lambda=1.5,epochs=40,learning_rate=0.05,batch_size=128 lambda=10,epochs=100

The file is written after every cell; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from hfdetox import detoxify
from hfdetox.demo import CLEAN_IMAGES, TARGET, backdoored, write_digits


def cell(folder: Path, settings: dict[str, str], seed: int) -> dict[str, Any]:
    """Run the demo's main job with other settings and return what it measured."""
    report = detoxify(
        folder / "backdoored",
        dataset=folder / "digits",
        samples=CLEAN_IMAGES,
        triggers=["badnets"],
        target=TARGET,
        seed=seed,
        defense="d3:paper",
        settings={**settings, "augmentation": "crop"},
        progress=False,
    ).report
    assert report.before is not None
    assert report.after is not None
    rates = {"accuracy": (report.before.accuracy, report.after.accuracy)}
    for name in ("attack_success_rate", "robust_accuracy"):
        rates[name] = tuple(getattr(state.triggers["badnets"], name) for state in (report.before, report.after))
    return {
        "seed": seed,
        "settings": settings,
        "seconds": report.defense.seconds,
        **{name: {"before": before.value, "after": after.value} for name, (before, after) in rates.items()},
    }


def main() -> None:
    """Run the cells that are missing and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--settings", nargs="+", required=True)
    arguments = parser.parse_args()
    command = " ".join(["python -m tests.benchmarks.demo_seeds", *sys.argv[1:]])
    cells: list[dict[str, Any]] = json.loads(arguments.output.read_text())["cells"] if arguments.output.exists() else []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for text in arguments.settings:
                settings = dict(item.split("=") for item in text.split(","))
                if any(done["seed"] == seed and done["settings"] == settings for done in cells):
                    continue
                if not (folder / "digits").exists():
                    write_digits(folder / "digits", seed)
                    backdoored(folder / "digits", folder / "backdoored", seed)
                cells.append(cell(folder, settings, seed))
                print(json.dumps(cells[-1]), flush=True)
                arguments.output.write_text(json.dumps({"command": command, "cells": cells}, indent=2) + "\n")


if __name__ == "__main__":
    main()
