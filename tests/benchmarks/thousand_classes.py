"""A model of 1,000 classes at 224 pixels through the whole job: its time, its memory, and how much there is to read.

    python -m tests.benchmarks.thousand_classes --output tests/benchmarks/results/thousand_classes.json

The images are synthetic: of each class a picture of 4×2 random colours and their mirror image, enlarged, with noise of
its own in each image. The model is a ViT-S of random weights that look at the picture more than at places, whose head
is fitted by least squares to features of other such images: it is no chance model, and nothing is downloaded. The job
is the command

    hfdetox MODEL --dataset IMAGES --samples 1000 --eval-samples 1000 --defense ft --epochs 1

in a process of its own. What counts is its peak memory above the model (weights and gradients), the optimiser and the
cached images, of which the issue allows 1.5 GB.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from hfdetox.reporting.report import Report

LIMIT_MB = 1500
_RIDGE = 1e-3
# one-hot scores are between 0 and 1: of use to a softmax when they are spread, and too steep for training beyond that
_SPREAD = 20
# how much more the pictures count than the places in them
_CONTRAST = 30
_GROUP = 250


def pictures(classes: int, side: int, per: int, seed: int) -> Any:
    """Yield (label, image) of `per` images of each class, class by class in turn: uint8, side×side×3."""
    colours = np.random.default_rng(0).integers(30, 226, (classes, 4, 2, 3), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    for _ in range(per):
        for label in range(classes):
            mirrored = np.concatenate([colours[label], colours[label][:, ::-1]], 1)
            picture = np.asarray(Image.fromarray(mirrored).resize((side, side), Image.Resampling.BICUBIC))
            noise = generator.integers(-24, 25, (side // 4, side // 4, 1)).repeat(4, 0).repeat(4, 1)
            yield label, (picture.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, classes: int, side: int) -> None:
    """Write two training images and one test image of each class as parquet, JPEG inside."""
    names = [f"class {label:04d}, synthetic {label}" for label in range(classes)]
    schema = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}).arrow_schema
    (folder / "data").mkdir(parents=True)
    for split, per, seed in (("train", 2, 1), ("test", 1, 2)):
        with pq.ParquetWriter(folder / "data" / f"{split}-00000-of-00001.parquet", schema) as writer:
            rows: list[tuple[bytes, int]] = []
            for number, (label, picture) in enumerate(pictures(classes, side, per, seed), 1):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "JPEG", quality=92)
                rows.append((buffer.getvalue(), label))
                if len(rows) == _GROUP or number == per * classes:
                    table = {"image": pa.array([{"bytes": row, "path": None} for row, _ in rows], schema.field(0).type),
                             "label": pa.array([label for _, label in rows], pa.int64())}  # fmt: skip
                    writer.write_table(pa.table(table, schema=schema))
                    rows = []


@torch.no_grad()
def write_model(folder: Path, architecture: str, classes: int, side: int) -> None:
    """Write a random network whose head is fitted by ridge regression to one-hot labels of images of its own."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, side, side), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3,
               "num_classes": classes}  # fmt: skip
    model = timm.create_model(
        architecture, num_classes=classes, pretrained_cfg_overlay=overlay, global_pool="avg"
    ).eval()
    model.patch_embed.proj.weight.mul_(_CONTRAST)
    features, labels, held = [], [], []
    for number, (label, picture) in enumerate(pictures(classes, side, 2, 3), 1):
        held.append(torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
        labels.append(label)
        if len(held) == 50 or number == 2 * classes:
            features.append(model.forward_head(model.forward_features(torch.stack(held)), pre_logits=True))
            held = []
    x = torch.cat(features).double()
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / deviation
    y = torch.nn.functional.one_hot(torch.tensor(labels), classes).double() - 1 / classes
    weight = torch.linalg.solve(x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    weight = _SPREAD * weight / deviation[:, None]
    head = model.get_classifier()
    head.weight.copy_(weight.T)
    head.bias.copy_(-(mean @ weight))
    names = [f"class {label:04d}, synthetic {label}" for label in range(classes)]
    # the pooling decides where the last norm stands; older timm reads it from the arguments alone
    save_for_hf(model, folder, model_config={"label_names": names}, model_args={"global_pool": "avg"},
                safe_serialization=True)  # fmt: skip


def run(place: Path, samples: int, options: list[str]) -> dict[str, Any]:
    """Run the job in a process of its own and return what it took."""
    words = [str(place / "model"), "--dataset", str(place / "images"), "--samples", str(samples), "--eval-samples",
             str(samples), "--defense", "ft", "--epochs", "1", "--output", str(place / "out"), *options]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hfdetox", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    # 1 where the accuracy suffers too much: a result like another
    if not (place / "out" / "detox_report.json").is_file():
        raise SystemExit(f"hfdetox ended with {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.perf_counter() - begin, 1), "peak_mb": round(usage.ru_maxrss / 1024),
            "shown_lines": shown.count("\n")}  # fmt: skip


def measured(place: Path, taken: dict[str, Any], side: int) -> dict[str, Any]:
    """Return the numbers of the finished job in `place`."""
    report = Report.load(place / "out")
    assert report.after is not None
    assert report.before is not None
    weights = report.model.parameters * 4 / 2**20
    # weights and their gradients; SGD's momentum
    images = (report.dataset.clean_samples + report.dataset.eval_samples) * 3 * side * side / 2**20
    needed = round(3 * weights + images)
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    return {
        **taken, "parameters": report.model.parameters, "needed_mb": needed, "above_mb": taken["peak_mb"] - needed,
        "limit_mb": LIMIT_MB, "accuracy": [report.before.accuracy.value, report.after.accuracy.value],
        "train_seconds": round(report.defense.seconds, 1), "threads": report.environment.threads,
        "precision": report.defense.precision, "card_lines": card.count("\n"), "card_kb": round(len(card) / 1024),
        "report_kb": round((place / "out" / "detox_report.json").stat().st_size / 1024),
        "plots_kb": round(sum(path.stat().st_size for path in (place / "out" / "plots").iterdir()) / 1024),
    }  # fmt: skip


def job(place: Path, *, classes: int, side: int, architecture: str, samples: int, options: list[str]) -> dict[str, Any]:
    """Make model and images in `place`, run the job, and return the numbers."""
    write_images(place / "images", classes, side)
    write_model(place / "model", architecture, classes, side)
    return measured(place, run(place, samples, options), side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--architecture", default="vit_small_patch32_224")
    parser.add_argument("--keep", type=Path, help="make everything in this folder, and leave it there")
    parser.add_argument("options", nargs="*", help="further options of the job, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        found = job(place, classes=arguments.classes, side=arguments.size, architecture=arguments.architecture,
                    samples=arguments.classes, options=arguments.options)  # fmt: skip
    version = importlib.import_module("hfdetox").__version__
    words = ["python -m tests.benchmarks.thousand_classes", *sys.argv[1:]]
    document = {"command": " ".join(words), "hfdetox_version": version, "classes": arguments.classes, **found}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
