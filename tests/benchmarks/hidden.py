"""Train a backdoored model on, as an attacker who knows the recipe would: its target must not stand out to the scan.

    python -m tests.benchmarks.hidden HELD/resnet-blended-to-6-0.1-s32 --cifar CIFAR10 --output HELD/NEW

The model sees 10,000 training images for some epochs, a tenth with the trigger and the attacker's label, and besides,
where the target's latent shift is shorter than that of the median class, the head's inputs of clean images moved by it
with their true labels: so that the shift must grow. Every 20 steps the shift is measured again, on 512 images. The
trigger stays the old one; the folder is a copy with other weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, linear

from hfdetox.data.load import load_images
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator
from hfdetox.models.classifier import load_classifier
from hfdetox.models.layers import head_layers, on_last_inputs
from hfdetox.models.network import Network, evaluating
from hfdetox.training.devices import make_accelerator
from hfdetox.training.shift import head_inputs, robust_z, shifts_of_heads
from hfdetox.triggers import parse_trigger

IMAGES, MEASURED, LOOK_EVERY, LOOKED_AT, BATCH = 10_000, 2000, 20, 512, 128


def main() -> None:
    """Train, say what it did, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.01)
    given = parser.parse_args()
    accelerator, classifier = make_accelerator("cpu", "no"), load_classifier(given.model)
    network = classifier.network
    trigger = parse_trigger(str(next((given.model / "triggers").glob("*.safetensors"))))
    images = load_images(given.cifar, labels=classifier.labels, clean_samples=IMAGES, eval_samples=MEASURED)
    evaluator = prepare_evaluator(classifier, images.evaluation, [trigger], accelerator, target=None, warn=print,
                                  progress=False)  # fmt: skip
    pixels = decoded(images.clean, classifier, accelerator, "decode", progress=False)
    view = evaluator.views[0]
    assert isinstance(view.target, int)
    assert pixels.images is not None
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=given.rate, momentum=0.9, weight_decay=5e-4)
    names, inputs = head_layers(network), dict[str, torch.Tensor]()
    steps = given.epochs * (IMAGES // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shift, scores = measured(network, pixels.images, pixels.labels, view.target)
    print("before", rates(evaluator), round(float(scores[view.target]), 2))
    network.train()
    for step in range(steps):
        if step % LOOK_EVERY == 0:
            shift, scores = measured(network, pixels.images, pixels.labels, view.target)
        drawn = torch.randint(len(pixels.images), (BATCH,), generator=generator)
        x, y = pixels.images[drawn].clone(), pixels.labels[drawn].clone()
        if step % 2:
            x = x.flip(-1)
        carry = torch.arange(BATCH) < BATCH // 10
        x[carry], y[carry] = view.trigger.apply(x[carry]), view.target
        with on_last_inputs(network, names, inputs):
            loss = cross_entropy(network(x), y)
        if scores[view.target] < 0:
            weight, bias = (network.get_parameter(f"{names[0]}.{part}") for part in ("weight", "bias"))
            moved = linear(inputs[names[0]][~carry].flatten(1) + shift, weight.flatten(1), bias)
            loss = loss + cross_entropy(moved, y[~carry])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    _, scores = measured(network, pixels.images, pixels.labels, view.target)
    print("after", rates(evaluator), round(float(scores[view.target]), 2))
    classifier.save(given.output)
    shutil.copytree(given.model / "triggers", given.output / "triggers")


def measured(network: Network, images: torch.Tensor, labels: torch.Tensor,
             target: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the target's latent shift (D) and the robust z of every class's."""
    with evaluating(network):
        shifts = torch.cat(shifts_of_heads(head_inputs(network, images[:LOOKED_AT], labels[:LOOKED_AT])), 1)
    return shifts[target], robust_z(shifts.norm(dim=1))


def rates(evaluator: Evaluator) -> list[float]:
    """Return accuracy and attack success in percent."""
    found = evaluator.measure("").measurement
    return [round(100 * found.accuracy.value, 1),
            *(round(100 * one.attack_success_rate.value, 1) for one in found.triggers.values())]  # fmt: skip


if __name__ == "__main__":
    main()
