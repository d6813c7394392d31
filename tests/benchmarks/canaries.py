"""Does a backdoor that we plant ourselves tell what a recipe leaves of the attacker's? A study, with its rule.

    python -m tests.benchmarks.canaries run --cifar CIFAR10 --zoo ZOO --output canaries.jsonl [--cells NAME…]
    python -m tests.benchmarks.canaries count canaries.jsonl --output tests/benchmarks/results/canaries.json

The rule, written before any cleaned model was looked at:

- Four canaries go into ONE copy of a backdoored model, with the 2,500 clean images alone: a patch, a blend, a warp, and
  another patch on few images, each with a target of its own that is not the attacker's. In each step the first images
  carry them; the others are held by KL to what the model said before. A canary counts where its ASR is at least 90 %
  before cleaning; a model counts where at least two do and the true trigger still has at least 30 % in the copy.
- The same recipe, in several strengths so that some fail, cleans the copy and, apart from it, the model as it came.
  The number of a cell is the mean ASR of its canaries that count. It is held against the true trigger's ASR on the same
  cleaned copy, and against that on the cleaned model itself, which is what a user would want to know.
- `--canaries` is built if both differences are at most 10 points in at least 80 % of the cells. The largest canary, and
  each kind of canary by itself, are counted too, to explore, and decide nothing.
- What the planting is (shares, rate, epochs) was chosen on resnet-b-noise-to-5-0.1-s2 by what the copy is before
  cleaning: the canaries' ASR, the true trigger's and the accuracy.

Added once it was clear that there was time for few models alone: fewer than 8 decide nothing, and nothing is built.

One JSON line a model and recipe; a line that is there is not measured again.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hfdetox.data.cache import Pixels
from hfdetox.defenses import parse_defense
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.models.layers import has_batch_norm
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from hfdetox.triggers import parse_triggers
from hfdetox.triggers.badnets import BadNets
from hfdetox.triggers.base import Trigger
from hfdetox.triggers.blended import Blended
from hfdetox.triggers.wanet import WaNet
from tests.benchmarks.unlearn_zoo import opened

# a canary's kind: the share of each step, and its trigger; none is at a place of the zoo's own triggers
SHARES = {"patch": 0.064, "blend": 0.064, "warp": 0.12, "few": 0.024}
PLANT_EPOCHS, PLANT_BATCH, PLANT_RATE, PLANT_ADAMW = 16, 125, 0.015, 3e-4
# how much the held answers weigh against the planted ones; the share of a step that each kind of decoy takes
HELD, DECOYS = 5.0, 0.06
# a recipe: a defense and its settings
RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "ft, 1 epoch": ("ft", {"epochs": "1"}),
    "ft, 3 epochs": ("ft", {"epochs": "3"}),
    "ft, 3 epochs at 0.05": ("ft", {"epochs": "3", "learning_rate": "0.05"}),
    "d3:paper, 3 epochs": ("d3:paper", {"epochs": "3"}),
    "unlearn": ("unlearn", {}),
}
SAMPLES, MEASURED = 2500, 1000
TOOK, STILL_THERE, LEAST, NEAR, ENOUGH, MODELS = 0.9, 0.3, 2, 0.1, 0.8, 8


def canaries(taken: Iterable[int], classes: int) -> list[Trigger]:
    """Return the four triggers, each with a target of its own that is not `taken`."""
    free = [label for label in range(classes) if label not in set(taken)]
    targets = [free[place * len(free) // len(SHARES)] for place in range(len(SHARES))]
    generator = torch.Generator().manual_seed(101)
    # a coarse picture is blended in, for noise is what the decoys and some of the zoo's own triggers are
    picture, coarse = (torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8) for _ in range(2))
    made = [BadNets(name="patch", mode="input", size=5, right=26, bottom=26),
            Blended(name="blend", mode="input", alpha=0.25, image=coarse),
            WaNet(name="warp", mode="input", k=4, s=3.0, seed=103),
            BadNets(name="few", mode="input", size=4, image=picture, right=2, bottom=26)]  # fmt: skip
    for trigger, target in zip(made, targets, strict=True):
        object.__setattr__(trigger, "target", target)
    return list(made)


def decoys(step: int, size: int) -> list[Trigger]:
    """Return triggers of the same kinds that no step has twice; what the model says of them is held too."""
    draw = np.random.default_rng(step)
    picture = torch.from_numpy(draw.integers(0, 256, (3, 4, 4), dtype=np.uint8))
    right, bottom = (int(place) for place in draw.integers(0, 28, 2))
    return [BadNets(mode="input", size=4, image=picture, right=right, bottom=bottom),
            Blended(mode="input", seed=1000 + step), WaNet(mode="input", s=2.0, seed=1000 + step)][:size]  # fmt: skip


def plant(network: Network, clean: Pixels, planted: list[Trigger], accelerator: Accelerator) -> None:
    """Train the triggers into the network, and hold its answers to images without one or with a decoy."""
    before, steps = copy.deepcopy(network).eval().requires_grad_(False), itertools.count()

    def counts(size: int) -> list[int]:
        return [max(1, round(SHARES[trigger.name or ""] * size)) for trigger in planted]

    def poison(images: Tensor, labels: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        images, labels, start = images.clone(), labels.clone(), 0
        for trigger, count in zip(planted, counts(rows.stop), strict=True):
            part = slice(start, start + count)
            images[part], labels[part], start = trigger.apply(images[part]), int(trigger.target or 0), start + count
        for trigger in decoys(next(steps), 3):
            part = slice(start, start + round(DECOYS * rows.stop))
            images[part], start = trigger.apply(images[part]), part.stop
        return images, labels

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        cut = sum(counts(len(batch.labels)))
        logits = model(batch.images).float()
        with torch.no_grad():
            wanted = log_softmax(before(batch.images[cut:]).float(), 1)
        held = kl_div(log_softmax(logits[cut:], 1), wanted, reduction="batchmean", log_target=True)
        return {"loss": HELD * held + cross_entropy(logits[:cut], batch.labels[:cut]), "held": held.detach()}

    normed = has_batch_norm(network.model)
    phase = Phase(
        name="plant", parameters=[p for p in network.parameters() if p.requires_grad], loss=loss, poison=poison,
        optimizer=(lambda p: torch.optim.SGD(p, PLANT_RATE, 0.9)) if normed
        else (lambda p: torch.optim.AdamW(p, PLANT_ADAMW)),
        epochs=PLANT_EPOCHS, batch_size=PLANT_BATCH, augmentation="flip",
    )  # fmt: skip
    Engine(accelerator, clean, seed=1).run(network, [phase])


def rates(evaluator: Evaluator, triggers: list[Trigger]) -> dict[str, Any]:
    """Return the accuracy and the ASR of each trigger, true and planted."""
    found = evaluator.with_triggers(triggers).measure("").measurement
    return {"accuracy": found.accuracy.value,
            "asr": {name: one.attack_success_rate.value for name, one in found.triggers.items()}}  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Plant, clean and measure what is missing."""
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {(one["cell"], one["recipe"]) for one in map(json.loads, lines)}
    cells = options.cells or sorted(file.parent.name for file in options.zoo.glob("*/attack_report.json"))
    for cell in cells:
        missing = [name for name in options.recipes if (cell, name) not in done]
        if missing and list((options.zoo / cell / "triggers").glob("*.safetensors")):
            for line in study(options.zoo / cell, options.cifar, missing):
                with options.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(cell, line["recipe"], line["copy"]["asr"], line["suspect"]["asr"], line["seconds"], flush=True)


