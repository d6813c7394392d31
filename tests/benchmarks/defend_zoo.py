"""The main job on the backdoored models of a zoo: one table of accuracy, ASR, RA and DER before and after.

    hfdetox attack --suite examples/d3_evaluation.yaml --dataset CIFAR10 --output ZOO
    python -m tests.benchmarks.defend_zoo --cifar CIFAR10 --zoo ZOO --output defend_zoo.json [--cells NAME…]

2,500 clean images (5 %), all 10,000 test images, seed 0, one row a model and setting; the settings were fixed
in advance. The triggers are the zoo's own files. The file is written after every row; a row that is there is not run
again. The cleaned models stay in ZOO.cleaned/SETTING/CELL.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hfdetox import detoxify

# the first is what the table of the README shows; chosen before any model of this zoo was looked at
SETTINGS: dict[str, dict[str, str]] = {
    "strong": {"lambda": "1.5", "epochs": "40"},
    "paper": {},
}
SAMPLES = 2500


def row(cell: Path, cifar: Path, name: str, output: Path) -> dict[str, Any]:
    """Clean one model of the zoo and return its numbers with their intervals."""
    report = detoxify(
        cell,
        dataset=cifar,
        clean_samples=SAMPLES,
        triggers=[str(file) for file in sorted((cell / "triggers").glob("*.safetensors"))],
        defense="d3:paper",
        settings=SETTINGS[name],
        output=output,
        overwrite=True,
    ).report
    plain = report.to_dict()
    trigger = next(iter(plain["before"]["triggers"]))
    states = {
        when: {
            "accuracy": plain[when]["accuracy"],
            **{k: plain[when]["triggers"][trigger][k] for k in ("attack_success_rate", "robust_accuracy")},
        }
        for when in ("before", "after")
    }
    return {
        "cell": cell.name,
        "setting": name,
        "trigger": trigger,
        **states,
        "der": plain["defense_effectiveness_rating"][trigger],
        "defense": plain["defense"],
        "environment": plain["environment"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, in percent."""
    lines = [
        "| model | setting | ACC before → after | ASR before → after | RA before → after | DER |",
        "|---|---|---|---|---|---|",
    ]
    for entry in rows:
        cells = [
            " → ".join(f"{100 * entry[when][key]['value']:.1f}" for when in ("before", "after"))
            for key in ("accuracy", "attack_success_rate", "robust_accuracy")
        ]
        lines.append(
            f"| {entry['cell']} | {entry['setting']} | {' | '.join(cells)} | {100 * entry['der']['value']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", help="names of models in the zoo; all backdoored ones by default")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["strong"])
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    found = sorted(folder.parent.name for folder in arguments.zoo.glob("*/triggers"))
    for name in arguments.settings:
        for cell in arguments.cells or found:
            if any((done["cell"], done["setting"]) == (cell, name) for done in rows):
                continue
            output = arguments.zoo.with_name(arguments.zoo.name + ".cleaned") / name / cell
            rows.append(row(arguments.zoo / cell, arguments.cifar, name, output))
            command = (
                f"python -m tests.benchmarks.defend_zoo --cifar CIFAR10 --zoo ZOO --output {arguments.output.name}"
            )
            arguments.output.write_text(
                json.dumps({"command": command, "settings": SETTINGS, "rows": rows}, indent=2) + "\n"
            )
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
