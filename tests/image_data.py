"""Small datasets that the tests write: parquet, image folders, webdatasets, tables."""

from __future__ import annotations

import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hfdetox.data.load import load_images

NAMES = ["cat", "dog", "horse"]


def png(seed, side=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def features(names=NAMES):
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    return datasets.Features({"image": datasets.Image(), "note": datasets.Value("string"), "label": label})


def write_parquet(path, labels, *, names=NAMES, group=10, first=0, side=8, text=False, images=None):
    """Write one row per label; image i is `png(first + i)`."""
    rows = images or [png(first + i, side) for i in range(len(labels))]
    table = {
        "image": pa.array([{"bytes": row, "path": None} for row in rows], datasets.Image().pa_type),
        "note": pa.array(["x"] * len(rows)),
        "label": pa.array(labels, pa.string() if text else pa.int64()),
    }  # fmt: skip
    schema = features(names).arrow_schema if not text else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table, schema=schema), path, row_group_size=group)


def cycle(count, classes=3):
    return [i % classes for i in range(count)]


def write_dataset(root):
    """Write a parquet dataset: 90 training rows in groups of ten, 30 test rows, three classes in turn."""
    write_parquet(root / "data" / "train-00000-of-00001.parquet", cycle(90))
    write_parquet(root / "data" / "test-00000-of-00001.parquet", cycle(30), first=1000)
    return root


def write_folders(root, split, count, first=0):
    for i in range(count):
        path = root / split / NAMES[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(first + i))


def write_tar(path, count, first=0, extra=None, label=True, name="{:05}"):
    """Write a webdataset of images and labels; `extra` are more members of each example by their ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            members = {"png": png(first + i), **({"cls": str(i % 3).encode()} if label else {}), **(extra or {})}
            for ending, content in members.items():
                content = content(i) if callable(content) else content
                entry = tarfile.TarInfo(f"{name.format(i)}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def table(**columns):
    count = len(next(iter(columns.values()))[1])
    spec = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    return datasets.Dataset.from_dict({n: v for n, (_, v) in columns.items()}, features=spec) if count else None


def pictures(count, first=0):
    return datasets.Image(), [{"bytes": png(first + i), "path": None} for i in range(count)]


def load(dataset, labels=NAMES, *, clean_samples=12, **options):
    notes = []
    images = load_images(dataset, labels=labels, clean_samples=clean_samples, warn=notes.append, **options)
    return images, notes
