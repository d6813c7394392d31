"""What reconstructed triggers say of cleaned models, beside the true ones, and whether backdoors are gone or asleep.

    python -m tests.benchmarks.clean_zoo --cifar CIFAR10 --zoo ZOO --triggers FOUND --output cleaned.json

Each backdoored model of ZOO is cleaned with 2,500 images by each defense. FOUND has the triggers that `scan_zoo.py
--triggers FOUND` reconstructed on the same models, a folder a model; of these the ones of the attacker's class are
measured, on 2,000 test images. The residual tests are those of `hfdetox.evidence.residual`. A row that is there is not
measured again. How soon a model that never had a backdoor learns one from five images:

    python -m tests.benchmarks.clean_zoo … --cells resnet-a-clean-s1 --triggers-of BACKDOORED --defenses none
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
    "d3:auto-1": ("d3:auto-1", {}),
    "d3:paper": ("d3:paper", {"epochs": "10"}),
    "ft": ("ft", {"epochs": "10"}),
    "ft-sam": ("ft-sam", {"epochs": "10"}),
    "unlearn": ("unlearn", {}),
}
# no defense: the model as it came
AS_IT_IS = "none"
SAMPLES, MEASURED = 2500, 2000


def main() -> None:
    """Clean and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--cifar", "--zoo", "--triggers", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True, help="models of the zoo, by the names of their folders")
    parser.add_argument("--defenses", nargs="+", choices=[*DEFENSES, AS_IT_IS], default=list(DEFENSES))
    parser.add_argument("--triggers-of", help="measure with the triggers of this model of the zoo")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for cell in options.cells:
        for defense in options.defenses:
            known = [(row["cell"], row["defense"], row.get("triggers_of", row["cell"])) for row in rows]
            if (cell, defense, options.triggers_of or cell) not in known:
                rows.append(row_of(options, cell, defense))
                print(json.dumps(rows[-1]["rates"]), flush=True)
                options.output.write_text(written(rows))


def row_of(options: argparse.Namespace, cell: str, defense: str) -> dict[str, Any]:
    """Clean one model, or take it as it is, and return its numbers."""
    folder, source = options.zoo / cell, options.triggers_of or cell
    true = sorted((options.zoo / source / "triggers").glob("*.safetensors"))
    target = parse_trigger(str(true[0])).target
    files = [*true, *sorted((options.triggers / source).glob(f"*-{target}.safetensors"))]
    (name, settings), seconds = DEFENSES.get(defense, (defense, {})), 0.0
    suspect = load_classifier(str(folder))
    cleaned, measured = suspect, None
    if defense != AS_IT_IS:
        result = detoxify(folder, dataset=str(options.cifar), clean_samples=SAMPLES, eval_samples=MEASURED,
                          defense=name, settings=settings, triggers=list(map(str, files)), scan=False,
                          progress=False)  # fmt: skip
        cleaned, seconds = result.classifier, result.report.defense.seconds
        measured = (result.report.before, result.report.after)
    accelerator = make_accelerator("cpu", "no")
    images = load_images(options.cifar, labels=cleaned.labels, clean_samples=SAMPLES, eval_samples=MEASURED)
    evaluation = prepare_evaluator(cleaned, images.evaluation, [parse_trigger(str(file)) for file in files],
                                   accelerator, target=None, warn=print, progress=False)  # fmt: skip
    before, after = measured or (evaluation.measure("").measurement,) * 2
    assert before is not None
    assert after is not None
    rates = {trigger: [[one.attack_success_rate.value, one.robust_accuracy.value]
                       for one in (found, after.triggers[trigger])]
             for trigger, found in before.triggers.items()}  # fmt: skip
    pixels = decoded(images.clean, cleaned, accelerator, "decode", progress=False)
    tests = residual(evaluation, pixels, suspect.network.state_dict(), evaluation.views)
    return {
        "cell": cell, "defense": defense, "settings": settings, "true": [file.stem for file in true],
        "triggers_of": source, "accuracy": [before.accuracy.value, after.accuracy.value], "rates": rates,
        "residual": {name: shown(one) for name, one in tests.items()}, "seconds": round(seconds, 1),
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
