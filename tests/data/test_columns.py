"""Image and label columns, found or named, of folders and of `datasets` objects."""

from __future__ import annotations

import io

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hfdetox.config import DetoxOptions, EvaluateOptions
from hfdetox.data import readers as sources
from hfdetox.data.columns import ColumnError
from hfdetox.data.labels import LabelMismatchError
from hfdetox.data.load import pull_images
from hfdetox.data.opened import DatasetError
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from tests.image_data import (
    NAMES,
    cycle,
    load,
    pictures,
    png,
    table,
    write_dataset,
    write_parquet,
    write_tar,
)
from tests.tiny_models import timm_model


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "d")


# columns and labels


def test_plain_integer_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", cycle(30), names=None)
    write_parquet(tmp_path / "test.parquet", cycle(9), names=None, first=500)
    images, notes = load(tmp_path)
    assert [row % 3 for row in images.clean.indices] == images.clean.labels.tolist()
    assert any("plain integers" in note for note in notes)
    with pytest.raises(LabelMismatchError, match="has the label 2 and the model has 0 to 1"):
        load(tmp_path, labels=NAMES[:2])


@pytest.mark.parametrize("values", [["dog", "Cat", "HORSE"], ["1", "0", "2"]])
def test_text_labels(tmp_path, values):
    write_parquet(tmp_path / "train.parquet", [values[i % 3] for i in range(30)], text=True)
    write_parquet(tmp_path / "test.parquet", [values[i % 3] for i in range(9)], text=True, first=500)
    images, _ = load(tmp_path)
    assert [[1, 0, 2][row % 3] for row in images.clean.indices] == images.clean.labels.tolist()


def test_labels_that_do_not_match_stop_before_any_image_is_read(folder, monkeypatch):
    monkeypatch.setattr(sources.ParquetReader, "fetch", lambda *_: pytest.fail("images were read"))
    with pytest.raises(LabelMismatchError, match=r"unmatched in the dataset .*cat"):
        load(folder, labels=["wolf", "dog", "horse"])


def test_a_label_map_drops_a_class(folder):
    images, _ = load(folder, labels=["cat", "dog"], label_map={"horse": None})
    assert all(row % 3 < 2 for row in [*images.clean.indices, *images.evaluation.indices])
    assert images.info.eval_samples == 20
    assert images.info.label_map == {"horse": ""}


def test_no_image_column():
    dataset = table(text=(datasets.Value("string"), ["a"] * 9), label=(datasets.ClassLabel(names=NAMES), cycle(9)))
    with pytest.raises(ColumnError, match=r"no image column .* text \(string\), label \(ClassLabel\)") as caught:
        load(dataset)
    assert "--image-column" in str(caught.value)


def test_no_label_column():
    with pytest.raises(ColumnError, match="no label column"):
        load(table(image=pictures(9), score=(datasets.Value("float32"), [0.5] * 9)))


@pytest.mark.parametrize(("image", "label", "message"), [
    ((datasets.Value("string"), ["a.png"] * 9), (datasets.ClassLabel(names=NAMES), cycle(9)),
     "column 'image' holds string, not images: mend it"),
    (None, (datasets.List(datasets.ClassLabel(names=NAMES)), [[0]] * 9), "column 'label' holds List, not one label"),
    (None, ({"id": datasets.Value("int64")}, [{"id": 0}] * 9), "column 'label' holds dict, not one label an image"),
    (None, (datasets.Value("binary"), [b"red"] * 9), "column 'label' holds binary, not one label an image"),
])  # fmt: skip
def test_a_column_of_the_name_that_holds_something_else_is_named(image, label, message):
    with pytest.raises(ColumnError, match=message) as caught:
        load(table(image=image or pictures(9), label=label))
    assert "name one with" not in str(caught.value)


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


# the wrong column


def lesions(**columns):
    """Training and test tables with a text column `dx` of the model's labels beside others."""
    features = {"class": lambda names: datasets.ClassLabel(names=names), "text": lambda _: datasets.Value("string"),
                "int": lambda _: datasets.Value("int64"), "float": lambda _: datasets.Value("float32")}  # fmt: skip

    def part(count, first):
        made = {"image": pictures(count, first)}
        for name, (kind, names, values) in columns.items():
            made[name] = (features[kind](names), [values[i % len(values)] for i in range(count)])
        return table(**made)

    return datasets.DatasetDict(train=part(60, 0), test=part(30, 500))


SEX = ("class", ["female", "male", "unknown"], [0, 0, 1, 2])


