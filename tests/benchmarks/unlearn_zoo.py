"""The defense `unlearn` on the models of a zoo, beside plain fine-tuning: the phases alone, without reports and cards.

    hfdetox attack --suite examples/scan_base.yaml --dataset CIFAR10 --output zoo-base
    hfdetox attack --suite examples/scan_zoo.yaml --dataset CIFAR10 --output ZOO
    python -m tests.benchmarks.unlearn_zoo --cifar CIFAR10 --zoo ZOO --output unlearn_zoo.json [--cells NAME…]

2,500 clean images (`--samples`), 2,000 test images, seed 0 (`--seed`); the triggers are the zoo's own files and no
method sees them. A model with two triggers has a row for each. The file is written after every model; a row that is
there is not run again. These models are the development half: what was changed in the defense was chosen on some of
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import hfdetox
from hfdetox.config import DetoxOptions
from hfdetox.data.cache import Pixels
from hfdetox.data.load import pull_images
from hfdetox.defenses import parse_defense
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator
from hfdetox.evaluation.results import Measurement
from hfdetox.models.classifier import load_classifier
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.triggers import parse_triggers

# an arm's defense and its settings
ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "unlearn": ("unlearn", {}),
    "ft": ("ft", {"epochs": "3", "batch_size": "96", "augmentation": "flip", "weight_decay": "0"}),
    "d3:auto": ("d3:auto", {}),
    "d3:auto-1": ("d3:auto-1", {}),
    "d3:paper": ("d3:paper", {"epochs": "20"}),
    "ft-sam": ("ft-sam", {"epochs": "20"}),
    "nad": ("nad", {}),
    "bnp": ("bnp", {}),
    "sau": ("sau", {"epochs": "20"}),
}
SAMPLES, MEASURED = 2500, 2000


def opened(
    cell: Path, cifar: Path, accelerator: Accelerator, samples: int, measured: int = MEASURED, seed: int = 0
) -> tuple[Network, Pixels, Evaluator]:
    """Return the network of a cell, its clean images, and what it is measured on."""
    classifier = load_classifier(cell)
    options = DetoxOptions(model=str(cell), dataset=str(cifar), clean_samples=samples, eval_samples=measured,
                           seed=seed)  # fmt: skip
    images = pull_images(options, str(cifar), classifier, lambda _: None, progress=False)
    triggers = parse_triggers(sorted(map(str, (cell / "triggers").glob("*.safetensors"))))
    evaluator = prepare_evaluator(classifier, images.evaluation, triggers, accelerator, target=None,
                                  warn=lambda _: None, progress=False)  # fmt: skip
    return classifier.network, decoded(images.clean, classifier, accelerator, "decode", False), evaluator


def state(found: Measurement) -> dict[str, Any]:
    """Return accuracy and, of the first trigger, ASR, RA, accuracy without it and destination."""
    return states(found)[0]


def states(found: Measurement) -> list[dict[str, Any]]:
    """Return the same for each trigger, or the accuracy alone."""
    rows = []
    for name, trigger in found.triggers.items():
        goes, without = trigger.destination, trigger.accuracy_without
        assert goes is not None
        assert without is not None
        rows.append({"accuracy": found.accuracy.value, "trigger": name, "asr": trigger.attack_success_rate.value,
                     "ra": trigger.robust_accuracy.value, "without": without.value, "destination": goes.label,
                     "share": goes.rate.value, "excess": goes.excess.value})  # fmt: skip
    return rows or [{"accuracy": found.accuracy.value}]


def rows_of(cell: Path, cifar: Path, arm: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Clean one model of the zoo and return its numbers, a row for each trigger."""
    accelerator, (defense, settings) = make_accelerator("cpu", "no"), ARMS[arm]
    network, clean, evaluator = opened(cell, cifar, accelerator, samples, seed=seed)
    before = states(evaluator.measure("before").measurement)
    config, _ = parse_defense(defense, settings)
    done = Engine(accelerator, clean, seed=seed).run(network, config.phases(network))
    # an image through the network and back counts once
    passes = done.images + sum(entry.get("passes", 0) / 2 for entry in done.history)
    return [{"cell": cell.name, "arm": arm, "samples": samples, "seed": seed, "before": came, "after": left,
             "seconds": round(done.seconds), "steps": done.steps, "passes": round(passes),
             "choices": config.choices(done.history)[:2], "settings": settings}
            for came, left in zip(before, states(evaluator.measure("after").measurement), strict=True)]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, in percent and points."""
    lines = [
        "| model | method | ACC | cost | ASR | RA | into one class | passes |",
        "|---|---|---|---:|---|---|---|---:|",
    ]
    for entry in rows:
        before, after = entry["before"], entry["after"]
        numbers = [f"{100 * before['accuracy']:.1f} → {100 * after['accuracy']:.1f}",
                   f"{100 * (before['accuracy'] - after['accuracy']):.1f}"]  # fmt: skip
        if "asr" in after:
            numbers += [f"{100 * before[key]:.1f} → {100 * after[key]:.1f}" for key in ("asr", "ra")]
            numbers += [f"{100 * after['share']:.0f} ({100 * after['excess']:+.0f})"]
        else:
            numbers += ["–"] * 3
        lines.append(f"| {entry['cell']} | {entry['arm']} | {' | '.join(numbers)} | {entry['passes']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", help="names of models in the zoo; all that are done by default")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["unlearn", "ft"])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=0, help="of the images that are drawn, and of the defense")
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    cells = given.cells or sorted(file.parent.name for file in given.zoo.glob("*/attack_report.json"))
    for cell, arm in [(cell, arm) for cell in cells for arm in given.arms]:
        known = [(done["cell"], done["arm"], done["samples"], done.get("seed", 0)) for done in rows]
        if (cell, arm, given.samples, given.seed) in known:
            continue
        rows += rows_of(given.zoo / cell, given.cifar, arm, given.samples, given.seed)
        given.output.write_text(json.dumps({"hfdetox_version": hfdetox.__version__, "rows": rows}, indent=1) + "\n")
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
