"""Image and label columns, found or named, of folders and of `datasets` objects."""

from __future__ import annotations

import io

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hfdetox.data import readers as sources
from hfdetox.data.columns import ColumnError
from hfdetox.data.labels import LabelMismatchError
from hfdetox.data.opened import DatasetError
from tests.image_data import (
    NAMES,
    cycle,
    load,
    pictures,
    png,
    table,
    write_dataset,
    write_parquet,
)


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
    with pytest.raises(LabelMismatchError, match="has the label 2 and the model 2 labels"):
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
