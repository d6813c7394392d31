"""Image folders: which split and class each image is of, whatever the folders and files are called."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest

from hfdetox.data.columns import ColumnError
from hfdetox.data.folders import arrange
from hfdetox.data.opened import DatasetError
from tests.image_data import NAMES, load, png

VEHICLES = ["bus", "car", "train"]


def write(root, paths, first=0):
    for i, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(first + i))
    return root


def each(folder, classes, count, name="{:03}.png"):
    return [f"{folder}{one}/{name.format(i)}" for one in classes for i in range(count)]


def splits(folder):
    return {split: Counter(-1 if label < 0 else folder.classes[label] for _, label in images)
            for split, images in folder.splits.items()}  # fmt: skip


# where images lie, and what they are


@pytest.mark.parametrize(("paths", "expected"), [
    (each("", VEHICLES, 2), {"train": dict.fromkeys(VEHICLES, 2)}),
    (each("train/", VEHICLES, 3) + each("test/", VEHICLES, 1),
     {"train": dict.fromkeys(VEHICLES, 3), "test": dict.fromkeys(VEHICLES, 1)}),
    # split words in the names of classes and files
    (each("", ["val-d-isere", "test_tubes", "dev"], 2), {"train": {"val-d-isere": 2, "test_tubes": 2, "dev": 2}}),
    (each("", NAMES, 2, "test_{}.png") + each("", NAMES, 2, "train-{}.png"), {"train": dict.fromkeys(NAMES, 4)}),
    (each("", ["eval", "train"], 2) + each("", ["x"], 1), {"train": {"eval": 2, "train": 2, "x": 1}}),
    # splits of other names, in other cases, deeper, and a third one
    (each("Training/", NAMES, 2) + each("VAL/", NAMES, 1),
     {"train": dict.fromkeys(NAMES, 2), "validation": dict.fromkeys(NAMES, 1)}),
    (each("data/train/", NAMES, 2) + each("data/test/", NAMES, 1),
     {"train": dict.fromkeys(NAMES, 2), "test": dict.fromkeys(NAMES, 1)}),
    (each("train/images/", NAMES, 2) + each("test/images/", NAMES, 1),
     {"train": dict.fromkeys(NAMES, 2), "test": dict.fromkeys(NAMES, 1)}),
    (each("train/", NAMES, 2) + each("extra/", NAMES, 1),
     {"train": dict.fromkeys(NAMES, 2), "extra": dict.fromkeys(NAMES, 1)}),
    (each("test/", NAMES, 2), {"test": dict.fromkeys(NAMES, 2)}),
    # the layout of tiny-imagenet
    ([f"train/{name}/images/{i}.png" for name in NAMES for i in range(2)] + ["val/images/7.png"],
     {"train": dict.fromkeys(NAMES, 2), "validation": {-1: 1}}),
    # splits inside the classes
    ([f"{name}/{split}/{i}.png" for name in NAMES for split in ("train", "val") for i in range(2)],
     {"train": dict.fromkeys(NAMES, 2), "validation": dict.fromkeys(NAMES, 2)}),
    ([f"all/{name}/{split}/1.png" for name in NAMES[:2] for split in ("Training", "Testing")],
     {"train": dict.fromkeys(NAMES[:2], 1), "test": dict.fromkeys(NAMES[:2], 1)}),
    # folders of kinds around those of classes
    (["pets/cat/1.png", "pets/dog/1.png", "farm/horse/1.png"], {"train": dict.fromkeys(NAMES, 1)}),
    # no classes
    (["1.png", "2.png"], {"train": {-1: 2}}),
    (["train/1.png", "test/2.png"], {"train": {-1: 1}, "test": {-1: 1}}),
])  # fmt: skip
def test_splits_and_classes_are_told_from_the_folders(paths, expected):
    folder = arrange(paths, ())
    assert splits(folder) == expected
    assert folder.left_out == []
    assert next(iter(folder.splits)) == "train" or "train" not in folder.splits


@pytest.mark.parametrize(("labels", "classes"), [(NAMES, NAMES), (["day", "night"], ["day", "night"])])
def test_the_models_labels_say_which_folders_are_the_classes(labels, classes):
    paths = [f"train/{one}/{time}/{i}.png" for one in NAMES for time in ("day", "night") for i in range(2)]
    assert list(arrange(paths, labels).classes) == classes


@pytest.mark.parametrize(("paths", "labels", "expected"), [
    (each("", ["train", "val", "test"], 2), ["train", "val", "test"], {"train": {"train": 2, "val": 2, "test": 2}}),
    (each("", ["Test", "Train"], 1), ["train", "test"], {"train": {"Test": 1, "Train": 1}}),
    (each("train/", ["train", "dev"], 2) + each("dev/", ["train", "dev"], 1), ["dev", "train"],
     {"train": {"train": 2, "dev": 2}, "validation": {"train": 1, "dev": 1}}),
    ([f"{kind}/{name}/1.png" for kind in ("boats", "cars") for name in ("eval", "dev")], ["dev", "eval"],
     {"train": {"eval": 2, "dev": 2}}),
    # the layout of STL-10
    ([*each("train/", NAMES, 2), "test/1.png", "unlabeled/1.png"], NAMES,
     {"train": dict.fromkeys(NAMES, 2), "test": {-1: 1}, "unlabeled": {-1: 1}}),
])  # fmt: skip
def test_the_models_labels_say_which_folders_are_splits(paths, labels, expected):
    assert splits(arrange(paths, labels)) == expected


@pytest.mark.parametrize(("outer", "named"), [
    (["fold1", "fold2"], ["fold1", "fold2"]), (["train2017", "val2017"], ["train2017", "val2017"]),
    (["train", "extra"], []), (["pets"], []),
])  # fmt: skip
def test_folders_that_may_have_been_splits_are_named(tmp_path, outer, named):
    write(tmp_path / "d", [path for one in outer for path in each(f"{one}/", NAMES, 20)])
    _, notes = load(tmp_path / "d", **({"eval_split": "extra"} if "extra" in outer else {}))
    said = [note for note in notes if "their images are taken together" in note]
    assert len(said) == bool(named)
    assert all(name in said[0] for name in named)


def test_images_beside_the_classes_are_left_out():
    folder = arrange([*each("train/", NAMES, 2), "train/preview.png", "cover.png"], ())
    assert folder.left_out == ["cover.png", "train/preview.png"]
    assert splits(folder) == {"train": dict.fromkeys(NAMES, 2)}


def test_names_in_another_unicode_form_are_the_same():
    paths = each("train/", [unicodedata.normalize("NFD", "Äpfel"), "Birne"], 1)
    paths += each("test/", [unicodedata.normalize("NFC", "Äpfel"), "Birne"], 1)
    assert arrange(paths, ()).classes == ("Birne", unicodedata.normalize("NFC", "Äpfel"))


# read


@pytest.mark.parametrize("where", ["here", "on the Hub"])
def test_a_class_called_train_is_a_class(tmp_path, hub, repo_name, where):
    folder = write(tmp_path / "flat", each("", VEHICLES, 30))
    both = write(tmp_path / "split", each("train/", VEHICLES, 30) + each("test/", VEHICLES, 10))
    if where == "on the Hub":
        names = []
        for one in (folder, both):
            names.append(repo_name(one.name))
            hub.create_repo(names[-1], "dataset")
            hub.commit_folder(names[-1], one, repo_type="dataset")
        folder, both = names
    images, _ = load(folder, VEHICLES, clean_samples=72)
    assert (len(images.clean), len(images.evaluation)) == (72, 18)
    assert images.clean.labels.bincount().tolist() == [24, 24, 24] or len(images.clean.labels.unique()) == 3
    images, notes = load(both, VEHICLES, clean_samples=90)
    assert (len(images.clean), len(images.evaluation)) == (90, 30)
    assert images.evaluation.labels.bincount().tolist() == [10, 10, 10]
    assert images.whole_split
    assert notes == []


def test_an_unlabelled_validation_folder_gives_way_to_a_part_of_train(tmp_path):
    paths = [f"train/{name}/images/{i}.png" for name in NAMES for i in range(20)]
    write(tmp_path / "tiny", [*paths, *(f"val/images/{i}.png" for i in range(30))])
    images, notes = load(tmp_path / "tiny")
    assert images.info.eval_split == "train"
    assert any("split validation has no labels; a part of train is measured" in note for note in notes)


def test_a_stray_image_is_named_and_left_out(tmp_path):
    write(tmp_path / "stray", [*each("", NAMES, 30), "preview.png"])
    images, notes = load(tmp_path / "stray")
    assert len(images.evaluation) == 18
    assert any("1 images of dataset stray lie beside the folders of classes, and are left out: preview.png" in note
               for note in notes)  # fmt: skip


def captions(folder, **more):
    lines = [{"file_name": str(path.relative_to(folder)), "text": "a square", **more} for path in folder.rglob("*.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_captions_without_a_label_leave_the_folders_names(tmp_path):
    write(tmp_path / "d", each("train/", NAMES, 20) + each("test/", NAMES, 10))
    for split in ("train", "test"):
        captions(tmp_path / "d" / split)
    images, notes = load(tmp_path / "d")
    assert images.evaluation.labels.bincount().tolist() == [10, 10, 10]
    assert any("metadata.jsonl of dataset d has no label column: the folders' names are the labels" in note
               for note in notes)  # fmt: skip


def test_labels_of_metadata_files_win_over_folders(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "d" / split, [f"part{i % 2}/{i:02}.png" for i in range(30)], 100 * (split == "test"))
        lines = [f"part{i % 2}/{i:02}.png,{NAMES[i % 3]}" for i in range(30)]
        (tmp_path / "d" / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    images, _ = load(tmp_path / "d")
    assert images.evaluation.labels.bincount().tolist() == [10, 10, 10]


def test_images_without_any_class_say_what_to_do(tmp_path):
    write(tmp_path / "d", [f"{i}.png" for i in range(9)])
    with pytest.raises(ColumnError, match=r"no image of dataset d lies in a folder of its class: .*metadata.csv"):
        load(tmp_path / "d")


def test_the_card_says_which_files_a_split_has(tmp_path):
    write(tmp_path / "d", each("a/", NAMES, 20) + each("b/", NAMES, 10))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/**\n  - split: test\n"
    (tmp_path / "d" / "README.md").write_text(card + "    path: b/**\n---\n")
    images, _ = load(tmp_path / "d")
    assert (len(images.evaluation), images.whole_split) == (30, True)
    (tmp_path / "d" / "README.md").write_text(card + "    path: '*/cat/**'\n---\n")
    with pytest.raises(DatasetError, match=r"000.png is in the splits train and test; say in the card"):
        load(tmp_path / "d")


def test_parquet_files_that_datasets_leaves_out_are_named(tmp_path):
    from tests.image_data import cycle, write_parquet

    write_parquet(tmp_path / "d" / "some.parquet", cycle(30))
    write_parquet(tmp_path / "d" / "more_test.parquet", cycle(60), first=100)
    _, notes = load(tmp_path / "d")
    assert any("1 files of dataset d are in no split and are not used: some.parquet" in note for note in notes)


def test_images_that_the_metadata_leaves_out_are_counted(tmp_path):
    for split, said in (("train", 24), ("test", 30)):
        write(tmp_path / "d" / split, [f"{i:02}.png" for i in range(30)], 100 * (split == "test"))
        lines = [json.dumps({"file_name": f"{i:02}.png", "label": NAMES[i % 3]}) for i in range(said)]
        (tmp_path / "d" / split / "metadata.jsonl").write_text("\n".join(lines))
    images, notes = load(tmp_path / "d", clean_samples=12)
    assert len(images.evaluation) == 30
    assert [note for note in notes if "metadata" in note] == [
        "6 images of split train are not in its metadata file, and are not used"]  # fmt: skip
