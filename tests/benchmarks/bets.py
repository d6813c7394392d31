"""Ideas for `d3:auto` that were measured alone, on models of the development half; each is a change of one arm.

    python -m tests.benchmarks.bets --cifar CIFAR10 --zoos ZOO ZOO-BASE HELD --output bets.json --arms … --cells …
        [--samples 500] [--seed 1]

- `unlearn …` and `push …` are other settings of the defenses.
- `patches again`: patches are searched again during the training with BatchNorm too.
- `generator`: besides blends and patches, a network of three convolutions that adds up to 25 grey levels to an image,
  trained for each accused class, and again at each search; half of the triggered images get its trigger.
- `waves`: half of the triggered images get a grating of a random frequency (up to 8 an image), phase and amplitude (10
  to 50 grey levels) in place of a trigger that was searched; `waves too`: so does a sixth of all images besides.
- `unlearn, taught`: it also keeps to what the suspect says of the same images without triggers.
- `pushed anyway`: `d3:auto`, whose push stamps what the search found on a sixth of the images, with something or
  nothing that speaks for a backdoor; not taught, or as strongly as the labels.
- `rows`: the push turns the rows of the head of the attack's true target alone, the best that an accusation can do.
- `push taught`: the push also keeps to what the suspect model says of the same mixed images; `unlearn, push taught`:
  first `unlearn, waves too`, whose result is the teacher; `push taught, waves`: a quarter of the images,
  or a tenth (`few waves`), has a grating that the teacher does not see; `statistics`: those of BatchNorm are
  measured anew in the end, without gratings.
  `late` and `last`: after 60 and 80 % of the steps. `harder` and `hardest`: 3 and 10 times as strongly.
- `bounds`: no training; UNIT's bounds on activations (arXiv 2407.11372), the masked teacher: each channel is cut at a
  bound that starts at mean + 4σ, and 300 steps of Adam tighten them while the clean accuracy of a fifth of the images,
  held out, falls by at most 3 points.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hfdetox
from hfdetox.defenses import _by_evidence, parse_defense
from hfdetox.defenses._unlearning import Unlearning
from hfdetox.defenses.d3 import D3, project_to_sphere, start_weight
from hfdetox.models.network import Network
from hfdetox.training.batches import source_loader
from hfdetox.training.devices import make_accelerator
from hfdetox.training.distillation import Teacher
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Pass
from hfdetox.training.statistics import Statistics
from tests.benchmarks.unit_bounds import bound
from tests.benchmarks.unlearn_zoo import SAMPLES, opened, states, table

# the strongest trigger of the generator, and its steps, in grey levels
_BOUND, _STEPS, _BATCH = 25.0, 40, 48


class Generator(nn.Sequential):
    """Add up to 25 grey levels to images (N×C×H×W, 0 to 255)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, channels, 3, padding=1), nn.Tanh())  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return (images + _BOUND * super().forward(images / 127.5 - 1)).clamp(0, 255)


@contextmanager
def generator() -> Iterator[None]:
    """Let `Unlearning` train generators at each search, and use them for half of the triggered images."""
    begin, stamped = Unlearning._begin_search, Unlearning.stamped
    made: list[Generator] = []

    def begin_search(self: Unlearning, accelerator: Any) -> Any:
        images, classes, drawn = begin(self, accelerator)
        made[len(made) :] = [Generator(images.shape[1]) for _ in classes[len(made) :]]
        frozen = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for one, wanted in zip(made, classes, strict=True):
                adam = torch.optim.Adam(one.parameters(), 5e-3)
                for _ in range(_STEPS):
                    some = images[torch.randperm(len(images), generator=drawn)[:_BATCH]].float()
                    loss = cross_entropy(self.network(one(some)).float(), torch.full((len(some),), wanted))
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
        for parameter in frozen:
            parameter.requires_grad_(True)
        return images, classes, drawn

    def stamp(self: Unlearning, images: Tensor) -> tuple[Tensor, Tensor]:
        found, carry = stamped(self, images)
        chosen = (carry & (torch.rand(len(images)) < 0.5)).nonzero().flatten()
        which = torch.randint(len(made), (len(chosen),))
        with torch.no_grad():
            for place, one in enumerate(made):
                mine = chosen[which == place]
                found[mine] = one(images[mine].float())
        return found, carry

    with (mock.patch.object(Unlearning, "_begin_search", begin_search),
          mock.patch.object(Unlearning, "stamped", stamp)):  # fmt: skip
        yield


