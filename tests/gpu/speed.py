"""How fast the engine is on the device, as ratios in one run: three networks, four precisions, compiled or not.

- bare: forward, backward and SGD step on one batch that is on the device, in the same precision and format.
- engine: D3 by the engine on cached images, augmentation included, 10 steps an epoch as with 2,500 images.
- waits: how often a further step makes the host wait for the device (on a CPU no one can tell).
- peak: arithmetic of the engine's images a second over that of a large bf16 matrix product, measured first.
- job: from the command to the card, a process of its own.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from hfdetox.defenses import D3Config
from hfdetox.models.classifier import Classifier
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.training.engine import Engine
from tests.gpu.models import Data, device, implanted
from tests.gpu.report import BEGIN, Report, arguments_of, machine

NETWORKS = {"ResNet-18": "resnet18", "ConvNeXt-T": "convnext_tiny", "ViT-B/16": "vit_base_patch16_224"}
TOYS = {"ResNet": "test_resnet", "ConvNeXt": "test_convnext", "ViT": "test_vit"}
PRECISIONS = {"float32": ("no", False), "float32, TF32": ("no", True), "bf16": ("bf16", False), "fp16": ("fp16", False)}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 10
FEW = 8
# seconds that a job and a compilation may take: none is begun with less left
JOB, COMPILED = 60.0, 40.0


@dataclass(frozen=True)
class Sizes:
    """How large everything is; `seconds` a measurement shall take."""

    side: int
    batch: int
    matrix: int
    seconds: float

    @property
    def images(self) -> int:
        """Cached images: the steps of an epoch."""
        return STEPS * self.batch


class Noise:
    """Cached random images on the device, as the engine takes them."""

    def __init__(self, sizes: Sizes, where: torch.device, classes: int) -> None:
        count = sizes.images
        self.images: torch.Tensor | None = torch.randint(
            0, 256, (count, 3, sizes.side, sizes.side), dtype=torch.uint8, device=where
        )
        self.labels, self.positions = torch.randint(0, classes, (count,), device=where), torch.arange(count)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Noise:
        """Return the first images."""
        part = copy.copy(self)
        assert self.images is not None
        part.images, part.labels, part.positions = self.images[:count], self.labels[:count], self.positions[:count]
        return part

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.images is not None
        places = torch.tensor(items)
        there = places.to(self.images.device, non_blocking=True)
        return self.positions[places], self.images[there], self.labels[there]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let float32 convolutions and products use TF32, or not."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def finish(where: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def seconds_of(step: Callable[[], object], where: torch.device, measured: float) -> float:
    """Return the seconds of a step, of as many as take about `measured`, after some that are not counted."""
    for _ in range(3):
        step()
    finish(where)
    begin, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begin < measured:
        # the host must not run ahead: what it has queued is no step yet
        step()
        done += 1
        if done % 4 == 0:
            finish(where)
    finish(where)
    return (time.perf_counter() - begin) / done


def bare_step(classifier: Classifier, source: Noise, batch: int, precision: str, compiled: bool,
              where: torch.device) -> Callable[[], None]:  # fmt: skip
    """Return the bare step on a ready batch."""
    network = classifier.network.to(where).train()
    channels_last = network.convolutional
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert source.images is not None
    images = (source.images[:batch].float() - 127.5) / 64
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = source.labels[:batch]
    model = torch.compile(classifier.model) if compiled else classifier.model
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(where.type, enabled=precision == "fp16")

    def step() -> None:
        with torch.autocast(where.type, dtype=DTYPES[precision], enabled=precision != "no"):
            logits = model(images)
        scaler.scale(cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def engine_run(classifier: Classifier, source: Noise, batch: int, accelerator: Accelerator, epochs: int) -> list[float]:
    """Return the seconds of every epoch of D3 by the engine."""
    config = D3Config(epochs=epochs, batch_size=batch)
    record = Engine(accelerator, source).run(classifier.network, config.phases(classifier.network))
    return [entry["seconds"] for entry in record.history if "learning_rate" in entry]


def waits_a_step(classifier: Classifier, sizes: Sizes, accelerator: Accelerator) -> float | None:
    """Return how often a further step of an epoch makes the host wait for the device; None where no one can tell."""
    if accelerator.device.type != "cuda":
        return None
    few = Noise(replace(sizes, batch=FEW), accelerator.device, len(classifier.labels))
    counts = []
    # first once without counting: what is made when first needed is no part of a step
    for batch, count in ((FEW, False), (FEW, True), (FEW // 2, True)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if count else "default")
            engine_run(classifier, few, batch, accelerator, 1)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
    return (counts[2] - counts[1]) / STEPS


def measure(report: Report, made: Classifier, sizes: Sizes, source: Noise, name: str, precision: str, *,
            compiled: bool) -> None:  # fmt: skip
    """Measure a network in a precision, and keep the row."""
    mixed, with_tf32 = PRECISIONS[precision]
    where = torch.device(device())
    # a step without the matrix units takes long enough with a quarter of the images
    batch = sizes.batch if mixed != "no" or with_tf32 else sizes.batch // 4
    row: dict[str, Any] = {"network": name, "precision": precision, "compiled": compiled, "batch": batch}
    if mixed == "fp16" and where.type == "cpu":
        report.add(**row, error="fp16 does not run on a CPU")
        return
    torch.compiler.reset()
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor" if compiled else "no"
    try:
        with accelerate_state_kept(), tf32(with_tf32):
            accelerator = make_accelerator(where.type, mixed)
            step = bare_step(copy.deepcopy(made), source, batch, mixed, compiled, where)
            begin = time.perf_counter()
            step()
            finish(where)
            row["first_step_seconds"] = round(time.perf_counter() - begin, 2)
            bare = [batch / seconds_of(step, where, sizes.seconds)]
            ours = copy.deepcopy(made)
            held = torch.cuda.memory_allocated() if where.type == "cuda" else 0
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            epochs = max(2, min(6, round(sizes.seconds * bare[0] / (STEPS * batch))) + 1)
            images = source.first(STEPS * batch)
            engine = len(images) / min(engine_run(ours, images, batch, accelerator, epochs)[1:])
            peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if where.type == "cuda" else None
            bare.append(batch / seconds_of(step, where, sizes.seconds))
            waits = None if compiled else waits_a_step(ours, sizes, accelerator)
            flops = 3 * forward_flops(ours, source)
    except RuntimeError as error:
        report.add(**row, error=str(error)[-500:])
        return
    finally:
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND")
        torch.cuda.empty_cache()
    report.add(**row, bare=round(max(bare), 1), engine=round(engine, 1), share=round(engine / max(bare), 4),
               waits=waits, peak_gib=peak and round(peak, 2), gflop_an_image=round(flops / 1e9, 2),
               share_of_bf16_peak=round(engine * flops / report.found["bf16_flops"], 4))  # fmt: skip


def forward_flops(classifier: Classifier, source: Noise) -> int:
    """Return the arithmetic of one image's way forward; backward has twice as much."""
    assert source.images is not None
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        classifier.network.eval()(source.images[:2])
    return counter.get_total_flops() // 2


