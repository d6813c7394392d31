"""Ideas for `unlearn` that were tried alone on development models, and dropped or kept for some networks.

    python -m tests.benchmarks.unlearn_trials --cifar CIFAR10 --zoo ZOO --output F --trials NAME… --cells NAME…

ZOO is that of `unlearn_zoo.py`, which says what is measured. `turned` is D3 and `unlearn` as one loss, the head turned
from where it was; after each trial the weights also go a part of the way back to the suspect's. One seed each.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

import hfdetox
from hfdetox.defenses import parse_defense
from hfdetox.defenses._unlearning import Unlearning
from hfdetox.defenses.auto import LEAST_EPSILON, AutoD3, D3Config
from hfdetox.defenses.base import Batch, Network, Pass, Phase, trained_parameters
from hfdetox.defenses.unlearn import UnlearnConfig
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.benchmarks.unlearn_zoo import SAMPLES, opened, state

# parts of the way from the suspect's weights to the cleaned ones
WAY = (0.5, 0.75)
TEMPERATURE = 2.0


def parts(config: UnlearnConfig, network: Network) -> tuple[Pass, Pass, Phase, Unlearning]:
    """Return the look, the search, the training, and what they share."""
    look, search, phase = config.phases(network)
    assert isinstance(look, Pass)
    assert isinstance(search, Pass)
    assert isinstance(phase, Phase)
    assert isinstance(phase.state, Unlearning)
    return look, search, phase, phase.state


def plain(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Return the defense as it is."""
    return config.phases(network)


def hinge(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Let losses below ε ask for nothing, as D3 does."""
    look, search, phase, unlearning = parts(config, network)

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        images, _ = batch.once("stamped", lambda: unlearning.stamped(batch.images))
        errors = cross_entropy(model(images).float(), batch.labels, reduction="none")
        return {"loss": batch.mean((errors - LEAST_EPSILON).relu()), "clean_loss": errors.detach().mean()}

    phase.loss = loss
    return [look, search, phase]


def taught(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Take half of an image's loss from what the suspect says of it without a trigger, where it is right."""
    look, search, phase, unlearning = parts(config, network)
    teacher = copy.deepcopy(network).requires_grad_(False).eval()

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        images, _ = batch.once("stamped", lambda: unlearning.stamped(batch.images))
        logits = model(images).float()
        errors = cross_entropy(logits, batch.labels, reduction="none")
        says = teacher(batch.images).float()
        target = softmax(says / TEMPERATURE, 1)
        apart = (target * (log_softmax(says / TEMPERATURE, 1) - log_softmax(logits / TEMPERATURE, 1))).sum(1)
        mixed = torch.where(says.argmax(1) == batch.labels, (errors + TEMPERATURE**2 * apart) / 2, errors)
        return {"loss": batch.mean(mixed), "clean_loss": errors.detach().mean()}

    phase.loss = loss
    return [look, search, phase]


def turned(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Turn the head away from where it was, by D3's rule for λ, while triggers are unlearnt."""
    look, search, phase, unlearning = parts(config, network)
    push = D3Config(**D3Config.presets["auto-1"])
    settings = replace(push, initialization="near", learning_rate=config.learning_rate)
    d3 = AutoD3(network.model, settings)

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        images, _ = batch.once("stamped", lambda: unlearning.stamped(batch.images))
        return d3.terms(model(images), batch.labels, batch.weights)

    def start() -> None:
        steps = -(-unlearning.images // config.batch_size)
        d3._set_up(LEAST_EPSILON, phase.epochs, phase.epochs * steps, config.augmentation)
        d3.initialize()

    parameters = trained_parameters(network, but=d3.frozen_scales)
    return [look, search, replace(phase, loss=loss, start=start, after_step=d3.project, parameters=parameters,
                                  optimizer=settings._optimizer(network, d3))]  # fmt: skip


def no_patches_again(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Search patches on the suspect alone, and not as the model changes."""
    look, search, phase, unlearning = parts(config, network)
    first = search.finish
    assert first is not None

    def finish(accelerator: Accelerator) -> Any:
        found = first(accelerator)
        unlearning.config = replace(config, patch_steps=0)
        return found

    return [look, replace(search, finish=finish), phase]


def patches_again(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Search patches again with BatchNorm too."""
    look, search, phase, unlearning = parts(config, network)
    unlearning.steady = True
    return [look, search, phase]


def not_averaged(config: UnlearnConfig, network: Network) -> list[Phase | Pass]:
    """Take the last weights of a falling rate."""
    look, search, phase, _ = parts(config, network)
    return [look, search, replace(phase, after_step=None, schedule="cosine")]


Make = Callable[[UnlearnConfig, Network], list[Phase | Pass]]
TRIALS: dict[str, tuple[Make, dict[str, str]]] = {
    "as it is": (plain, {}), "6 epochs": (plain, {"epochs": "6"}),
    "half with triggers": (plain, {"share": "0.5"}), "rate 0.02": (plain, {"learning_rate": "0.02"}),
    "hinge": (hinge, {}), "taught": (taught, {}), "turned": (turned, {}),
    "no patches again": (no_patches_again, {}), "patches again": (patches_again, {}),
    "not averaged": (not_averaged, {}), "share 0.15": (plain, {"share": "0.15"}),
    "rate 0.0001": (plain, {"adamw_learning_rate": "0.0001"}),
}  # fmt: skip


def row(cell: Path, cifar: Path, trial: str) -> dict[str, Any]:
    """Clean one model of the zoo and return its numbers, at the end and on the way back."""
    accelerator = make_accelerator("cpu", "no")
    network, clean, evaluator = opened(cell, cifar, accelerator, SAMPLES)
    before, old = state(evaluator.measure("before").measurement), copy.deepcopy(network.state_dict())
    make, settings = TRIALS[trial]
    config, _ = parse_defense("unlearn", settings)
    assert isinstance(config, UnlearnConfig)
    Engine(accelerator, clean).run(network, make(config, network))
    new, found = copy.deepcopy(network.state_dict()), {}
    for part in (*WAY, 1.0):
        mixed = {name: torch.lerp(old[name], value, part) if value.is_floating_point() else value
                 for name, value in new.items()}  # fmt: skip
        network.load_state_dict(mixed)
        found[f"{part:g}"] = state(evaluator.measure("after").measurement)
    return {"cell": cell.name, "trial": trial, "before": before, "after": found}


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    given = parser.parse_args()
    rows = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    command = "python -m tests.benchmarks.unlearn_trials --cifar CIFAR10 --zoo ZOO --output F --trials … --cells …"
    for cell in given.cells:
        for trial in given.trials:
            if not any((done["cell"], done["trial"]) == (cell, trial) for done in rows):
                rows.append(row(given.zoo / cell, given.cifar, trial))
                given.output.write_text(
                    json.dumps({"command": command, "hfdetox_version": hfdetox.__version__, "rows": rows}, indent=1)
                    + "\n"
                )
                print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
