"""What a never-backdoored model says to the triggers of the models that `d3:auto` was tried on: ASR, cleaned or not.

    python -m tests.benchmarks.twins --cifar CIFAR10 --zoo HELD --twin resnet-clean-s32 --output auto_twins.json
        --cells resnet-sig-to-2-0.08-s33 …

The twin is a model of the same zoo, of the same network and as many epochs, whose training had no trigger. Its images
are those on which the runs of `unlearn_zoo` were measured. Rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import hfdetox
from hfdetox.config import DetoxOptions
from hfdetox.data.load import pull_images
from hfdetox.evaluation.evaluator import prepare_evaluator
from hfdetox.models.classifier import load_classifier
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import parse_triggers
from tests.benchmarks.unlearn_zoo import MEASURED, SAMPLES, states


def rows_of(zoo: Path, twin: str, cell: str, cifar: Path) -> list[dict[str, Any]]:
    """Return the rates of the twin for each trigger of the cell."""
    accelerator, classifier = make_accelerator("cpu", "no"), load_classifier(zoo / twin)
    options = DetoxOptions(model=str(zoo / twin), dataset=str(cifar), clean_samples=SAMPLES, eval_samples=MEASURED)
    images = pull_images(options, str(cifar), classifier, lambda _: None, progress=False)
    triggers = parse_triggers(sorted(map(str, (zoo / cell / "triggers").glob("*.safetensors"))))
    evaluator = prepare_evaluator(classifier, images.evaluation, triggers, accelerator, target=None,
                                  warn=lambda _: None, progress=False)  # fmt: skip
    return [{"cell": cell, "twin": twin, **{key: found[key] for key in ("trigger", "asr", "ra")}}
            for found in states(evaluator.measure("twin").measurement)]  # fmt: skip


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--twin", required=True, help="name of the model without a backdoor")
    parser.add_argument("--cells", nargs="+", required=True)
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for cell in options.cells:
        if any((row["cell"], row["twin"]) == (cell, options.twin) for row in rows):
            continue
        rows += rows_of(options.zoo, options.twin, cell, options.cifar)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.output.write_text(f'{{\n "hfdetox_version": "{hfdetox.__version__}",\n "rows": [\n{lines}\n ]\n}}\n')
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
