"""A bench's `bench.json` as the short file that the repository keeps: one line of numbers a run.

    python -m tests.benchmarks.summarize BENCH/bench.json tests/benchmarks/results/line_up.json \\
        --command "hfdetox bench …"

The command makes the whole file again. `tables.py` forms every mean and interval from these lines, and `made.json` says
by which commit and on what machine they were measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# what a table or a sentence of docs/benchmarks.md needs of a run, by its name in bench.json
COLUMNS = (
    "model", "attack", "defense", "seed", "clean_images", "accuracy_before", "accuracy", "attack_success_before",
    "attack_success", "robust_accuracy_before", "robust_accuracy", "der", "worst_class_before", "worst_class",
    "spread_before", "spread", "steps", "seconds", "largest_share_before", "largest_share", "excess", "verdict",
    "accuracy_verdict",
)  # fmt: skip


def summary(bench: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the finished runs of a bench as rows of `COLUMNS`, rates as fractions, and how many were asked for."""
    runs = bench["runs"] if "runs" in bench else bench["trials"]
    done = [run for run in runs if run["status"] == "done"]
    return {
        "command": command,
        "hfdetox_version": bench["hfdetox_version"],
        "asked": len(runs),
        "columns": list(COLUMNS),
        "rows": [[short(run.get(name)) for name in COLUMNS] for run in done],
    }


def short(value: Any) -> Any:
    """Return a number with the digits that 10,000 images can bear."""
    return round(value, 6 if value < 1 else 1) if isinstance(value, float) else value


def write(document: dict[str, Any], path: Path) -> None:
    """Write a summary, one row a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in document["rows"])
    head = json.dumps({**document, "rows": []}, ensure_ascii=False, indent=1)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


def main() -> None:
    """Read the whole file and write the short one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--command", required=True, help="the command that repeats it")
    arguments = parser.parse_args()
    bench = json.loads(arguments.bench.read_text(encoding="utf-8"))
    write(summary(bench, arguments.command), arguments.summary)


if __name__ == "__main__":
    main()
