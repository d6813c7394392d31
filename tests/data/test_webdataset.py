"""Tar files as people write them: no row of them is lost without a word, and a label may be text or JSON."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from hfdetox.errors import HfdetoxError
from tests.image_data import NAMES, load, png


def number(i):
    return str(i % 3).encode()


def write(root, *, name=lambda i: f"{i:05}", image=lambda i: "png", label=lambda i: "cls", value=number, more=None,
          order=None):  # fmt: skip
    """Write 30 training rows as the functions say, and 9 plain ones to measure with."""
    for split, count, first in (("train", 30, 0), ("test", 9, 500)):
        members = []
        for i in range(count):
            stem = name(i) if split == "train" else f"{i:05}"
            members += [(f"{stem}.{image(i)}", png(first + i)), (f"{stem}.{label(i)}", value(i))]
            members += [(f"{stem}.{ending}", content) for ending, content in (more(i) if more else {}).items()]
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{split}-000.tar", "w") as archive:
            for member, content in sorted(members, key=order) if order else members:
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return root


def all_rows(root, **options):
    images, _ = load(root, clean_samples=30, **options)
    assert images.clean.indices == list(range(30))
    assert images.clean.labels.tolist() == [i % 3 for i in range(30)]
    assert len(images.evaluation) == 9


def refused(root, status, words, **options):
    with pytest.raises(HfdetoxError, match=words) as caught:
        load(root, **options)
    assert caught.value.exit_status == status
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("first", [1, 3, 6, 10, 29])
@pytest.mark.parametrize("dotted", ["scan.{:05}", "s{}.v2", "a b/c.{}"])
def test_names_with_dots_are_refused_wherever_they_begin(tmp_path, first, dotted):
    name = lambda i: dotted.format(i) if i >= first else f"{i:05}"  # noqa: E731
    refused(write(tmp_path / "w", name=name), 2, r"names such as .*\.png in train-000.tar have a dot", clean_samples=30)


@pytest.mark.parametrize("name", ["a.17", "00016.17"])
def test_one_name_with_a_dot_among_others_is_refused(tmp_path, name):
    root = write(tmp_path / "w", name=lambda i: name if i == 17 else f"{i:05}")
    refused(root, 2, f"names such as {name}.png", clean_samples=30)


@pytest.mark.parametrize("more", [
    lambda i: {"seg.png": png(i)}, lambda i: {"seg.png": png(i)} if i > 9 else {},
    lambda i: {"json": b"{}"} if i > 9 else {}, lambda i: {"depth.npy": b"x"},
])  # fmt: skip
def test_further_members_do_no_harm(tmp_path, more):
    all_rows(write(tmp_path / "w", more=more))


def test_endings_may_change_from_row_to_row(tmp_path):
    all_rows(write(tmp_path / "a", image=lambda i: ("png", "jpg", "PNG", "jpeg")[i % 4]))
    all_rows(
        write(tmp_path / "b", image=lambda i: "PNG" if i > 8 else "png", label=lambda i: "CLS" if i > 4 else "cls")
    )
    all_rows(write(tmp_path / "c", name=lambda i: f"v1.2/{i:05}"))


@pytest.mark.parametrize(("ending", "value"), [
    ("cls", lambda i: f"{NAMES[i % 3]}\n".encode()), ("txt", lambda i: f"{NAMES[i % 3]}\n".encode()),
    ("json", lambda i: json.dumps({"label": i % 3, "width": 1.5, "box": [1, 2]}).encode()),
    ("json", lambda i: json.dumps({"caption": "a cat", "kind": NAMES[i % 3]}).encode()),
    ("jsn", lambda i: json.dumps({"label": float(i % 3), "note": None if i < 8 else "x"}).encode()),
    ("json", lambda i: json.dumps({"label": i % 3, **({"k": i} if i % 4 else {})}).encode()),
])  # fmt: skip
def test_labels_may_be_text_or_json(tmp_path, ending, value):
    all_rows(write(tmp_path / "w", label=lambda i: ending, value=value))


def test_a_json_of_one_number_is_a_column_that_can_be_named(tmp_path):
    root = write(tmp_path / "w", label=lambda i: "json")
    refused(root, 2, r"no label column .* json \(int64\)")
    all_rows(root, label_column="json")


@pytest.mark.parametrize("value", [b'{"a": {"label": 1}}', b"[1]", b'{"score": 0.5}'])
def test_json_without_a_label_says_where_it_may_stand(tmp_path, value):
    refused(write(tmp_path / "w", label=lambda i: "json", value=lambda i: value), 2, "or a value of its .json")


@pytest.mark.parametrize(("ending", "content"), [
    ("json", b"{"), ("json", b"[" * 100_000), ("json", b'{"a": 1, "a": 2}'), ("cls", b"\xff"), ("txt", b"\xff\xfe"),
])  # fmt: skip
@pytest.mark.parametrize("row", [0, 12])
def test_a_member_that_cannot_be_read_is_named(tmp_path, ending, content, row):
    good = json.dumps({"label": 1}).encode() if ending == "json" else b"1"
    root = write(tmp_path / "w", label=lambda i: ending, value=lambda i: content if i == row else good)
    (root / "test-000.tar").unlink()
    refused(root, 1, rf"000{row:02}\.{ending} in train-000.tar cannot be read")


def test_members_that_do_not_stand_together_are_explained(tmp_path):
    root = write(tmp_path / "w", order=lambda member: member[0].rpartition(".")[2])
    refused(root, 2, "the members of a row stand one after the other")


def test_a_compressed_member_is_one_with_a_dot(tmp_path):
    root = write(tmp_path / "w", label=lambda i: "cls.gz", value=lambda i: gzip.compress(number(i)))
    refused(root, 2, r"names such as 00000.cls.gz in the tar files of dataset w have a dot")


def test_a_tar_without_files_is_named(tmp_path):
    for content in ({}, {"README": b"x", "a/b": b"y"}):
        (tmp_path / "w").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "w" / "train-000.tar", "w") as archive:
            for name, text in content.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
        refused(tmp_path / "w", 1, "train-000.tar holds no files")
