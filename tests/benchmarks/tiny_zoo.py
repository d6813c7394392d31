"""Trains many tiny classifiers that were never backdoored, for the false alarms of `hfdetox scan`.

    python -m tests.benchmarks.tiny_zoo --cifar CIFAR10 --output ZOO --models 60 [--cleaned CLEANED]

With `--cleaned` each is then cleaned as a person would, by the default with 800 images: for the scores after cleaning.
Each is what its seed draws: scikit-learn's digits or a part of CIFAR-10, 3 to 10 classes, a network and its width, the
images, the epochs. Folders that are there are kept. Odd seeds give thresholds, even seeds rates, as in
examples/scan_zoo.yaml.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as Pictures
from sklearn.datasets import load_digits

from hfdetox import detoxify
from hfdetox.errors import HfdetoxError
from hfdetox.implanting import implant

SIDE, SAMPLES = 32, 800
NETWORKS: dict[str, dict[str, Any]] = {
    "resnetv2_18": {"layers": [1, 1, 1], "stem_chs": 16},
    "convnext_atto": {"patch_size": 2, "depths": [1, 1, 1, 1]},
    "vit_tiny_patch16_224": {"patch_size": 4, "depth": 3, "num_heads": 2},
}
WIDTHS: dict[str, Any] = {
    "resnetv2_18": lambda w: {"channels": [w, 2 * w, 4 * w]},
    "convnext_atto": lambda w: {"dims": [w, 2 * w, 3 * w, 4 * w]},
    "vit_tiny_patch16_224": lambda w: {"embed_dim": 2 * w},
}
# images × epochs of a training, for each network as many as it needs to learn anything
LOOKS = {"resnetv2_18": 24_000, "convnext_atto": 32_000, "vit_tiny_patch16_224": 32_000}


def main() -> None:
    """Train the models that are missing and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder of the models")
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--cleaned", type=Path, help="folder of the cleaned models")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sources = {"digits": digits(), "cifar": cifar(options.cifar)}
    for seed in range(options.models):
        folder = options.output / f"tiny-s{seed}"
        if not folder.exists():
            print(json.dumps(one(seed, folder, sources)), flush=True)
        if options.cleaned and not (options.cleaned / folder.name).exists() and folder.exists():
            pictures = str(folder.with_suffix(".images"))
            found = detoxify(folder, dataset=pictures, output=options.cleaned / folder.name, scan=False,
                             clean_samples=min(SAMPLES, load_dataset(pictures, split="train").num_rows))  # fmt: skip
            print(folder.name, found.report.after.accuracy.value, flush=True)


def one(seed: int, folder: Path, sources: dict[str, tuple[Any, np.ndarray, list[str], int]]) -> dict[str, Any]:
    """Train the model of a seed into `folder`, with its images in `FOLDER.images`, and return what it is."""
    draw = np.random.default_rng(seed)
    source = ("digits", "cifar")[seed // 2 % 2]
    pictures, labels, names, most = sources[source]
    classes = sorted(draw.choice(10, size=int(draw.integers(3, 11)), replace=False).tolist())
    network, width = list(NETWORKS)[seed // 4 % 3], int(draw.choice([16, 24, 32]))
    rows = draw.permutation(np.flatnonzero(np.isin(labels, classes)))[:most]
    cut = len(rows) * 3 // 4
    data = DatasetDict({split: images(pictures, labels, names, classes, part)
                        for split, part in (("train", rows[:cut]), ("test", rows[cut:]))})  # fmt: skip
    written = folder.with_suffix(".images")
    written.mkdir(exist_ok=True)
    for split, part in data.items():
        part.to_parquet(str(written / f"{split}.parquet"))
    found: dict[str, Any] = {"seed": seed, "source": source, "classes": len(classes), "network": network}
    found["width"], augmentation = width, "none" if source == "digits" else "flip"
    try:
        report = implant(
            f"timm-arch:{network}", dataset=str(written), triggers=["none"], input_size=SIDE, seed=seed, output=folder,
            model_args=NETWORKS[network] | WIDTHS[network](width),
            settings={"epochs": max(8, LOOKS[network] // cut), "augmentation": augmentation},
        ).report  # fmt: skip
    except HfdetoxError as error:
        return found | {"error": str(error)}
    return found | {"accuracy": report.after.accuracy.value if report.after else None}


def images(pictures: Any, labels: np.ndarray, names: list[str], classes: list[int], rows: np.ndarray) -> Dataset:
    """Return the rows of the classes as a dataset whose classes are these alone."""
    features = Features({"image": Image(), "label": ClassLabel(names=[names[c] for c in classes])})
    return Dataset.from_dict({"image": [pictures(int(row)) for row in rows],
                              "label": [classes.index(labels[row]) for row in rows]}, features=features)  # fmt: skip


def digits() -> tuple[Any, np.ndarray, list[str], int]:
    """Return a function that gives a picture by its row, the labels, their names, and how many images are taken."""
    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    size = (SIDE, SIDE)
    return (lambda row: Pictures.fromarray(grey[row]).resize(size, Pictures.Resampling.BICUBIC).convert("RGB"),
            found.target, [f"digit {name}" for name in range(10)], 1797)  # fmt: skip


def cifar(folder: Path) -> tuple[Any, np.ndarray, list[str], int]:
    """Return the same of CIFAR-10's training images."""
    train = load_dataset(str(folder), split="train")
    column = next(name for name, kind in train.features.items() if isinstance(kind, ClassLabel))
    picture = next(name for name, kind in train.features.items() if isinstance(kind, Image))
    return lambda row: train[row][picture], np.array(train[column]), train.features[column].names, 6000


if __name__ == "__main__":
    main()