@pytest.mark.parametrize("others", [
    {"sex": SEX, "label": ("text", None, NAMES)},
    # the name, whatever the type
    {"sex": SEX, "label": ("int", None, [0, 1, 2])},
    {"sex": SEX, "Label": ("float", None, [0.0, 1.0, 2.0])},
    # the values, whatever the name
    {"sex": SEX, "dx": ("text", None, NAMES)},
    {"sex": SEX, "dx": ("class", NAMES, [0, 1, 2]), "note": ("text", None, ["a", "b"])},
    {"dx": ("text", None, ["Horse", "DOG", "cat"]), "place": ("text", None, ["arm", "leg", "back"])},
    # the name and the values before the name alone
    {"fine_label": ("class", NAMES, [0, 1, 2]), "coarse_label": ("class", ["pet", "farm"], [0, 0, 1])},
    {"category": ("text", None, ["x", "y"]), "label": ("text", None, NAMES)},
    {"label": ("class", NAMES, [0, 1, 2]), "label_text": ("text", None, NAMES)},
])  # fmt: skip
def test_the_label_column_is_told_by_its_name_and_by_the_models_labels(others):
    images, _ = load(lesions(**others))
    truth = [2, 1, 0] if others.get("dx", ("", "", ""))[2] == ["Horse", "DOG", "cat"] else [0, 1, 2]
    assert [truth[row % 3] for row in images.evaluation.indices] == images.evaluation.labels.tolist()


@pytest.mark.parametrize(("others", "asked"), [
    ({"dx": ("text", None, NAMES), "guess": ("text", None, NAMES[::-1])}, "dx, guess"),
    ({"dx": ("text", None, NAMES), "label": ("int", None, [0, 1, 2])}, "dx, label"),
    ({"sex": SEX, "side": ("class", ["left", "right"], [0, 1])}, "sex, side"),
    ({"target": ("int", None, [0, 1, 2]), "y": ("int", None, [2, 1, 0])}, "target, y"),
])  # fmt: skip
def test_two_columns_that_may_hold_the_labels_are_asked_about(others, asked):
    with pytest.raises(ColumnError, match=f"several columns may hold the label: {asked}; choose with --label-column"):
        load(lesions(**others))


def write_texts(root, values, count=30, **options):
    for split, first in (("train", 0), ("test", 500)):
        write_parquet(
            root / f"{split}.parquet", [values[i % len(values)] for i in range(count)], first=first, **options
        )
    return root


@pytest.mark.parametrize(("values", "labels", "indices", "merged"), [
    (["red", " red ", "RED"], ["red", "blue"], [0, 0, 0], "'RED' for 'red'"),
    (["Red", "red", "blue"], ["RED", "blue"], [0, 0, 1], "'red' for 'Red'"),
    (["red\n", "\tblue", "red"], ["red", "blue"], [0, 1, 0], None),
    (["a", "A", "A "], ["A", "a"], [1, 0, 0], None),
    (["strasse", "straße", "x"], ["straße", "x"], [0, 0, 1], "'straße'"),
    ([" red ", "red", "RED"], ["red", "RED"], [0, 0, 1], None),
])  # fmt: skip
def test_spellings_of_one_label_are_one_class_where_the_model_has_one(tmp_path, values, labels, indices, merged):
    images, notes = load(write_texts(tmp_path / "d", values, text=True), labels, allow_missing_classes=True)
    assert [indices[row % 3] for row in images.evaluation.indices] == images.evaluation.labels.tolist()
    said = [note for note in notes if "spelt in several ways" in note]
    assert len(said) == (merged is not None)
    assert not said or merged in said[0]


def test_spellings_that_look_alike_are_shown(tmp_path):
    root = write_texts(tmp_path / "d", ["red", "blu\u200be", "gr\0een"], text=True)
    with pytest.raises(LabelMismatchError) as caught:
        load(root, ["red", "blue", "green"])
    assert r"unmatched in the dataset (2): 'blu\u200be', 'gr\x00een'; unmatched in the model (2)" in str(caught.value)


def test_the_text_for_no_label_among_numbers(tmp_path):
    root = write_texts(tmp_path / "d", ["0", "1", "2", "-1", " ", "-1.0"], text=True)
    images, notes = load(root)
    assert [row % 6 for row in images.evaluation.indices] == images.evaluation.labels.tolist()
    assert len(images.evaluation) == 15
    assert any("15 of 30 rows of split test have no label" in note for note in notes)


