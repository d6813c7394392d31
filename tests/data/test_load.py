"""Choosing clean images: sizes, balance, seeds, splits, duplicates."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hfdetox.data import readers as sources
from hfdetox.data.images import BrokenImageError
from hfdetox.data.load import TooFewImagesError, default_dataset
from hfdetox.data.sampling import choose_balanced, class_quotas, sample_count
from hfdetox.errors import RunError, UsageError
from tests.image_data import (
    cycle,
    load,
    png,
    write_dataset,
    write_parquet,
    write_tar,
)


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "d")


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
    taken = class_quotas(available, count, np.random.default_rng(0))
    assert sorted(taken.values()) == expected
    assert all(taken[c] <= available[c] for c in available)


def test_who_gets_the_single_images_left_over_depends_on_the_seed():
    given = Counter(tuple(class_quotas({0: 9, 1: 9, 2: 9}, 4, np.random.default_rng(s)).values()) for s in range(30))
    assert set(given) == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def test_no_more_blocks_are_read_than_the_shares_need():
    read = []

    def blocks():
        for number in range(100):
            read.append(number)
            yield np.arange(10) + 10 * number, np.arange(10) % 2

    choice, _ = choose_balanced(blocks(), 20, [0, 1], np.random.default_rng(0))
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
        load(folder, clean_samples=samples)


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
    assert str(folder.parent) not in json.dumps(dataclasses.asdict(info))


def test_the_seed_decides_the_choice(folder):
    first, again, other = load(folder)[0], load(folder)[0], load(folder, seed=1)[0]
    assert first.info == again.info
    assert first.clean.indices != other.clean.indices
    assert first.info.indices_sha256 != other.info.indices_sha256


def test_few_row_groups_are_touched(folder, monkeypatch):
    read = []
    original = sources.ParquetReader._read

    def spy(self, group, column):
        read.append((self.split, group.number, column))
        return original(self, group, column)

    monkeypatch.setattr(sources.ParquetReader, "_read", spy)
    load(folder, clean_samples=15, eval_samples=1)
    # 15 images of nine groups of ten: two groups hold enough, labels of no more groups are looked at
    assert sum(split == "train" and column == "image" for split, _, column in read) == 2
    assert sum(split == "train" and column == "label" for split, _, column in read) == 2
    assert sum(split == "test" and column == "image" for split, _, column in read) == 1
    assert {column for _, _, column in read} == {"image", "label"}


def test_the_seed_decides_which_row_groups_are_read(folder):
    groups = {row // 10 for seed in range(5) for row in load(folder, clean_samples=6, seed=seed)[0].clean.indices}
    assert len(groups) > 2


def test_any_negative_label_is_none(tmp_path):
    write_parquet(tmp_path / "train.parquet", [*cycle(30), -100, -2])
    write_parquet(tmp_path / "test.parquet", cycle(9), first=500)
    assert max(load(tmp_path, clean_samples=30)[0].clean.indices) < 30


def test_labels_are_in_the_models_order(folder):
    images, _ = load(folder, labels=["Horse", "CAT", "dog"])
    assert [{0: 1, 1: 2, 2: 0}[row % 3] for row in images.clean.indices] == images.clean.labels.tolist()
    assert images.info.label_map == {"cat": "CAT", "horse": "Horse"}


def test_a_class_with_few_images_gives_what_it_has_with_a_warning(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0] * 40 + [1] * 40 + [2] * 2)
    write_parquet(tmp_path / "test.parquet", cycle(9), first=1000)
    images, notes = load(tmp_path, clean_samples=20)
    assert np.bincount(images.clean.labels).tolist() == [9, 9, 2]
    assert any("not balanced: 2 to 9" in note for note in notes)


def test_a_class_without_an_image_needs_the_switch(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(40, 2))
    write_parquet(tmp_path / "test.parquet", cycle(9, 2), first=1000)
    with pytest.raises(TooFewImagesError, match=r"no image of 1 of the model's 3 classes \(horse\).*--allow-missing"):
        load(tmp_path, clean_samples=20)
    images, notes = load(tmp_path, clean_samples=20, allow_missing_classes=True)
    assert np.bincount(images.clean.labels, minlength=3).tolist() == [10, 10, 0]
    assert any("no clean image of 1 of the model's 3 classes (horse)" in note for note in notes)


def test_more_samples_than_images(folder):
    with pytest.raises(TooFewImagesError, match="--samples 91: split train has 90 labelled images"):
        load(folder, clean_samples=91)
    assert load(folder, clean_samples=90)[0].info.clean_samples == 90


def test_fewer_samples_than_classes(folder):
    with pytest.raises(TooFewImagesError, match="fewer than the 3 classes"):
        load(folder, clean_samples=2)


def test_a_fraction_of_the_split(folder):
    assert load(folder, clean_samples=0.1)[0].info.clean_samples == 9


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
    images, notes = load(tmp_path, clean_samples=6)
    assert images.evaluation.indices == [0, 3]
    assert images.info.eval_samples == 2
    assert any(note.startswith("2 evaluation images have the same pixels") for note in notes)


def test_a_dataset_with_one_split_gives_disjoint_parts(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(100))
    images, notes = load(tmp_path, clean_samples=60)
    assert len(images.evaluation) == 20
    assert len(images.clean) == 60
    assert not set(images.evaluation.indices) & set(images.clean.indices)
    assert any("serves for both sets: 20 of its 100" in note for note in notes)
    assert load(tmp_path, clean_samples=60)[0].info == images.info
    assert len(load(tmp_path, clean_samples=30, eval_samples=70)[0].evaluation) == 70
    with pytest.raises(TooFewImagesError, match="has 30 labelled images"):
        load(tmp_path, clean_samples=31, eval_samples=70)
    with pytest.raises(TooFewImagesError, match="--eval-samples"):
        load(tmp_path, clean_samples=3, eval_samples=100)


def test_only_all_rows_of_a_split_of_its_own_are_a_whole_split(folder, tmp_path):
    assert load(folder)[0].whole_split
    assert load(folder, eval_samples=30)[0].whole_split
    assert not load(folder, eval_samples=29)[0].whole_split
    assert not load(folder, eval_split="train", clean_samples=30)[
        0
    ].whole_split  # a part of what the clean ones are from
    assert not load(folder, eval_split="train", clean_samples=12, eval_samples=78)[0].whole_split
    one_less = {"horse": None}
    assert not load(folder, labels=["cat", "dog"], label_map=one_less)[0].whole_split
    merged = {"horse": "dog", "dog": "dog"}  # all rows, and another task
    images, _ = load(folder, labels=["cat", "dog"], label_map=merged)
    assert (len(images.evaluation), images.whole_split) == (30, False)
    assert load(folder, labels=["horse", "cat", "dog"])[0].whole_split


def test_rows_that_are_left_out_make_it_a_part(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", cycle(30))
    write_parquet(tmp_path / "a" / "test.parquet", [*cycle(9), -1], first=500)
    assert not load(tmp_path / "a")[0].whole_split
    write_parquet(tmp_path / "b" / "train.parquet", cycle(6))
    write_parquet(tmp_path / "b" / "test.parquet", cycle(4), images=[png(90), png(4), png(92), png(91)])
    assert not load(tmp_path / "b", clean_samples=6)[0].whole_split  # one is among the clean images


def test_a_split_read_up_to_the_scan_limit_is_a_part(tmp_path, monkeypatch):
    write_tar(tmp_path / "train-000.tar", 30)
    write_tar(tmp_path / "test-000.tar", 21, 500)
    assert load(tmp_path)[0].whole_split
    monkeypatch.setattr(sources, "SCAN_LIMIT", 20)
    images, _ = load(tmp_path)
    assert (len(images.evaluation), images.whole_split) == (20, False)


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
    images, notes = load(tmp_path, clean_samples=30)
    assert max(images.clean.indices) < 30
    assert images.evaluation.indices == list(range(1, 10))
    assert any("2 of 11 rows of split test have no label" in note for note in notes)


@pytest.mark.parametrize("labels", [[None] * 30, [-1] * 30, [-1, None] * 15])
@pytest.mark.parametrize("test", [False, True])
def test_a_split_without_any_label_is_said_to_have_none(tmp_path, labels, test):
    write_parquet(tmp_path / "train.parquet", labels)
    if test:
        write_parquet(tmp_path / "test.parquet", cycle(9), first=500)
    for samples in (6, 0.5):
        with pytest.raises(TooFewImagesError, match=r"split train has no image with a label; name another --label-co"):
            load(tmp_path, clean_samples=samples)


def test_a_broken_image_is_named_by_its_row(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(9))
    contents = [png(100 + i) for i in range(9)]
    contents[5] = contents[5][:60]
    write_parquet(tmp_path / "test.parquet", cycle(9), images=contents)
    with pytest.raises(BrokenImageError, match="image 5 of split test"):
        load(tmp_path, clean_samples=3)


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
        ("---\na: 2026-13-41\n---\n", "cannot be read"),
        (f"---\na: {'[' * 3000}\n---\n", "cannot be read"),
        ("---\ndatasets: /home/jo/pictures\n---\n", "'/home/jo/pictures', which is no Hub id"),
        ("---\ndatasets: [../pictures]\n---\n", "'../pictures', which is no Hub id"),
        ("---\ndatasets: [./pictures]\n---\n", "'./pictures', which is no Hub id"),
        ("---\ndatasets: [a/b/c]\n---\n", "'a/b/c', which is no Hub id"),
    ],
)
def test_a_card_that_leaves_it_open(card, message):
    with pytest.raises(UsageError, match=message) as caught:
        default_dataset(card)
    assert "--dataset" in str(caught.value)
