"""What reconstructed triggers say of cleaned models, beside the true ones, and whether backdoors are gone or asleep.

    python -m tests.benchmarks.clean_zoo --cifar CIFAR10 --zoo ZOO --triggers FOUND --output cleaned.json

Each backdoored model of ZOO is cleaned with 2,500 images by each defense. FOUND has the triggers that `scan_zoo.py
--triggers FOUND` reconstructed on the same models, a folder a model; of these the ones of the attacker's class are
measured, on 2,000 test images. The residual tests are those of `hfdetox.evidence.residual`, also for a never-backdoored
model, with the triggers of the others. A row that is there is not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hfdetox import detoxify
from hfdetox.data.load import load_images
from hfdetox.evaluation.evaluator import decoded, prepare_evaluator
from hfdetox.evidence.residual import residual
from hfdetox.evidence.results import Residual
from hfdetox.models.classifier import load_classifier
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import parse_trigger

DEFENSES: dict[str, tuple[str, dict[str, str]]] = {
    "d3:auto": ("d3:auto", {}),
    "d3:paper": ("d3:paper", {"epochs": "10"}),
    "ft": ("ft", {"epochs": "10"}),
    "ft-sam": ("ft-sam", {"epochs": "10"}),
    "unlearn": ("unlearn", {}),
}
SAMPLES, MEASURED = 2500, 2000


def main() -> None:
    """Clean and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--cifar", "--zoo", "--triggers", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True, help="models of the zoo, by the names of their folders")
    parser.add_argument("--defenses", nargs="+", default=list(DEFENSES))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for cell in options.cells:
        for defense in options.defenses:
            if not any((row["cell"], row["defense"]) == (cell, defense) for row in rows):
                rows.append(row_of(options, cell, defense))
                print(json.dumps(rows[-1]["rates"]), flush=True)
                options.output.write_text(written(rows))


def row_of(options: argparse.Namespace, cell: str, defense: str) -> dict[str, Any]:
    """Clean one model and return its numbers."""
    folder: Path = options.zoo / cell
    true = sorted((folder / "triggers").glob("*.safetensors"))
    target = parse_trigger(str(true[0])).target
    found = sorted((options.triggers / cell).glob(f"*-{target}.safetensors"))
    name, settings = DEFENSES[defense]
    result = detoxify(folder, dataset=str(options.cifar), clean_samples=SAMPLES, eval_samples=MEASURED, defense=name,
                      settings=settings, triggers=[str(file) for file in (*true, *found)], progress=False)  # fmt: skip
    report = result.report
    assert report.before is not None
    assert report.after is not None
    rates = {}
    for trigger, before in report.before.triggers.items():
        after = report.after.triggers[trigger]
        rates[trigger] = [[one.attack_success_rate.value, one.robust_accuracy.value] for one in (before, after)]
    accelerator = make_accelerator("cpu", "no")
    cleaned, suspect = result.classifier, load_classifier(str(folder))
    images = load_images(options.cifar, labels=cleaned.labels, clean_samples=SAMPLES, eval_samples=MEASURED)
    known = [parse_trigger(str(file)) for file in (*true, *found)]
    evaluation = prepare_evaluator(cleaned, images.evaluation, known, accelerator, target=None, warn=print,
                                   progress=False)  # fmt: skip
    pixels = decoded(images.clean, cleaned, accelerator, "decode", progress=False)
    tests = residual(evaluation, pixels, suspect.network.state_dict(), evaluation.views)
    return {
        "cell": cell, "defense": defense, "settings": settings, "true": [file.stem for file in true],
        "accuracy": [report.before.accuracy.value, report.after.accuracy.value], "rates": rates,
        "residual": {name: shown(one) for name, one in tests.items()},
        "seconds": round(report.defense.seconds, 1),
    }  # fmt: skip


def shown(found: Residual) -> dict[str, Any]:
    """Return the curves of the residual tests as numbers."""
    curves = {key: [round(one.value, 4) for one in getattr(found, key)]
              for key in ("retuned", "plain", "path", "path_accuracy", "drift")}  # fmt: skip
    return {**curves, "reaches": found.reaches}


def written(rows: list[dict[str, Any]]) -> str:
    """Return the JSON with a line a row."""
    command = "python -m tests.benchmarks.clean_zoo --cifar CIFAR10 --zoo ZOO --triggers FOUND --output cleaned.json …"
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{\n "command": {json.dumps(command)},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