@pytest.mark.parametrize("kind", ["int", "float", "objects", "webdataset"])
def test_integers_from_one(tmp_path, kind):
    if kind == "webdataset":
        for split, first in (("train", 0), ("test", 500)):
            write_tar(tmp_path / "d" / f"{split}-0.tar", 30, first, label=False,
                      extra={"cls": lambda i: str(1 + i % 3).encode()})  # fmt: skip
        dataset = tmp_path / "d"
    elif kind == "int":
        dataset = write_texts(tmp_path / "d", [1, 2, 3, -1], names=None)
    else:
        dataset = lesions(label=("float" if kind == "float" else "int", None, [1, 2, 3, None]))
    period = 3 if kind == "webdataset" else 4
    images, notes = load(dataset)
    assert [row % period for row in images.evaluation.indices] == images.evaluation.labels.tolist()
    assert [row % period for row in images.clean.indices] == images.clean.labels.tolist()
    assert any("are the numbers 1 to 3" in note for note in notes)


@pytest.mark.parametrize("values", [[1, 2, 2], [0, 1, 2], [1, 2, 4], [0, 1, 3]])
def test_other_integers_are_not_taken_to_begin_at_one(tmp_path, values):
    root = write_texts(tmp_path / "d", values, names=None)
    if max(values) > 2:
        with pytest.raises(LabelMismatchError, match=r"has the label [34] and the model has 0 to 2; .* --label-map"):
            load(root)
    else:
        images, _ = load(root, allow_missing_classes=True)
        assert [values[row % 3] for row in images.evaluation.indices] == images.evaluation.labels.tolist()


@pytest.mark.parametrize("how", ["parquet", "webdataset", "folder on disk"])
def test_the_values_of_a_column_are_looked_at_in_every_format(tmp_path, how):
    both = lesions(sex=SEX, dx=("text", None, NAMES))
    if how == "parquet":
        for name, part in both.items():
            (tmp_path / "d").mkdir(exist_ok=True)
            part.to_parquet(tmp_path / "d" / f"{name}.parquet")
    elif how == "folder on disk":
        both.save_to_disk(tmp_path / "d")
    else:
        for name, count, first in (("train", 60, 0), ("test", 30, 500)):
            kinds = {"txt": lambda i: NAMES[i % 3].encode(), "sex.txt": lambda i: b"male" if i % 2 else b"female"}
            write_tar(tmp_path / "d" / f"{name}-0.tar", count, first, extra=kinds, label=False)
    images, _ = load(tmp_path / "d")
    assert [row % 3 for row in images.evaluation.indices] == images.evaluation.labels.tolist()


@pytest.mark.parametrize(("kind", "values"), [
    ("float", [0.0, 1.0, 2.0, None, float("nan"), -1.0]), ("text", ["0", "1.0", "2", "", None]),
])  # fmt: skip
def test_whole_numbers_are_integers_however_they_are_stored(kind, values):
    images, notes = load(lesions(label=(kind, None, values)), clean_samples=9)
    rows = [values[row % len(values)] for row in images.evaluation.indices]
    assert [int(float(value)) for value in rows] == images.evaluation.labels.tolist()
    assert any("plain integers" in note for note in notes)


def test_a_label_that_is_no_whole_number_is_none():
    with pytest.raises(ColumnError, match=r"the label '0.5' is no whole number; name another --label-column"):
        load(lesions(label=("float", None, [0.0, 0.5])))


@pytest.mark.parametrize("kind", ["absent", "null", "all missing"])
def test_a_test_split_without_a_label_column_gives_way(tmp_path, kind):
    for split, count, first in (("train", 30, 0), ("validation", 9, 500), ("test", 12, 600)):
        rows = {"image": [{"bytes": png(first + i), "path": None} for i in range(count)],
                "label": [NAMES[i % 3] for i in range(count)]}  # fmt: skip
        if split == "test":
            rows |= {"label": pa.array([None] * count, pa.null() if kind == "null" else pa.string())}
            if kind == "absent":
                del rows["label"]
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "d" / f"{split}.parquet")
    images, notes = load(tmp_path / "d")
    assert (images.info.eval_split, len(images.evaluation)) == ("validation", 9)
    assert any("split test has no labels; validation is used for measuring" in note for note in notes)
    (tmp_path / "d" / "validation.parquet").unlink()
    images, notes = load(tmp_path / "d")
    assert (images.info.eval_split, len(images.evaluation)) == ("train", 6)
    assert any("split test has no labels; a part of train is measured" in note for note in notes)
    assert not set(images.clean.indices) & set(images.evaluation.indices)
    with pytest.raises(UsageError, match="split test"):
        load(tmp_path / "d", eval_split="test")


@pytest.mark.parametrize("command", ["detox", "evaluate"])
def test_two_candidates_are_asked_about_whatever_is_done_with_the_images(command):
    both = lesions(sex=SEX, side=("class", ["left", "right"], [0, 1]))
    options = DetoxOptions("m") if command == "detox" else EvaluateOptions("m")
    model = load_classifier(timm_model())
    with pytest.raises(ColumnError, match="several columns may hold the label: sex, side; choose with --label-column"):
        pull_images(options, both, model, print)
