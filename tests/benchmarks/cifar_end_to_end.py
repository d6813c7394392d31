"""The main job on every model of the CIFAR-10 zoo: one table of accuracy, ASR, RA and DER before and after.

    python -m tests.benchmarks.cifar_end_to_end --cifar DIR --zoo DIR --output cifar_end_to_end.json

2,500 clean images (5 %), all 10,000 test images, seed 0, one row a model and setting; the settings were fixed
in advance. The file is written after every row; a row that is there is not run again. The cleaned models stay in ZOO.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hfdetox import detoxify
from tests.benchmarks.cifar_zoo import LIBRARIES, TARGET, TRIGGERS

SETTINGS: dict[str, dict[str, str]] = {"d3:paper": {}, "d3 λ=1.5, 40 epochs": {"lambda": "1.5", "epochs": "40"}}
SAMPLES = 2500


def row(model: Path, cifar: Path, name: str, settings: dict[str, str], output: Path) -> dict[str, Any]:
    """Clean one model and return its numbers with their intervals."""
    trigger = model.name.split("-")[1]
    report = detoxify(
        model,
        dataset=cifar,
        samples=SAMPLES,
        triggers=[trigger],
        target=TARGET,
        settings=settings,
        output=output,
        overwrite=True,
    ).report
    plain = report.to_dict()
    states = {
        when: {
            "accuracy": plain[when]["accuracy"],
            **{k: plain[when]["triggers"][trigger][k] for k in ("attack_success_rate", "robust_accuracy")},
        }
        for when in ("before", "after")
    }
    return {
        "model": model.name,
        "setting": name,
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
            f"| {entry['model']} | {entry['setting']} | {' | '.join(cells)} | {100 * entry['der']['value']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for name in arguments.settings:
        for model in (arguments.zoo / f"{library}-{trigger}" for trigger in TRIGGERS for library in LIBRARIES):
            if any((done["model"], done["setting"]) == (model.name, name) for done in rows):
                continue
            output = arguments.zoo / "cleaned" / f"{model.name}-{list(SETTINGS).index(name)}"
            rows.append(row(model, arguments.cifar, name, SETTINGS[name], output))
            command = (
                "python -m tests.benchmarks.cifar_end_to_end --cifar CIFAR10 --zoo ZOO --output "
                + arguments.output.name
            )
            arguments.output.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
