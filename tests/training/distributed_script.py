"""What test_distributed.py runs in one process and in two: python -m tests.training.distributed_script OUT.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hfdetox.config import DetoxOptions
from hfdetox.defenses import parse_defense
from hfdetox.defenses.auto import D3Config
from hfdetox.detox import train
from hfdetox.evaluation.metrics import measure, predict
from hfdetox.runs.tracking import close_trackers
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from hfdetox.training.reweighting import Reweighting
from hfdetox.triggers import BadNets
from tests.attacks.toy_jobs import toy_classifier
from tests.defenses.pixels import corner_backdoored
from tests.evaluation.test_metrics import views
from tests.tiny_training import Scaled, ToyImages, convnet, quick_garbage, toy_pixels

SIDE = 16
CONFIG = D3Config(epochs=5, batch_size=16, learning_rate=0.02, augmentation="none")
# 61 images: four steps of 16 with a last one of 13, uneven over two processes, or five of 13 with a last one of 9
RUNS = {
    "whole": replace(CONFIG),
    "odd": replace(CONFIG, batch_size=13, epochs=4),
    "accumulated": replace(CONFIG, gradient_accumulation_steps=2),
    "augmented": replace(CONFIG, augmentation="crop-flip"),
    "clipped": replace(CONFIG, max_grad_norm=0.05),
}
_TUNED = {"epochs": "3", "batch_size": "16", "learning_rate": "0.02", "augmentation": "none"}
# run without BatchNorm, whose statistics on a CPU are those of a process's own part; ANP's and RNP's masks need it
DEFENSES: dict[str, dict[str, str]] = {
    "fst": {**_TUNED, "reweight": "class"}, "fp": _TUNED, "nc": {**_TUNED, "inversion_epochs": "3"},
    "sau": {**_TUNED, "learning_rate": "0.001", "steps": "2"},
    "ims": {"initial_rounds": "3", "free_rounds": "3", "sparse_rounds": "3", "batch_size": "16", "inner_steps": "2"},
    # pairs of blended images are of one process, and so are the stamps of `unlearn` in d3:auto
    "d3:auto-1": {**_TUNED, "min_steps": "10", "mixup": "0"}, "anp": _TUNED, "rnp": {**_TUNED, "epoch_images": "32"},
}  # fmt: skip
MASKED = ("anp", "rnp")
# fewer than processes, fewer than a batch, and more than one batch of every process
COUNTS = (1, 3, 37, 600)


def vit() -> Scaled:
    """Return a seeded ViT without dropout."""
    torch.manual_seed(0)
    model = timm.create_model(
        "test_vit", num_classes=3, img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    return Scaled(model)


def curve(network: Scaled, config: D3Config, accelerator: Accelerator) -> list[float]:
    """Train and return the loss of every step over all processes and parts."""
    (phase,) = config.phases(network)
    losses: list[torch.Tensor] = []
    loss: Callable[[nn.Module, Batch], dict[str, torch.Tensor]] = phase.loss

    def noting(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        values = loss(model, batch)
        losses.append(values["loss"].detach())
        return values

    phase.loss = noting
    Engine(accelerator, ToyImages(61, SIDE), seed=2).run(network, [phase])
    parts = torch.stack(losses).view(-1, config.gradient_accumulation_steps).mean(1)
    return accelerator.reduce(parts, "mean").tolist()


def defended(name: str, accelerator: Accelerator) -> tuple[list[float], bool]:
    """Run a defense; return the losses of its epochs, and whether every process has the same weights."""
    network = corner_backdoored(10)
    if name not in MASKED:
        network.model[1] = nn.Identity()  # type: ignore[index,operator]
    config, _ = parse_defense(name, DEFENSES[name])
    record = Engine(accelerator, ToyImages(61, seed=7), seed=3).run(network, config.phases(network))
    return [entry["loss"] for entry in record.history if "loss" in entry], same_everywhere(network, accelerator)


def same_everywhere(network: nn.Module, accelerator: Accelerator) -> bool:
    """Tell whether every process has the same weights and buffers, bit for bit."""
    flat = torch.cat([tensor.double().flatten() for tensor in network.state_dict().values()])
    every = accelerator.gather(flat[None])
    return bool((every == every[0]).all())


def resumed(folder: Path, accelerator: Accelerator) -> bool:
    """Tell whether a run killed after two of its epochs goes on to the weights of an uninterrupted one."""
    whole, killed, again = vit(), vit(), vit()
    images = ToyImages(61, SIDE)
    Engine(accelerator, images).run(whole, CONFIG.phases(whole))

    def stopping(phase: Phase) -> Phase:
        project, steps = phase.after_step, iter(range(100))

        def after() -> None:
            assert project is not None
            project()
            if next(steps) == 10:
                raise KeyboardInterrupt

        phase.after_step = after
        return phase

    try:
        engine = Engine(accelerator, images, checkpoints=CheckpointStore(folder))
        engine.run(killed, [stopping(*CONFIG.phases(killed))])
    except KeyboardInterrupt:
        accelerator.wait_for_everyone()
    Engine(accelerator, images, checkpoints=CheckpointStore(folder)).run(again, CONFIG.phases(again))
    return all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def measured(network: nn.Module, accelerator: Accelerator) -> dict[str, Any]:
    """Return what is counted on sets of several sizes, cached and decoded on demand."""
    found: dict[str, Any] = {}
    for count in COUNTS:
        answers = predict(network, ToyImages(count, SIDE), accelerator)
        found[f"predicted {count}"] = answers.predicted.tolist()
        found[f"losses {count}"] = answers.losses.tolist()
    evaluation = toy_pixels(53, SIDE, wrong={i: (i + 1) % 3 for i in range(0, 53, 5)})
    outcome = measure(network, evaluation, views(evaluation, BadNets(mode="input")), accelerator)
    trigger = outcome.measurement.triggers["badnets"]
    found["counts"] = [
        outcome.measurement.accuracy.successes, trigger.attack_success_rate.successes,
        trigger.attack_success_rate.samples, trigger.robust_accuracy.successes,
    ]  # fmt: skip
    on_demand = toy_pixels(21, SIDE, max_bytes=0)
    found["on demand"] = predict(network, on_demand, accelerator).predicted.tolist()
    return found


def tracked(folder: Path, device: str) -> bool:
    """Train with a tracker as a run does; tell whether the processes can still speak to each other after it."""
    accelerator = make_accelerator(device, "no", "tensorboard", str(folder / "logs"))
    options = DetoxOptions("m", log_with="tensorboard")
    source: Any = ToyImages(24)
    train(toy_classifier(), CONFIG, source, accelerator, options, run=None, progress=False, warn=print)
    close_trackers(accelerator, options)
    everyone: list[int] = gather_object([accelerator.process_index])
    return everyone == list(range(accelerator.num_processes)) and any(folder.glob("logs/**/events.*"))


@torch.no_grad()
def looked_alone(accelerator: Accelerator) -> list[float]:
    """Return the classes' accuracies where the main process alone has any held-out images."""
    weights = Reweighting("class")
    network, images, labels = vit(), toy_pixels(6, SIDE).images, torch.tensor([0, 1, 2, 0, 1, 2])
    assert images is not None
    for each in weights.probes("fit")()[:1]:
        if accelerator.is_main_process:
            each.on_batch(network, Batch(images.float(), labels, torch.ones(6), torch.arange(6)))
        assert each.finish is not None
        each.finish(accelerator)
    return weights.accuracy.tolist()


def work(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Return everything that must not depend on the number of processes."""
    accelerator = make_accelerator(device, "no")
    found: dict[str, Any] = {"processes": accelerator.num_processes, "curves": {}, "same everywhere": {}}
    for name, config in RUNS.items():
        network = vit()
        found["curves"][name] = curve(network, config, accelerator)
        found["same everywhere"][name] = same_everywhere(network, accelerator)
        if name == "odd":
            found["measured"] = measured(network, accelerator)
    batchnorm = convnet()
    curve(batchnorm, CONFIG, accelerator)
    found["same everywhere"]["batchnorm"] = same_everywhere(batchnorm, accelerator)
    found["defenses"] = {name: defended(name, accelerator) for name in DEFENSES}
    found["looked alone"] = looked_alone(accelerator)
    found["resumed"] = resumed(folder, accelerator)
    found["tracked"] = tracked(folder, device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    with quick_garbage():
        work(Path(sys.argv[1]))