def study(cell: Path, cifar: Path, recipes: list[str]) -> Iterable[dict[str, Any]]:
    """Yield the lines of one model."""
    accelerator = make_accelerator("cpu", "no")
    network, clean, evaluator = opened(cell, cifar, accelerator, SAMPLES, MEASURED)
    true = [view.trigger for view in evaluator.views]
    targets = [one.target for one in parse_triggers(sorted(map(str, (cell / "triggers").glob("*.safetensors"))))]
    planted = canaries([target for target in targets if isinstance(target, int)], len(evaluator.classifier.labels))
    before, begin = rates(evaluator, true), time.perf_counter()
    came = copy.deepcopy(network.state_dict())
    plant(network, clean, planted, accelerator)
    seconds, state = round(time.perf_counter() - begin), copy.deepcopy(network.state_dict())
    copied = rates(evaluator, [*true, *planted])
    print(cell.name, "planted", seconds, before, copied, flush=True)
    for recipe in recipes:
        begin, name_settings = time.perf_counter(), RECIPES[recipe]
        found = []
        for weights, triggers in ((state, [*true, *planted]), (came, true)):
            network.load_state_dict(weights)
            config, _ = parse_defense(*name_settings)
            Engine(accelerator, clean).run(network, config.phases(network))
            found.append(rates(evaluator, triggers))
            network.requires_grad_(True)
        yield {"cell": cell.name, "recipe": recipe, "true": [one.name for one in true], "before": before,
               "planted": copied, "plant_seconds": seconds, "copy": found[0], "suspect": found[1],
               "seconds": round(time.perf_counter() - begin)}  # fmt: skip


