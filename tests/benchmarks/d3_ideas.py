"""Ideas for `d3:auto-1` that were measured and dropped: averaged weights, distillation, BatchNorm measured anew.

    hfdetox attack --suite examples/d3_auto.yaml --dataset CIFAR10 --output ZOO1
    python -m tests.benchmarks.d3_ideas --cifar CIFAR10 --zoo ZOO1 --output d3_ideas.json [--cells NAME…]

2,500 clean images, all 10,000 test images, seed 0, `d3:auto-1` beside it with one idea added. The file is written after
every row; a row that is there is not run again. The models cleaned by `d3:auto-1` stay in ZOO1.ideas/CELL: one idea
distils from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from hfdetox import D3Config, detoxify
from hfdetox.defenses.bn import BNConfig
from hfdetox.models.classifier import load_classifier
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase

SAMPLES = 2500
# an average that starts at the first steps must not keep the start for long
WARM_UP = 10


@dataclass(frozen=True, kw_only=True)
class IdeaConfig(D3Config):
    """D3 with one thing more.

    Attributes:
        decay: of the running average of weights and statistics, a step.
        average: end with the running average in place of the last weights.
        teacher: whose probabilities are learnt besides the labels: those of the `suspect` model, of the running
            `average`, or of a `copy` that was cleaned before.
        copied: folder of that copy.
        weight: of KL(teacher ‖ model), beside the hinge's 1 (both get the factor λ / (λ + 1)).
        statistics: measure BatchNorm's statistics anew in the end, on the clean images as they are.
    """

    name: ClassVar[str] = "d3-idea"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"auto": D3Config.presets["auto-1"]}

    decay: float = 0.95
    average: bool = False
    teacher: Literal["none", "suspect", "average", "copy"] = "none"
    copied: str = ""
    weight: float = 1.0
    statistics: bool = False

    def phases(self, network: Network) -> list[Phase | Pass]:
        phases = super().phases(network)
        phase = phases[-1]
        assert isinstance(phase, Phase)
        mean = copy.deepcopy(network).eval().requires_grad_(False)
        if self.average or self.teacher == "average":
            follow(phase, network, mean, self.decay)
        if self.teacher != "none":
            teacher = load_classifier(self.copied).network.eval() if self.teacher == "copy" else mean
            distil(phase, teacher, self.weight)
        if self.average:
            phases.append(replacing(network, mean))
        return phases + (BNConfig().phases(network) if self.statistics else [])


def follow(phase: Phase, network: nn.Module, mean: nn.Module, decay: float) -> None:
    """Make `mean` the running average of the weights and statistics of `network`, from the phase's start."""
    start, after, steps = phase.start, phase.after_step, 0
    assert start is not None
    assert after is not None

    def begin() -> None:
        start()
        mean.load_state_dict(network.state_dict())

    def move() -> None:
        nonlocal steps
        after()
        steps += 1
        share = min(decay, (1 + steps) / (WARM_UP + steps))
        for kept, now in zip(mean.state_dict().values(), network.state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(now.to(kept.dtype), 1 - share)

    phase.start, phase.after_step = begin, move


def distil(phase: Phase, teacher: nn.Module, weight: float) -> None:
    """Add the divergence from the teacher's probabilities on the very images that the loss sees."""
    plain = phase.loss

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        divergences = []

        class Seen(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                logits = model(images)
                with torch.no_grad():
                    wanted = teacher(images)
                ours, theirs = (log_softmax(values.float(), 1) for values in (logits, wanted))
                divergences.append(kl_div(ours, theirs, log_target=True, reduction="batchmean"))
                return logits

        terms = plain(Seen(), batch)
        strength = terms["lambda"] / (terms["lambda"] + 1)
        return {**terms, "loss": terms["loss"] + weight * strength * divergences[0]}

    phase.loss = loss


def replacing(network: nn.Module, mean: nn.Module) -> Pass:
    """Return a pass that puts the averaged weights into the network."""

    def finish(accelerator: Accelerator) -> None:
        network.load_state_dict(mean.state_dict())

    return Pass(name="d3-average", on_batch=lambda module, batch: None, finish=finish)


IDEAS: dict[str, dict[str, Any]] = {
    "d3:auto": {},
    "averaged weights": {"average": True},
    "distillation from the suspect model": {"teacher": "suspect"},
    "distillation from a cleaned copy": {"teacher": "copy"},
    "distillation from the running average": {"teacher": "average"},
    "… four times as strong": {"teacher": "average", "weight": 4.0},
    "statistics measured anew": {"statistics": True},
}


def row(cell: Path, cifar: Path, idea: str) -> dict[str, Any]:
    """Clean one model with an idea and return its numbers."""
    first = cell.parent.with_name(cell.parent.name + ".ideas") / cell.name
    config = IdeaConfig(**{**IdeaConfig.presets["auto"], **IDEAS[idea], "copied": str(first)})
    triggers = [str(file) for file in sorted((cell / "triggers").glob("*.safetensors"))]
    result = detoxify(cell, dataset=cifar, clean_samples=SAMPLES, triggers=triggers, defense=config)
    if not IDEAS[idea]:
        result.save(first)
    plain = result.report.to_dict()
    trigger = next(iter(plain["after"]["triggers"]))
    states = {
        when: {
            "accuracy": plain[when]["accuracy"]["value"],
            "attack_success_rate": plain[when]["triggers"][trigger]["attack_success_rate"]["value"],
        }
        for when in ("before", "after")
    }
    return {
        "cell": cell.name,
        "idea": idea,
        "settings": IDEAS[idea],
        **states,
        "der": plain["defense_effectiveness_rating"][trigger]["value"],
        "seconds": plain["defense"]["seconds"],
    }


def main() -> None:
    """Run the rows that are missing and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["resnet-lf-0.1-s0", "resnet-blended-0.1-s0"])
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    for cell in arguments.cells:
        for idea in IDEAS:
            if any((done["cell"], done["idea"]) == (cell, idea) for done in rows):
                continue
            rows.append(row(arguments.zoo / cell, arguments.cifar, idea))
            command = f"python -m tests.benchmarks.d3_ideas --cifar CIFAR10 --zoo ZOO1 --output {arguments.output.name}"
            arguments.output.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")
            before, after = rows[-1]["before"], rows[-1]["after"]
            rates = ", ".join(
                f"{short} {100 * before[key]:.1f} → {100 * after[key]:.1f}"
                for short, key in (("ACC", "accuracy"), ("ASR", "attack_success_rate"))
            )
            print(f"{cell}, {idea}: {rates}, DER {100 * rows[-1]['der']:.1f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
