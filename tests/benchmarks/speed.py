"""How fast the engine is, as ratios in one run, against research code and against the bare step; and its peak memory.

    python -m tests.benchmarks.speed --cifar DIR --model ZOO/timm-badnets --output speed_cpu.json [--epochs 20]

- research: the same model, images, method and settings in a loop as research code has it: PIL transforms per image
  in a DataLoader with a worker a core, float32, contiguous format. Three ratios of seconds: training only; with the
  same evaluations (clean and triggered test set before and after); with that loop's habit of evaluating both sets
  after every epoch (one evaluation is measured and counted once an epoch).
- bare: forward, backward and SGD step on one batch that is already on the device, in the same precision and format.
- memory: the peak of a process that runs the whole job, less model, optimiser and cached images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import hfdetox
from hfdetox.data.cache import apply_to_image
from hfdetox.data.images import ImageSet
from hfdetox.data.load import load_images
from hfdetox.defenses import D3Config
from hfdetox.evaluation.evaluator import decoded, prepare_evaluator
from hfdetox.evaluation.metrics import defense_effectiveness_rating
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.triggers import BadNets, Trigger

SAMPLES, TARGET, BATCH = 2500, 0, 256


class ResearchImages(Dataset[Any]):
    """Images as research code holds them: PIL in memory, a torchvision transform and the trigger for each image."""

    def __init__(self, images: ImageSet, transform: Any, trigger: Trigger | None = None) -> None:
        chosen = [i for i in range(len(images)) if trigger is None or int(images.labels[i]) != TARGET]
        self.pictures = [images.image(i) for i in chosen]
        self.labels = [TARGET if trigger else int(images.labels[i]) for i in chosen]
        self.transform, self.trigger = transform, trigger

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = self.pictures[index]
        return self.transform(apply_to_image(self.trigger, picture) if self.trigger else picture), self.labels[index]


def research(classifier: Classifier, clean: ImageSet, evaluation: ImageSet, config: D3Config) -> dict[str, Any]:
    """Run D3 as research code would; returns seconds and rates. One evaluation is both test sets."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, preprocessing = classifier.model.to(device), classifier.preprocessing
    normalize = [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
    crop = transforms.RandomCrop(preprocessing.input_size[1:], padding=4)
    train = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *normalize])
    test = transforms.Compose(normalize)
    workers = os.cpu_count() or 1
    decoding = time.perf_counter()
    loader = DataLoader(ResearchImages(clean, train), batch_size=BATCH, shuffle=True, num_workers=workers)
    sets = [
        DataLoader(ResearchImages(evaluation, test, trigger), batch_size=BATCH, num_workers=workers)
        for trigger in (None, BadNets())
    ]

    def evaluate() -> list[float]:
        network.eval()
        rates = []
        with torch.no_grad():
            for one in sets:
                hits = sum(int((network(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in one)
                rates.append(hits / len(one.dataset))  # type: ignore[arg-type]
        return rates

    caching = time.perf_counter() - decoding
    begin = time.perf_counter()
    before = evaluate()
    one_evaluation = time.perf_counter() - begin
    head = (
        network.get_classifier().weight
        if not isinstance(network.get_classifier(), torch.nn.Conv2d)
        else network.head.fc.weight
    )
    old = head.detach().clone()
    radius = old.norm()
    torch.manual_seed(0)
    with torch.no_grad():
        head.uniform_(-0.5, 0.5).mul_(radius / head.norm())
    optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    begin = time.perf_counter()
    for _ in range(config.epochs):
        network.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            penalty = relu(cross_entropy(network(images), labels, reduction="none") - config.epsilon).mean()
            loss = (config.lambda_ * penalty - (head - old).norm()) / (config.lambda_ + 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                head.mul_(radius / head.norm())
        schedule.step()
    _finish(device)
    training = time.perf_counter() - begin
    after = evaluate()
    return {
        "training_seconds": training,
        "evaluation_seconds": one_evaluation,
        "caching_seconds": caching,
        **_rates(before, after),
    }


def ours(classifier: Classifier, clean: ImageSet, evaluation: ImageSet, config: D3Config) -> dict[str, Any]:
    """Run the same by the engine; decoding and caching count as training or evaluation, where they belong."""
    accelerator = make_accelerator()
    begin = time.perf_counter()
    prepared = prepare_evaluator(
        classifier, evaluation, [BadNets()], accelerator, target=str(TARGET), warn=print, progress=False
    )
    caching = time.perf_counter() - begin
    before, one_evaluation = _timed(prepared)
    begin = time.perf_counter()
    pixels = decoded(clean, classifier, accelerator, "decode", progress=False)
    record = Engine(accelerator, pixels, seed=0).run(classifier.network, config.phases(classifier.network))
    training = time.perf_counter() - begin
    after, _ = _timed(prepared)
    return {
        "training_seconds": training,
        "evaluation_seconds": one_evaluation,
        "caching_seconds": caching,
        "images_per_second": record.images_per_second,
        "precision": record.precision,
        **_rates(before, after),
    }


def bare(classifier: Classifier, steps: int) -> float:
    """Return images a second of the bare step in the engine's own precision and format."""
    accelerator = make_accelerator()
    network, precision = classifier.model.train(), accelerator.mixed_precision
    channels, height, width = classifier.preprocessing.input_size
    images = torch.randn(BATCH, channels, height, width, device=accelerator.device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, len(classifier.labels), (BATCH,), device=accelerator.device)
    network.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

    def step() -> None:
        with torch.autocast(accelerator.device.type, dtype=dtype, enabled=precision != "no"):
            logits = network(images)
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _images_per_second(step, steps, accelerator.device)


def engine_only(classifier: Classifier, clean: ImageSet, config: D3Config) -> float:
    """Return the engine's training images a second on cached images."""
    accelerator = make_accelerator()
    pixels = decoded(clean, classifier, accelerator, "decode", progress=False)
    return (
        Engine(accelerator, pixels, seed=0).run(classifier.network, config.phases(classifier.network)).images_per_second
    )


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Run the whole job in a process of its own and return its peak memory and what is accounted for, in MB."""
    code = (
        "import resource, sys; from hfdetox import detoxify\n"
        f"r = detoxify(sys.argv[1], dataset=sys.argv[2], clean_samples={SAMPLES}, triggers=['badnets'], "
        f"target={TARGET}, defense='d3:paper', settings={{'epochs': '1'}}, progress=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, r.report.model.parameters)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(arguments.model), str(arguments.cifar)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, parameters = map(float, done.stdout.split()[-2:])
    size = np.prod(load_classifier(arguments.model).preprocessing.input_size) / 2**20
    # float32 weights, gradients and momentum; the clean set, the test set and its triggered copies
    accounted = 3 * 4 * parameters / 2**20 + size * (SAMPLES + 10_000 + 9_000)
    return {"peak_mb": peak, "model_optimizer_cache_mb": float(accounted), "rest_mb": peak - float(accounted)}


def _images_per_second(step: Any, steps: int, device: torch.device) -> float:
    for _ in range(3):
        step()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    _finish(device)
    return steps * BATCH / (time.perf_counter() - begin)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timed(evaluation: Any) -> tuple[list[float], float]:
    begin = time.perf_counter()
    measured = evaluation.measure("measure").measurement
    seconds = time.perf_counter() - begin
    return [measured.accuracy.value, measured.triggers["badnets"].attack_success_rate.value], seconds


def _rates(before: list[float], after: list[float]) -> dict[str, Any]:
    der = defense_effectiveness_rating((before[0], after[0]), (before[1], after[1]))
    return {"accuracy": [before[0], after[0]], "attack_success_rate": [before[1], after[1]], "der": der}


def ratios(theirs: dict[str, Any], mine: dict[str, Any], loading: float, epochs: int) -> dict[str, float]:
    """Return seconds of research code over seconds of hfdetox, for the three ways of counting."""
    # both use the images that are read, decoded and checked once
    job = loading + mine["caching_seconds"] + mine["training_seconds"] + 2 * mine["evaluation_seconds"]
    same = loading + theirs["caching_seconds"] + theirs["training_seconds"] + 2 * theirs["evaluation_seconds"]
    habit = same + (epochs - 1) * theirs["evaluation_seconds"]
    return {
        "training": theirs["training_seconds"] / mine["training_seconds"],
        "same_evaluations": same / job,
        "research_habit": habit / job,
    }


def main() -> None:
    """Measure everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--model", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    config = D3Config(epochs=arguments.epochs)
    labels = load_classifier(arguments.model).labels
    loading = time.perf_counter()
    images = load_images(arguments.cifar, labels=labels, clean_samples=SAMPLES, warn=print)
    loading = time.perf_counter() - loading
    theirs = research(load_classifier(arguments.model), images.clean, images.evaluation, config)
    mine = ours(load_classifier(arguments.model), images.clean, images.evaluation, config)
    # interleaved, so that a slow minute of the machine hits both
    pairs = [
        (
            bare(load_classifier(arguments.model), 20),
            engine_only(load_classifier(arguments.model), images.clean, D3Config(epochs=4)),
        )
        for _ in range(3)
    ]
    result = {
        "command": f"python -m tests.benchmarks.speed --cifar CIFAR10 --model ZOO/{arguments.model.name} "
        f"--output {arguments.output.name} --epochs {arguments.epochs}",
        "hfdetox_version": hfdetox.__version__,
        "device": str(make_accelerator().device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in load_classifier(arguments.model).model.parameters()),
        "research": theirs,
        "hfdetox": mine,
        "loading_seconds": loading,
        "times_faster": ratios(theirs, mine, loading, arguments.epochs),
        "bare_images_per_second": [b for b, _ in pairs],
        "engine_images_per_second": [e for _, e in pairs],
        "engine_share_of_bare": float(np.median([e / b for b, e in pairs])),
        "memory": memory(arguments),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