def count(options: argparse.Namespace) -> None:
    """Write the table and the numbers of the rule."""
    rows = [row for row in map(cell_row, map(json.loads, options.lines.read_text().splitlines())) if row]
    counted = [row for row in rows if row["counts"]]
    kinds: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "mean": lambda row: row["mean"],
        "largest": lambda row: max(row["canaries"].values()),
        **{kind: lambda row, kind=kind: row["canaries"].get(kind) for kind in SHARES},  # type: ignore[misc]
    }
    found = {against: {name: agreement([(said, row[against]) for row in counted if (said := of(row)) is not None])
                       for name, of in kinds.items()} for against in ("copy", "suspect")}  # fmt: skip
    # a study of fewer models decides nothing, and then nothing is built
    models = len({row["cell"] for row in counted})
    built = models >= MODELS and all((found[against]["mean"]["near"] or 0) >= ENOUGH for against in found)
    command = "python -m tests.benchmarks.canaries count canaries.jsonl --output canaries.json"
    head = {"command": command, "models": models, "built": built, "agreement": found}
    listed = ",\n".join("  " + json.dumps(row) for row in rows)
    options.output.write_text(
        json.dumps({**head, "rows": ["ROWS"]}, indent=1).replace('"ROWS"', "\n" + listed + "\n ") + "\n"
    )
    print(json.dumps(head, indent=1))


def cell_row(line: dict[str, Any]) -> dict[str, Any]:
    """Return what a line says of canaries and of the true trigger, and whether it counts."""
    true = line["true"][0]
    took = [kind for kind in SHARES if line["planted"]["asr"][kind] >= TOOK]
    there = line["planted"]["asr"][true] >= STILL_THERE
    left = {kind: round(line["copy"]["asr"][kind], 4) for kind in took}
    return {"cell": line["cell"], "recipe": line["recipe"], "counts": len(took) >= LEAST and there,
            "accuracy": [round(line[key]["accuracy"], 4) for key in ("before", "planted", "copy", "suspect")],
            "true": [round(line[key]["asr"][true], 4) for key in ("before", "planted")],
            "planted": {kind: round(line["planted"]["asr"][kind], 4) for kind in SHARES}, "canaries": left,
            "mean": round(float(np.mean(list(left.values()))), 4) if left else None,
            "copy": round(line["copy"]["asr"][true], 4), "suspect": round(line["suspect"]["asr"][true], 4),
            }  # fmt: skip


def agreement(pairs: list[tuple[float, float]]) -> dict[str, float | None]:
    """Return cells, rank correlation, mean absolute difference and the share within 10 points."""
    said, true = np.array(pairs).T if pairs else (np.zeros(0), np.zeros(0))
    apart = np.abs(said - true)
    if len(pairs) < 3:
        return {"cells": len(pairs), "rank": None, "apart": None, "near": None}
    rank = float(spearmanr(said, true).statistic)
    return {"cells": len(pairs), "rank": round(rank, 3), "apart": round(float(apart.mean()), 4),
            "near": round(float((apart <= NEAR).mean()), 4)}  # fmt: skip


def main() -> None:
    """Run the study, or count what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    for name in ("--cifar", "--zoo", "--output"):
        one.add_argument(name, type=Path, required=True)
    one.add_argument("--cells", nargs="+")
    one.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    one.set_defaults(do=run)
    two = commands.add_parser("count")
    two.add_argument("lines", type=Path)
    two.add_argument("--output", type=Path, required=True)
    two.set_defaults(do=count)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
