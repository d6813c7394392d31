"""The defense `unlearn` on the models of a zoo, beside `d3:auto` and plain fine-tuning.

    hfdetox attack --suite examples/scan_base.yaml --dataset CIFAR10 --output zoo-base
    hfdetox attack --suite examples/scan_zoo.yaml --dataset CIFAR10 --output ZOO
    python -m tests.benchmarks.unlearn_zoo --cifar CIFAR10 --zoo ZOO --output unlearn_zoo.json [--cells NAME…]

2,500 clean images, 2,000 test images, seed 0; the triggers are the zoo's own files and no method sees them. The file is
written after every row; a row that is there is not run again. These models are the development half: the settings were
chosen on some of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hfdetox import detoxify

# an arm's defense and its settings
ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "unlearn": ("unlearn", {}),
    "d3:auto": ("d3:auto", {}),
    "ft": ("ft", {"epochs": "4", "batch_size": "128", "augmentation": "flip"}),
}
SAMPLES, MEASURED = 2500, 2000


def row(cell: Path, cifar: Path, arm: str, samples: int) -> dict[str, Any]:
    """Clean one model of the zoo and return its numbers."""
    defense, settings = ARMS[arm]
    triggers = [str(file) for file in sorted((cell / "triggers").glob("*.safetensors"))]
    found = detoxify(cell, dataset=cifar, clean_samples=samples, eval_samples=MEASURED, triggers=triggers,
                     defense=defense, settings=settings, progress=False).report.to_dict()  # fmt: skip
    done, history = found["defense"], found["history"]
    # an image through the network and back counts once
    passes = sum(entry.get("passes", 0) / 2 + samples * ("learning_rate" in entry) for entry in history)
    return {"cell": cell.name, "arm": arm, "samples": samples, **_states(found), "seconds": done["seconds"],
            "steps": done["steps"], "passes": round(passes), "choices": done["choices"],
            "settings": settings}  # fmt: skip


def _states(found: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy and, of the trigger, ASR, RA, accuracy without it and destination, before and after."""
    states = {}
    for when in ("before", "after"):
        state: dict[str, Any] = {"accuracy": found[when]["accuracy"]["value"]}
        for trigger in found[when]["triggers"].values():
            state |= {name: trigger[name]["value"] for name in
                      ("attack_success_rate", "robust_accuracy", "accuracy_without")}  # fmt: skip
            goes = trigger["destination"]
            state |= {"destination": goes["label"], "share": goes["rate"]["value"], "excess": goes["excess"]["value"]}
        states[when] = state
    return states


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, in percent and points."""
    lines = [
        "| model | method | images | ACC | cost | ASR | RA | of | one class (excess) | s | passes |",
        "|---|---|---:|---|---:|---|---|---:|---|---:|---:|",
    ]
    for entry in rows:
        before, after = entry["before"], entry["after"]
        numbers = [f"{100 * before['accuracy']:.1f} → {100 * after['accuracy']:.1f}",
                   f"{100 * (before['accuracy'] - after['accuracy']):.1f}"]  # fmt: skip
        if "share" in after:
            numbers += [f"{100 * before[key]:.1f} → {100 * after[key]:.1f}"
                        for key in ("attack_success_rate", "robust_accuracy")]  # fmt: skip
            goes = f"{100 * after['share']:.0f} ({100 * after['excess']:.0f}) to {after['destination']}"
            numbers += [f"{100 * after['accuracy_without']:.1f}", goes]
        else:
            numbers += ["–"] * 4
        lines.append(f"| {entry['cell']} | {entry['arm']} | {entry['samples']:,} | {' | '.join(numbers)} | "
                     f"{entry['seconds']:.0f} | {entry['passes']:,} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", help="names of models in the zoo; all that are done by default")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    cells = given.cells or sorted(file.parent.name for file in given.zoo.glob("*/attack_report.json"))
    for cell, arm in [] if given.show else [(cell, arm) for cell in cells for arm in given.arms]:
        if any((done["cell"], done["arm"], done["samples"]) == (cell, arm, given.samples) for done in rows):
            continue
        rows.append(row(given.zoo / cell, given.cifar, arm, given.samples))
        given.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(table(rows[-1:]).splitlines()[-1], rows[-1]["choices"], file=sys.stderr, flush=True)
    print(table(sorted(rows, key=lambda entry: (entry["samples"], entry["cell"]))))


if __name__ == "__main__":
    main()
