"""The demo: backdoor a small timm classifier of handwritten digits, then run the main job on it, with no network."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

from hfdetox.config import DEFAULT_DEFENSE
from hfdetox.detox import detoxify
from hfdetox.errors import UsageError, on_disk
from hfdetox.implanting import implant
from hfdetox.reporting.report import Report

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32
EVALUATION_IMAGES = 500
ARCHITECTURE = "test_resnet"
POISON_RATIO = 0.1
TRAINING_EPOCHS = 25
TARGET = "zero"
# 5 % of so few images, the default, would be six or seven a class
CLEAN_IMAGES = 600
# optimiser steps of the two trainings: 11 of 128 images an epoch, and the least of a push, as searches take long too
STEPS = {128: 11 * TRAINING_EPOCHS, 256: 200}
# relative to the demo's folder
TRIGGER = Path("backdoored", "triggers", "badnets.safetensors")
MARK = "hfdetox-demo.json"


def run(
    seed: int, output: Path, *, say: Callable[[str], None], compare: bool = False, progress: bool = False
) -> dict[str, Report]:
    """Run the demo into the folder `output`, which then holds `digits/`, `backdoored/` and `cleaned/`.

    An earlier demo there is replaced.

    Args:
        say: gets each line of the progress.
        compare: also clean with the paper's preset and by plain fine-tuning, without writing anything.
        progress: whether to show progress bars.

    Returns:
        The report of each method by its name, that of the default first.

    Raises:
        UsageError: the folder holds something else.
    """
    with on_disk(f"write {output}", "choose another --output"):
        _make_room(output)
    bare = bare_seconds()
    say(f"This takes about {_spoken(1.2 * bare, 2 * bare)} on this machine"
        + (", and twice as long again to compare." if compare else "."))  # fmt: skip
    say(f"1. Writing {output / 'digits'}: scikit-learn's handwritten digits, {SIDE}×{SIDE}")
    write_digits(output / "digits", seed)
    say(f"2. Training timm's {ARCHITECTURE} with a BadNets backdoor; {100 * POISON_RATIO:.0f} % of the images get a "
        f"white square and the label '{TARGET}'")  # fmt: skip
    backdoored(output / "digits", output / "backdoored", seed, progress=progress)
    say("3. The main job, as you would run it from inside that folder:")
    say(f"   hfdetox ./backdoored --dataset ./digits --samples {CLEAN_IMAGES} --trigger {TRIGGER.as_posix()} "
        "--output cleaned" + (f" --seed {seed}" if seed else ""))  # fmt: skip
    reports = {DEFAULT_DEFENSE: clean(output, seed, output=output / "cleaned", progress=progress)}
    for method in ("d3:paper", "ft") if compare else ():
        say(f"   the same with --defense {method}")
        reports[method] = clean(output, seed, defense=method, progress=progress)
    return reports


def write_digits(folder: Path, seed: int) -> None:
    """Write the digits as a dataset folder: `train.parquet` and `test.parquet` (500 images), RGB, 32×32, named."""
    digits = load_digits()
    # 8×8 pixels of 17 grey levels
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pictures = [Pictures.fromarray(g).resize((SIDE, SIDE), Pictures.Resampling.BICUBIC).convert("RGB") for g in grey]
    rows = range(len(pictures))
    train, test = train_test_split(rows, test_size=EVALUATION_IMAGES, stratify=digits.target, random_state=seed)
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    folder.mkdir(parents=True)
    for split, chosen in (("train", train), ("test", test)):
        columns = {"image": [pictures[i] for i in chosen], "label": [int(digits.target[i]) for i in chosen]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))


def backdoored(dataset: Path, folder: Path, seed: int, *, progress: bool = False) -> None:
    """Train the network with the backdoor on the training split, and write it as `hfdetox attack` does."""
    implant(
        f"timm-arch:{ARCHITECTURE}", dataset=str(dataset), triggers=["badnets"], target=TARGET, input_size=SIDE,
        poison_ratio=POISON_RATIO, settings={"epochs": str(TRAINING_EPOCHS), "augmentation": "crop"}, seed=seed,
        output=folder, progress=progress,
    )  # fmt: skip


def clean(
    folder: Path, seed: int, *, defense: str = DEFAULT_DEFENSE, output: Path | None = None, progress: bool = False
) -> Report:
    """Run the main job on the model and images in `folder`; nothing is written without `output`."""
    return detoxify(
        folder / "backdoored", dataset=str(folder / "digits"), clean_samples=CLEAN_IMAGES,
        triggers=[str(folder / TRIGGER)], seed=seed, defense=defense, output=output, progress=progress,
    ).report  # fmt: skip


def bare_seconds(steps: int = 4, *, bf16: bool = False) -> float:
    """Return how long the demo's optimiser steps take by themselves: forward, backward and SGD on a ready batch.

    Args:
        steps: how many of each batch size are timed, after one to warm up.
        bf16: in mixed precision, in place of float32.
    """
    model = timm.create_model(ARCHITECTURE, num_classes=len(NAMES)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()

    seconds = 0.0
    for batch_size, count in STEPS.items():
        batch = torch.rand(batch_size, 3, SIDE, SIDE), torch.arange(batch_size) % len(NAMES)
        step(*batch)
        start = time.perf_counter()
        for _ in range(steps):
            step(*batch)
        seconds += (time.perf_counter() - start) / steps * count
    return seconds


def _make_room(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        if not (output / MARK).is_file():
            raise UsageError(f"{output} exists and was not made by the demo; choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text(json.dumps({"made_by": "hfdetox demo"}) + "\n", encoding="utf-8")


def _spoken(low: float, high: float) -> str:
    """Return a span of seconds in words, such as `2 to 4 min`."""
    size, unit = (1, "s") if high < 100 else (60, "min")
    ends = dict.fromkeys(f"{max(end, 10) / size:.0f}" for end in (low, high))
    return f"{' to '.join(ends)} {unit}"