def bf16_flops(sizes: Sizes, where: torch.device) -> float:
    """Return the arithmetic a second of a large product of random bf16 matrices."""
    side = sizes.matrix
    first, second = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: first @ second, where, sizes.seconds)


def job(report: Report, data: Data, sizes: Sizes, network: tuple[str, str]) -> None:
    """Make a backdoored model, clean it by the command in a process of its own, and keep the seconds of that."""
    name, architecture = network
    clean, evaluation, training = (200, 100, 300) if data.toy else (2500, 10_000, 5000)
    with tempfile.TemporaryDirectory() as scratch:
        with accelerate_state_kept():
            classifier = data.classifier(architecture, sizes.side)
            images = data.load(training, 1)
            implanted(classifier, images.clean, make_accelerator(), "badnets", epochs=6, batch_size=64,
                      augmentation="flip")  # fmt: skip
            classifier.network.cpu()
            classifier.save(Path(scratch, "model"))
        command = [sys.executable, "-m", "hfdetox", f"{scratch}/model", "--dataset", str(data.folder),
                   "--samples", str(clean), "--eval-samples", str(evaluation), "--trigger", "badnets",
                   "--output", f"{scratch}/cleaned", "--json",
                   *(["--defense", "d3:paper", "--epochs", "2"] if data.toy else [])]  # fmt: skip
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        made = Path(scratch, "cleaned", "README.md").is_file()
        steps = _told(Path(scratch, "cleaned")) if made else {"error": done.stderr[-500:]}
    report.put(jobs=[*report.found.get("jobs", []), {"network": name, "clean": clean, "evaluation": evaluation,
                                                     "seconds": round(seconds, 1), **steps}])  # fmt: skip


def _told(output: Path) -> dict[str, Any]:
    found = json.loads((output / "detox_report.json").read_text(encoding="utf-8"))
    return {"defense_seconds": round(found["defense"]["seconds"], 1), "epochs": found["defense"]["epochs"],
            "precision": found["defense"]["precision"]}  # fmt: skip


def main() -> None:
    """Measure everything there is time for."""
    arguments = arguments_of(__doc__)
    data, where = Data(arguments.toy), torch.device(device())
    sizes = Sizes(32, 16, 128, 0.01) if arguments.toy else Sizes(224, 256, 8192, 1.0)
    report = Report(arguments.output, "make gpu")
    report.put(**machine(), bf16_flops=bf16_flops(sizes, where), side=sizes.side, batch=sizes.batch)
    source = Noise(sizes, where, len(data.labels))
    networks = list((TOYS if arguments.toy else NETWORKS).items())

    def left(needed: float) -> bool:
        return arguments.seconds - (time.monotonic() - BEGIN) > needed

    made = {name: data.classifier(architecture, sizes.side) for name, architecture in networks}
    for name in made:
        for precision in PRECISIONS:
            measure(report, made[name], sizes, source, name, precision, compiled=False)
    for network in networks[:1]:
        job(report, data, sizes, network)
    # the slowest to compile comes last
    for name in sorted(made, key=lambda name: "ConvNeXt" in name):
        if left(COMPILED) and not arguments.toy:
            measure(report, made[name], sizes, source, name, "bf16", compiled=True)
    for network in networks[1:]:
        if left(JOB) and not arguments.toy:
            job(report, data, sizes, network)


if __name__ == "__main__":
    main()