def gratings(images: Tensor) -> Tensor:
    """Return images (N×C×H×W, float32, 0 to 255) with a random grating each.

    `hfdetox.training.gratings` came later, and draws the same numbers in another order than these rows were made with.
    """
    height, width = images.shape[-2:]
    rows, columns = torch.arange(height).view(-1, 1) / height, torch.arange(width).view(1, -1) / width
    turns = 16 * torch.rand(len(images), 2, 1, 1) - 8
    phase, amplitude = 2 * math.pi * torch.rand(len(images), 1, 1), 10 + 40 * torch.rand(len(images), 1, 1)
    added = amplitude * torch.sin(2 * math.pi * (turns[:, 0] * rows + turns[:, 1] * columns) + phase)
    return (images + added[:, None]).clamp(0, 255)


def waves(instead: bool = True) -> AbstractContextManager[Any]:
    """Let half of the triggered images carry a random grating instead, or a quarter of those without."""
    stamped = Unlearning.stamped

    def stamp(self: Unlearning, images: Tensor) -> tuple[Tensor, Tensor]:
        found, carry = stamped(self, images)
        drawn = carry & (torch.rand(len(images)) < 0.5) if instead else ~carry & (torch.rand(len(images)) < 1 / 4)
        chosen = drawn.nonzero().flatten()
        found[chosen] = gratings(images[chosen].float())
        return found, carry | drawn

    found: AbstractContextManager[Any] = mock.patch.object(Unlearning, "stamped", stamp)
    return found


