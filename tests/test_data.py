"""Choosing and fetching clean images from folders, objects and the Hub."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hfdetox import data as data_module
from hfdetox import sources
from hfdetox.choice import choose_balanced, quotas, sample_count
from hfdetox.columns import ColumnError
from hfdetox.data import TooFewImagesError, default_dataset, load_images
from hfdetox.errors import HubError, RunError, UsageError
from hfdetox.hub_requests import AccessError, UnknownRepoError
from hfdetox.images import BrokenImageError
from hfdetox.labels import LabelMismatchError
from hfdetox.origin import DatasetError, LocalFiles

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


@pytest.fixture
def folder(tmp_path):
    """A parquet dataset: 90 training rows in groups of ten, 30 test rows, three classes in turn."""
    write_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet", cycle(90))
    write_parquet(tmp_path / "d" / "data" / "test-00000-of-00001.parquet", cycle(30), first=1000)
    return tmp_path / "d"


def load(dataset, labels=NAMES, *, samples=12, **options):
    notes = []
    images = load_images(dataset, labels=labels, samples=samples, warn=notes.append, **options)
    return images, notes


# quotas and counts


@pytest.mark.parametrize(
    ("available", "count", "expected"),
    [
        ({0: 9, 1: 9, 2: 9}, 6, [2, 2, 2]),
        ({0: 1, 1: 9, 2: 9}, 9, [1, 4, 4]),
        ({0: 0, 1: 9, 2: 3}, 10, [0, 3, 7]),
        ({0: 1, 1: 2, 2: 3}, 100, [1, 2, 3]),
        ({0: 9, 1: 9, 2: 9}, 7, [2, 2, 3]),
        ({0: 9, 1: 9, 2: 9}, 2, [0, 1, 1]),
    ],
)
def test_quotas_are_as_equal_as_the_classes_allow(available, count, expected):
    taken = quotas(available, count, np.random.default_rng(0))
    assert sorted(taken.values()) == expected
    assert all(taken[c] <= available[c] for c in available)


def test_who_gets_the_single_images_left_over_depends_on_the_seed():
    given = Counter(tuple(quotas({0: 9, 1: 9, 2: 9}, 4, np.random.default_rng(s)).values()) for s in range(30))
    assert set(given) == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def test_no_more_blocks_are_read_than_the_shares_need():
    read = []

    def blocks():
        for number in range(100):
            read.append(number)
            yield np.arange(10) + 10 * number, np.arange(10) % 2

    choice, _ = choose_balanced(blocks(), lambda: 20, [0, 1], np.random.default_rng(0))
    assert read == [0, 1]
    assert np.bincount(choice.labels).tolist() == [10, 10]
    assert (np.diff(choice.indices) > 0).all()


def test_a_fraction_is_capped_and_a_count_is_not():
    assert sample_count(0.05, 50_000) == 2500
    assert sample_count(0.5, 50_000) == 5000
    assert sample_count(1.0, 100) == 100
    assert sample_count(20_000, 50_000) == 20_000
    assert sample_count(0.05, 3) == 1


@pytest.mark.parametrize("samples", [0, -1, 0.0, 1.5, -0.1, True, float("nan"), "many"])
def test_impossible_sample_sizes(folder, samples):
    with pytest.raises(UsageError, match="--samples"):
        load(folder, samples=samples)


@pytest.mark.parametrize("count", [0, -3])
def test_impossible_evaluation_sizes(folder, count):
    with pytest.raises(UsageError, match="--eval-samples"):
        load(folder, eval_samples=count)


# parquet folders and the choice of images


def test_a_parquet_folder(folder):
    images, notes = load(folder)
    assert notes == []
    assert np.bincount(images.clean.labels).tolist() == [4, 4, 4]
    assert len(images.evaluation) == 30
    for position, row in enumerate(images.clean.indices):
        assert images.clean.labels[position] == row % 3
        assert images.clean.image(position).tobytes() == Image.open(io.BytesIO(png(row))).tobytes()
    assert images.evaluation.image(7).tobytes() == Image.open(io.BytesIO(png(1007))).tobytes()
    info = images.info
    assert (info.id, info.split, info.eval_split, info.source, info.revision) == ("d", "train", "test", "folder", None)
    assert (info.clean_samples, info.eval_samples) == (12, 30)
    assert info.indices_sha256 == images.clean.indices_sha256
    assert info.eval_indices_sha256 == images.evaluation.indices_sha256
    assert str(folder.parent) not in json.dumps(vars(info))


def test_the_seed_decides_the_choice(folder):
    first, again, other = load(folder)[0], load(folder)[0], load(folder, seed=1)[0]
    assert first.info == again.info
    assert first.clean.indices != other.clean.indices
    assert first.info.indices_sha256 != other.info.indices_sha256


def test_few_row_groups_are_touched(folder, monkeypatch):
    read = []
    original = sources.ParquetSource._read

    def spy(self, group, column):
        read.append((self.split, group.number, column))
        return original(self, group, column)

    monkeypatch.setattr(sources.ParquetSource, "_read", spy)
    load(folder, samples=15, eval_samples=1)
    # 15 images of nine groups of ten: two groups hold enough, labels of no more groups are looked at
    assert sum(split == "train" and column == "image" for split, _, column in read) == 2
    assert sum(split == "train" and column == "label" for split, _, column in read) == 2
    assert sum(split == "test" and column == "image" for split, _, column in read) == 1
    assert {column for _, _, column in read} == {"image", "label"}


def test_labels_are_in_the_models_order(folder):
    images, _ = load(folder, labels=["Horse", "CAT", "dog"])
    assert [{0: 1, 1: 2, 2: 0}[row % 3] for row in images.clean.indices] == images.clean.labels.tolist()
    assert images.info.label_map == {"cat": "CAT", "horse": "Horse"}


def test_a_class_with_few_images_gives_what_it_has_with_a_warning(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0] * 40 + [1] * 40 + [2] * 2)
    write_parquet(tmp_path / "test.parquet", cycle(9), first=1000)
    images, notes = load(tmp_path, samples=20)
    assert np.bincount(images.clean.labels).tolist() == [9, 9, 2]
    assert any("not balanced: 2 to 9" in note for note in notes)


def test_a_class_without_an_image_needs_the_switch(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(40, 2))
    write_parquet(tmp_path / "test.parquet", cycle(9, 2), first=1000)
    with pytest.raises(TooFewImagesError, match=r"no image of 1 of the model's 3 classes \(horse\).*--allow-missing"):
        load(tmp_path, samples=20)
    images, notes = load(tmp_path, samples=20, allow_missing_classes=True)
    assert np.bincount(images.clean.labels, minlength=3).tolist() == [10, 10, 0]
    assert any("no clean image of 1 of the model's 3 classes (horse)" in note for note in notes)


def test_more_samples_than_images(folder):
    with pytest.raises(TooFewImagesError, match="--samples 91: split train has 90 labelled images"):
        load(folder, samples=91)
    assert load(folder, samples=90)[0].info.clean_samples == 90


def test_fewer_samples_than_classes(folder):
    with pytest.raises(TooFewImagesError, match="fewer than the 3 classes"):
        load(folder, samples=2)


def test_a_fraction_of_the_split(folder):
    assert load(folder, samples=0.1)[0].info.clean_samples == 9


def test_evaluation_images_are_a_seeded_uniform_choice(folder):
    images, _ = load(folder, eval_samples=10)
    assert len(set(images.evaluation.indices)) == 10
    drawn = Counter(row for seed in range(40) for row in load(folder, eval_samples=10, seed=seed)[0].evaluation.indices)
    assert len(drawn) == 30


def test_more_evaluation_images_than_there_are(folder):
    images, notes = load(folder, eval_samples=31)
    assert len(images.evaluation) == 30
    assert any("--eval-samples 31: split test has 30 images; all are used" in note for note in notes)


def test_an_image_of_both_sets_is_left_out_of_the_evaluation(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(6))
    bmp = io.BytesIO()
    Image.open(io.BytesIO(png(2))).save(bmp, "BMP")
    write_parquet(tmp_path / "test.parquet", cycle(4), images=[png(90), png(4), bmp.getvalue(), png(91)])
    images, notes = load(tmp_path, samples=6)
    assert images.evaluation.indices == [0, 3]
    assert images.info.eval_samples == 2
    assert any(note.startswith("2 evaluation images have the same pixels") for note in notes)


def test_a_dataset_with_one_split_gives_disjoint_parts(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(100))
    images, notes = load(tmp_path, samples=60)
    assert len(images.evaluation) == 20
    assert len(images.clean) == 60
    assert not set(images.evaluation.indices) & set(images.clean.indices)
    assert any("serves for both sets: 20 of its 100" in note for note in notes)
    assert load(tmp_path, samples=60)[0].info == images.info
    assert len(load(tmp_path, samples=30, eval_samples=70)[0].evaluation) == 70
    with pytest.raises(TooFewImagesError, match="has 30 labelled images"):
        load(tmp_path, samples=31, eval_samples=70)
    with pytest.raises(TooFewImagesError, match="--eval-samples"):
        load(tmp_path, samples=3, eval_samples=100)


def test_splits_can_be_named(folder):
    images, _ = load(folder, split="test", eval_split="train")
    assert (images.info.split, images.info.eval_split) == ("test", "train")
    same, _ = load(folder, split="train", eval_split="train")
    assert not set(same.evaluation.indices) & set(same.clean.indices)
    with pytest.raises(UsageError, match="--eval-split dev: the dataset has no such split; it has train, test"):
        load(folder, eval_split="dev")


def test_a_test_split_without_labels_gives_way_to_validation(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(30))
    write_parquet(tmp_path / "test.parquet", [-1] * 9, first=500)
    write_parquet(tmp_path / "validation.parquet", cycle(9), first=600)
    images, notes = load(tmp_path)
    assert images.info.eval_split == "validation"
    assert any("split test has no labels" in note for note in notes)
    with pytest.raises(TooFewImagesError, match="split test has no image with a label"):
        load(tmp_path, eval_split="test")


def test_rows_without_a_label_are_left_out_with_a_warning(tmp_path):
    write_parquet(tmp_path / "train.parquet", [*cycle(30), None, -1])
    write_parquet(tmp_path / "test.parquet", [None, *cycle(9), -1], first=500)
    images, notes = load(tmp_path, samples=30)
    assert max(images.clean.indices) < 30
    assert images.evaluation.indices == list(range(1, 10))
    assert any("2 of 11 rows of split test have no label" in note for note in notes)


def test_a_broken_image_is_named_by_its_row(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(9))
    contents = [png(100 + i) for i in range(9)]
    contents[5] = contents[5][:60]
    write_parquet(tmp_path / "test.parquet", cycle(9), images=contents)
    with pytest.raises(BrokenImageError, match="image 5 of split test"):
        load(tmp_path, samples=3)


def test_a_damaged_parquet_file_is_named(folder):
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((RunError, UsageError), match="cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_progress_covers_every_image(folder):
    calls = []
    load(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (42, 42)
    assert calls == sorted(calls)


# columns and labels


def test_plain_integer_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(30), names=None)
    write_parquet(tmp_path / "test.parquet", cycle(9), names=None, first=500)
    images, notes = load(tmp_path)
    assert [row % 3 for row in images.clean.indices] == images.clean.labels.tolist()
    assert any("plain integers" in note for note in notes)
    with pytest.raises(LabelMismatchError, match="has the label 2 and the model 2 labels"):
        load(tmp_path, labels=NAMES[:2])


@pytest.mark.parametrize("values", [["dog", "Cat", "HORSE"], ["1", "0", "2"]])
def test_text_labels(tmp_path, values):
    write_parquet(tmp_path / "train.parquet", [values[i % 3] for i in range(30)], text=True)
    write_parquet(tmp_path / "test.parquet", [values[i % 3] for i in range(9)], text=True, first=500)
    images, _ = load(tmp_path)
    assert [[1, 0, 2][row % 3] for row in images.clean.indices] == images.clean.labels.tolist()


def test_labels_that_do_not_match_stop_before_any_image_is_read(folder, monkeypatch):
    monkeypatch.setattr(sources.ParquetSource, "fetch", lambda *_: pytest.fail("images were read"))
    with pytest.raises(LabelMismatchError, match=r"unmatched in the dataset .*cat"):
        load(folder, labels=["wolf", "dog", "horse"])


def test_a_label_map_drops_a_class(folder):
    images, _ = load(folder, labels=["cat", "dog"], label_map={"horse": None})
    assert all(row % 3 < 2 for row in [*images.clean.indices, *images.evaluation.indices])
    assert images.info.eval_samples == 20
    assert images.info.label_map == {"horse": ""}


def table(**columns):
    count = len(next(iter(columns.values()))[1])
    spec = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    return datasets.Dataset.from_dict({n: v for n, (_, v) in columns.items()}, features=spec) if count else None


def pictures(count, first=0):
    return datasets.Image(), [{"bytes": png(first + i), "path": None} for i in range(count)]


def test_no_image_column():
    dataset = table(text=(datasets.Value("string"), ["a"] * 9), label=(datasets.ClassLabel(names=NAMES), cycle(9)))
    with pytest.raises(ColumnError, match=r"no image column .* text \(string\), label \(ClassLabel\)") as caught:
        load(dataset)
    assert "--image-column" in str(caught.value)


def test_no_label_column():
    with pytest.raises(ColumnError, match="no label column"):
        load(table(image=pictures(9), score=(datasets.Value("float32"), [0.5] * 9)))


def test_several_label_columns_must_be_chosen_from():
    classes = datasets.ClassLabel(names=NAMES)
    dataset = table(img=pictures(30), fine_label=(classes, cycle(30)), coarse_label=(classes, [0] * 30))
    with pytest.raises(ColumnError, match="fine_label, coarse_label; choose with --label-column"):
        load(dataset)
    images, _ = load(dataset, label_column="fine_label")
    assert [row % 3 for row in images.clean.indices] == images.clean.labels.tolist()
    with pytest.raises(ColumnError, match="no column 'kind' for --label-column"):
        load(dataset, label_column="kind")


def test_a_named_column_must_hold_what_it_is_for():
    dataset = table(img=pictures(9), label=(datasets.ClassLabel(names=NAMES), cycle(9)))
    with pytest.raises(ColumnError, match="column 'label' holds ClassLabel, not images"):
        load(dataset, image_column="label")
    with pytest.raises(ColumnError, match=r"column 'img' holds .*not one label"):
        load(dataset, label_column="img")


def test_images_without_the_image_type(tmp_path):
    rows = [{"picture": png(i), "class": i % 3} for i in range(40)]
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain" / "train.parquet")
    images, _ = load(tmp_path / "plain")
    assert images.clean.image(0).size == (8, 8)


# objects


def test_dataset_objects(tmp_path):
    train = table(image=pictures(30), label=(datasets.ClassLabel(names=NAMES), cycle(30)))
    test = table(image=pictures(9, 500), label=(datasets.ClassLabel(names=NAMES), cycle(9)))
    both = datasets.DatasetDict(train=train, test=test)
    images, _ = load(both)
    assert images.info.source == "object"
    assert images.clean.image(0).tobytes() == Image.open(io.BytesIO(png(images.clean.indices[0]))).tobytes()
    assert load(train, eval_samples=5)[0].info.eval_samples == 5
    assert load(train.with_format("torch"), eval_samples=5)[0].info.eval_samples == 5
    both.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved")[0].info.indices_sha256 == images.info.indices_sha256
    with pytest.raises(DatasetError, match="streaming"):
        load(both["train"].to_iterable_dataset())


# image folders and streams


def write_folders(root, split, count, first=0):
    for i in range(count):
        path = root / split / NAMES[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(first + i))


def write_tar(path, count, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for name, content in ((f"{i:05}.png", png(first + i)), (f"{i:05}.cls", str(i % 3).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_an_image_folder(tmp_path):
    write_folders(tmp_path / "f", "train", 30)
    write_folders(tmp_path / "f", "test", 9, 500)
    images, _ = load(tmp_path / "f", labels=["dog", "horse", "cat"])
    assert np.bincount(images.clean.labels).tolist() == [4, 4, 4]
    assert len(images.evaluation) == 9
    known = {Image.open(io.BytesIO(png(i))).tobytes(): (i % 3 + 2) % 3 for i in range(30)}
    assert all(known[images.clean.image(i).tobytes()] == images.clean.labels[i] for i in range(12))
    assert load(tmp_path / "f", seed=3)[0].clean.indices != images.clean.indices


def test_an_image_folder_in_an_archive_is_refused(tmp_path):
    write_folders(tmp_path / "plain", "train", 9)
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "z" / "train.zip", "w") as archive:
        for path in sorted((tmp_path / "plain" / "train").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "plain" / "train"))
    with pytest.raises(DatasetError, match=r"image folder in archives \(train.zip\)"):
        load(tmp_path / "z")


def test_a_webdataset_is_read_no_further_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_STREAM_BLOCK", 20)
    write_tar(tmp_path / "w" / "train-000.tar", 200)
    write_tar(tmp_path / "w" / "test-000.tar", 9, 500)
    images, _ = load(tmp_path / "w")
    assert np.bincount(images.clean.labels).tolist() == [4, 4, 4]
    assert max(images.clean.indices) < 20
    row = images.clean.indices[5]
    assert images.clean.image(5).tobytes() == Image.open(io.BytesIO(png(row))).tobytes()


def test_the_scan_limit_is_kept_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_STREAM_BLOCK", 7)
    for module in (sources, data_module):
        monkeypatch.setattr(module, "SCAN_LIMIT", 21)
    write_tar(tmp_path / "w" / "train-000.tar", 60)
    write_tar(tmp_path / "w" / "test-000.tar", 30, 500)
    with pytest.raises(TooFewImagesError, match=r"its first 21 rows, the scan limit\) has 21 labelled images"):
        load(tmp_path / "w", samples=22)
    images, notes = load(tmp_path / "w", samples=0.5)
    assert len(images.evaluation) == 21
    assert any("split test is a stream: its first 21 rows were read" in note for note in notes)


def test_a_damaged_tar_is_an_error_of_one_line(tmp_path):
    write_tar(tmp_path / "w" / "train-000.tar", 60)
    write_tar(tmp_path / "w" / "test-000.tar", 9, 500)
    path = tmp_path / "w" / "train-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:60_000])
    with pytest.raises(RunError, match="split train cannot be read") as caught:
        load(tmp_path / "w", samples=60)
    assert "\n" not in str(caught.value)
    # tarfile takes a damaged header for the end; only the card knows how many rows there should be
    path.write_bytes(content[:40_960] + b"\xff" * 2048 + content[43_008:])
    info = "dataset_info:\n  splits:\n  - name: train\n    num_examples: 60\n  - name: test\n    num_examples: 9\n"
    (tmp_path / "w" / "README.md").write_text(f"---\n{info}---\n")
    with pytest.raises(RunError, match=r"split train ends after .* of 60 rows"):
        load(tmp_path / "w", samples=60)


def test_rows_cannot_name_files_outside_the_folder(tmp_path):
    files = LocalFiles(tmp_path / "d")
    for name in ("/etc/hostname", str(tmp_path / "d" / ".." / "secret.png"), "hf://datasets/a/b/c.png"):
        with pytest.raises(DatasetError, match="outside the dataset's folder"):
            files.path(name)
    assert files.path(str(tmp_path / "d" / "a.png")) == str(tmp_path / "d" / "a.png")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(DatasetError, match="no such folder"):
        load(name)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DatasetError, match="no data files"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DatasetError, match="is a file"):
        load(tmp_path / "a.txt")


# the Hub


@pytest.fixture
def repo(hub, repo_name, folder):
    """The folder as a dataset on the Hub."""
    name = repo_name("data")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, folder, repo_type="dataset")
    return name


def test_a_hub_dataset_gives_what_the_folder_gives(hub, repo, folder):
    images, _ = load(repo)
    local, _ = load(folder)
    head = hub.repo(repo, "dataset").refs["refs/heads/main"]
    assert (images.info.id, images.info.revision, images.info.source) == (repo, head, "hub")
    assert images.info.indices_sha256 == local.info.indices_sha256
    assert [images.clean.image(i).tobytes() for i in range(12)] == [local.clean.image(i).tobytes() for i in range(12)]


def test_a_large_parquet_file_is_not_downloaded_whole(hub, repo_name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALL_SPLIT", 0)
    write_parquet(tmp_path / "train.parquet", cycle(600), side=40, group=30)
    write_parquet(tmp_path / "test.parquet", cycle(30), side=40, first=5000)
    name = repo_name("large")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path, repo_type="dataset")
    hub.log.clear()
    images, _ = load(name, samples=30)
    assert images.info.indices_sha256 == load(tmp_path, samples=30)[0].info.indices_sha256
    whole = (tmp_path / "train.parquet").stat().st_size
    ranges = [r for r in hub.log if r.origin == "storage" and "train" in r.path]
    assert all(request.range for request in ranges)
    sizes = [int(end) - int(start) + 1 for start, end in (r.range.removeprefix("bytes=").split("-") for r in ranges)]
    # the footer is asked for with 64 KiB around it; what is left is one row group of twenty and labels
    assert whole > 2_000_000
    assert sum(sizes) < whole / 4
    # all of the test split is wanted, so it is fetched in one piece
    assert any(r.range is None and "test" in r.path for r in hub.log if r.origin == "storage" and r.method == "GET")


def test_the_commit_is_pinned_and_chosen(hub, repo, tmp_path):
    old = hub.repo(repo, "dataset").refs["refs/heads/main"]
    write_parquet(tmp_path / "new.parquet", cycle(60))
    hub.commit(repo, {"data/train-00000-of-00001.parquet": tmp_path / "new.parquet"}, repo_type="dataset")
    assert load(repo, samples=1.0)[0].info.clean_samples == 60
    images, _ = load(repo, samples=1.0, revision=old)
    assert images.info.clean_samples == 90
    assert images.info.revision == old
    with pytest.raises(DatasetError, match="only a dataset on the Hub has revisions"):
        load(tmp_path, revision=old)


def test_an_unknown_dataset(hub):
    with pytest.raises(UnknownRepoError, match="dataset me/nothing is not on the Hub"):
        load("me/nothing")


def test_a_gated_dataset_without_a_token(hub, repo, monkeypatch):
    hub.repo(repo, "dataset").gated = "auto"
    with pytest.raises(AccessError, match="gated"):
        load(repo)


def test_a_private_dataset_with_a_token(hub, repo, hub_token):
    hub.repo(repo, "dataset").private = True
    assert load(repo)[0].info.clean_samples == 12


def test_a_failing_hub_does_not_let_another_version_stand_in(hub, repo, tmp_path):
    datasets.load_dataset(repo)  # now in the cache of `datasets`, which it falls back to in silence
    write_parquet(tmp_path / "new.parquet", cycle(60))
    hub.commit(repo, {"data/train-00000-of-00001.parquet": tmp_path / "new.parquet"}, repo_type="dataset")
    hub.faults.answer("HEAD", f"/datasets/{repo}/resolve", 404, times=None)
    hub.faults.answer("GET", f"/api/datasets/{repo}/revision", 404, times=None)
    with pytest.raises(HubError, match="the Hub failed on the way"):
        load(repo)


def test_a_lost_range_is_asked_for_again(hub, repo, monkeypatch):
    monkeypatch.setattr(sources, "_SMALL_SPLIT", 0)
    monkeypatch.setattr(sources, "_WHOLE_FILE_SHARE", 2)
    rule = hub.faults.answer("GET", "train-", 500, times=2, origin="storage", skip=3)
    assert load(repo)[0].info.clean_samples == 12
    assert rule.hits == 2


def test_configurations(hub, repo_name, tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", cycle(60))
    write_parquet(tmp_path / "b" / "train.parquet", cycle(90))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: a/train.parquet\n- config_name: big\n"
        "  data_files: b/train.parquet\n---\n"
    )
    name = repo_name("configs")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path, repo_type="dataset")
    images, _ = load(name, config="big", eval_samples=60, samples=30)
    assert images.info.config == "big"
    for config in (None, "huge"):
        with pytest.raises(DatasetError, match=r"small.*big.*--config"):
            load(name, config=config)


def test_a_loading_script_is_never_run(hub, repo_name, tmp_path):
    name = repo_name("script")
    hub.create_repo(name, "dataset")
    marker = tmp_path / "ran"
    hub.commit(name, {f"{name.split('/')[1]}.py": f"open({str(marker)!r}, 'w')"}, repo_type="dataset")
    with pytest.raises(DatasetError, match="loading script"):
        load(name)
    assert not marker.exists()


def test_only_the_chosen_images_of_a_hub_folder_are_fetched(hub, repo_name, tmp_path):
    write_folders(tmp_path, "train", 60)
    write_folders(tmp_path, "test", 6, 500)
    name = repo_name("loose")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path, repo_type="dataset")
    hub.log.clear()
    images, _ = load(name)
    assert images.info.clean_samples == 12
    asked = {r.path for r in hub.log if "/resolve/" in r.path and "/train/" in r.path}
    assert len(asked) == 12


SCRIPT = """
import sys
from hfdetox.data import load_images
images = load_images(sys.argv[1], labels=["cat", "dog", "horse"], samples=12)
print(images.info.indices_sha256)
"""


def run_script(environment, name, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_a_process_that_leaves_a_stream_early_ends(hub, repo_name, tmp_path, fresh_env):
    write_tar(tmp_path / "w" / "train-000.tar", 3000)
    write_tar(tmp_path / "w" / "test-000.tar", 9, 5000)
    name = repo_name("stream")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path / "w", repo_type="dataset")
    result = run_script(fresh_env, name)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) == 64


def test_offline_with_and_without_the_files(hub, repo, fresh_env, folder):
    offline = {**fresh_env, "HF_HUB_OFFLINE": "1"}
    nothing = run_script(offline, repo)
    assert nothing.returncode == 1
    assert "OfflineError" in nothing.stderr
    online = run_script(fresh_env, repo)
    assert online.returncode == 0, online.stderr
    hub.log.clear()
    cached = run_script(offline, repo)
    assert cached.returncode == 0, cached.stderr
    assert cached.stdout == online.stdout
    assert hub.log == []


def test_a_half_cached_split_is_no_split(hub, repo_name, tmp_path, fresh_env):
    for shard in range(2):
        write_parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", cycle(30), first=100 * shard)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", cycle(9), first=900)
    name = repo_name("shards")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path / "data", repo_type="dataset")
    assert run_script(fresh_env, name).returncode == 0
    next(Path(fresh_env["HF_HOME"]).rglob("train-00001-of-00002.parquet")).unlink()
    partial = run_script({**fresh_env, "HF_HUB_OFFLINE": "1"}, name)
    assert "only 1 of the 2 files train-" in partial.stderr.splitlines()[-1]


# the model card's dataset


def test_the_one_dataset_of_a_card():
    assert default_dataset("---\nlicense: mit\ndatasets:\n- org/data\n---\n# text") == "org/data"
    assert default_dataset("---\r\ndatasets: cifar10\r\n---\r\n") == "cifar10"
    assert default_dataset("---\ndatasets: [a/b, a/b]\n---") == "a/b"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "names no dataset"),
        ("# no header", "names no dataset"),
        ("---\nlicense: mit\n---\n", "names no dataset"),
        ("---\ndatasets: []\n---\n", "names no dataset"),
        ("---\ndatasets: [3]\n---\n", "names no dataset"),
        ("---\ndatasets: [a/b, c/d]\n---\n", r"names 2 datasets \(a/b, c/d\)"),
        ("---\na: [\n---\n", "cannot be read"),
    ],
)
def test_a_card_that_leaves_it_open(card, message):
    with pytest.raises(UsageError, match=message) as caught:
        default_dataset(card)
    assert "--dataset" in str(caught.value)