@contextmanager
def unlearn_taught(strength: float) -> Iterator[None]:
    """Let `unlearn` keep to what the model said, as it came, of the images without their triggers."""
    made = Unlearning.__init__

    def init(self: Any, network: Network, *arguments: Any, **named: Any) -> None:
        made(self, network, *arguments, **named)
        self.teacher = Teacher(network)

    def terms(self: Any, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, _ = batch.once("stamped", lambda: self.stamped(batch.images))
        logits = model(images)
        errors = batch.mean(cross_entropy(logits.float(), batch.labels, reduction="none"))
        kept = self.teacher.divergence(batch.images, logits, batch.weights)
        return {"loss": errors + strength * kept, "clean_loss": errors.detach()}

    with (mock.patch.object(Unlearning, "__init__", init),
          mock.patch.object(Unlearning, "terms", terms)):  # fmt: skip
        yield


def not_evident() -> AbstractContextManager[Any]:
    """Let `d3:auto` push although something speaks for a backdoor: the triggers that it found are stamped there."""
    return mock.patch.object(_by_evidence, "evident", return_value=False)


@contextmanager
def patches_again() -> Iterator[None]:
    """Search patches again with BatchNorm too."""
    again = Unlearning._search_again

    def search(self: Unlearning, accelerator: Any) -> dict[str, float]:
        self.steady, kept = True, self.steady
        found = again(self, accelerator)
        self.steady = kept
        return found

    with mock.patch.object(Unlearning, "_search_again", search):
        yield


@contextmanager
def rows(label: int) -> Iterator[None]:
    """Let D3 turn the row of the head that belongs to `label`, and leave the others to the loss."""
    made = D3.__init__

    def init(self: D3, model: nn.Module, config: Any) -> None:
        made(self, model, config)
        self.initial = {name: old[label : label + 1].clone() for name, old in self.initial.items()}

    def turned(self: D3, name: str) -> Tensor:
        weight = self.weights[name].float()
        return self._centred(name, weight)[label : label + 1]

    @torch.no_grad()
    def initialize(self: D3) -> None:
        for name, weight in self.weights.items():
            weight[label : label + 1] = weight.mean(0) + start_weight(self.initial[name], self.config.initialization)

    @torch.no_grad()
    def cosine(self: D3) -> Tensor:
        return torch.stack([torch.cosine_similarity(turned(self, name).flatten(), old.flatten(), dim=0)
                            for name, old in self.initial.items()]).mean()  # fmt: skip

    def terms(self: D3, logits: Tensor, labels: Tensor, sample_weights: Any = None, mixed_labels: Any = None,
                     share: float = 1.0, kept: Any = None) -> dict[str, Tensor]:  # fmt: skip
        clean = cross_entropy(logits.float(), labels, reduction="none")
        if mixed_labels is not None:
            clean = torch.lerp(cross_entropy(logits.float(), mixed_labels, reduction="none"), clean, share)
        shares = clean.new_full((), 1 / len(clean)) if sample_weights is None else sample_weights
        penalty = (shares * torch.relu(clean - self.epsilon)).sum()
        distance = torch.stack([(turned(self, name) - old).norm() for name, old in self.initial.items()]).sum()
        return {"loss": self.objective(penalty, distance), "clean_loss": (shares * clean).sum().detach(),
                "penalty": penalty.detach(), "distance": distance.detach(), "cosine": self.cosine()}  # fmt: skip

    @torch.no_grad()
    def project(self: D3) -> None:
        for name, weight in self.weights.items():
            row = turned(self, name)
            weight[label : label + 1] += project_to_sphere(row, self.initial[name].norm()) - row

    with ExitStack() as stack:
        for name, function in {"__init__": init, "initialize": initialize, "cosine": cosine, "terms": terms,
                               "project": project}.items():  # fmt: skip
            stack.enter_context(mock.patch.object(D3, name, function))
        yield


def taught(phase: Any, teacher: Teacher, waved: float, late: float) -> None:
    """Let the push keep to the teacher's answers (KL at a temperature of 2) as strongly as to the labels.

    From the share `late` of the steps on. The share `waved` of the images has a grating when the model sees them, and
    none when the teacher does.
    """
    loss = phase.loss

    def both(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []

        def through(images: Tensor) -> Tensor:
            shown = images
            if waved:
                chosen = (torch.rand(len(images)) < waved).nonzero().flatten()
                shown = images.float().clone()
                shown[chosen] = gratings(shown[chosen])
            seen.append((images, model(shown)))
            return seen[0][1]

        found = loss(through, batch)
        images, logits = seen[0]
        strength = phase.state.lambda_ * (phase.state.step >= late * phase.state.steps)
        return {
            **found,
            "loss": found["loss"] + strength / (strength + 1) * teacher.divergence(images, logits, batch.weights),
        }

    phase.loss = both


def _statistics(network: Network) -> Pass:
    statistics = Statistics(network)
    return Pass(name="statistics", on_batch=statistics.on_batch, batch_size=256,
                finish=lambda accelerator: {"passes": float(statistics.finish(accelerator))})  # fmt: skip


LATE = {"push taught late, few waves": 0.6, "push taught last, few waves": 0.8}
FEW = ("push taught late, few waves", "push taught last, few waves", "push taught, few waves",
       "push taught, few waves, statistics")  # fmt: skip
WAVED = {"push taught, waves": 0.25, "push taught, waves, statistics": 0.25, **dict.fromkeys(FEW, 0.1)}
ARMS: dict[str, tuple[str, dict[str, str], Callable[[], Any] | None]] = {
    "unlearn": ("unlearn", {}, None),
    "unlearn, patches again": ("unlearn", {}, patches_again),
    "unlearn, generator": ("unlearn", {}, generator),
    "unlearn, waves": ("unlearn", {}, waves),
    "unlearn, waves too": ("unlearn", {}, partial(waves, instead=False)),
    "unlearn, taught": ("unlearn", {}, partial(unlearn_taught, 1.0)),
    "push": ("d3:auto-1", {}, None),
    "push to -0.05": ("d3:auto-1", {"cosine": "-0.05"}, None),
    "push taught": ("d3:auto-1", {}, None),
    "push taught, waves": ("d3:auto-1", {}, None),
    "push taught, few waves": ("d3:auto-1", {}, None),
    "push taught late, few waves": ("d3:auto-1", {}, None),
    "push taught last, few waves": ("d3:auto-1", {}, None),
    "push taught harder, few waves": ("d3:auto-1", {"distillation": "3", "gratings": "0.1"}, None),
    "push taught hardest, few waves": ("d3:auto-1", {"distillation": "10", "gratings": "0.1"}, None),
    "push taught, few waves, statistics": ("d3:auto-1", {}, None),
    "unlearn, push taught": ("d3:auto-1", {}, None),
    "push, rows": ("d3:auto-1", {}, None),
    "pushed anyway, not taught": ("d3:auto", {"distillation": "0", "gratings": "0.1"}, not_evident),
    "pushed anyway, taught": ("d3:auto", {"distillation": "1", "gratings": "0.1"}, not_evident),
    "bounds": ("", {}, None),
}


def cleaned(cell: Path, cifar: Path, arm: str, samples: int, seed: int) -> dict[str, Any]:
    """Clean one model and return its numbers."""
    accelerator, (defense, settings, changed) = make_accelerator("cpu", "no"), ARMS[arm]
    network, clean, evaluator = opened(cell, cifar, accelerator, samples, seed=seed)
    before = states(evaluator.measure("before").measurement)[0]
    row = {"cell": cell.name, "arm": arm, "samples": samples, "seed": seed, "before": before}
    if not defense:
        parts = [list(range(start, min(start + 250, len(clean)))) for start in range(0, len(clean), 250)]
        batches = list(source_loader(clean, parts, accelerator.device))
        found = bound(network.eval(), torch.cat([part[1] for part in batches]).float(),
                      torch.cat([torch.as_tensor(part[2]) for part in batches]))  # fmt: skip
        return {**row, "after": states(evaluator.measure("after").measurement)[0], **found, "passes": 300 * 128}
    label = int(cell.name.split("-to-")[1][0]) if "-to-" in cell.name and "all-to-all" not in cell.name else 0
    if arm == "push, rows":
        changed = partial(rows, label)
    first = 0.0
    if arm == "unlearn, push taught":
        with waves(instead=False):
            config, _ = parse_defense("unlearn", {})
            done = Engine(accelerator, clean, seed=seed).run(network, config.phases(network))
        first = done.images + sum(entry.get("passes", 0) / 2 for entry in done.history)
    with changed() if changed else nullcontext():
        config, _ = parse_defense(defense, settings)
        phases = config.phases(network)
        if "taught" in arm and defense == "d3:auto-1" and not settings:
            taught(
                phases[-1],
                Teacher(network),
                waved=WAVED.get(arm, 0.0),
                late=LATE.get(arm, 0.0),
            )
        if arm.endswith("statistics"):
            phases.append(_statistics(network))
        done = Engine(accelerator, clean, seed=seed).run(network, phases)
    passes = first + done.images + sum(entry.get("passes", 0) / 2 for entry in done.history)
    turned = [round(entry["cosine"], 2) for entry in done.history if "cosine" in entry][-1:]
    return {**row, "after": states(evaluator.measure("after").measurement)[0], "passes": round(passes),
            "seconds": round(done.seconds), "cosine": turned}  # fmt: skip


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--zoos", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for arm, cell in [(arm, cell) for arm in given.arms for cell in given.cells]:
        done = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
        if (cell, arm, given.samples, given.seed) in [(r["cell"], r["arm"], r["samples"], r["seed"]) for r in done]:
            continue
        path = next(zoo / cell for zoo in given.zoos if (zoo / cell).exists())
        done.append(cleaned(path, given.cifar, arm, given.samples, given.seed))
        lines = ",\n".join(f"  {json.dumps(row)}" for row in done)
        given.output.write_text(f'{{\n "hfdetox_version": "{hfdetox.__version__}",\n "rows": [\n{lines}\n ]\n}}\n')
        print(table([{**done[-1], "cell": f"{cell}:{given.samples}:{given.seed}"}]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
