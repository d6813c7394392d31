"""Metadata files of image folders that cannot be used: the file and the line are named."""

from __future__ import annotations

import json

import pytest

from hfdetox.data.files import DamagedFileError, DatasetError
from tests.image_data import NAMES, load, png

ROWS = [(f"{i:03}.png", NAMES[i % 3]) for i in range(12)]
CSV = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in ROWS)
JSON = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in ROWS)


def write(root, content, name="metadata.csv"):
    for first, split in enumerate(("train", "test")):
        for i in range(12):
            path = root / split / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(100 * first + i))
        (root / split / name).write_text(CSV if name.endswith("csv") else JSON)
    (root / "train" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def with_line(text, number, line):
    lines = text.split("\n")
    lines[number - 1] = line
    return "\n".join(lines)


def refused(root, words):
    with pytest.raises(DamagedFileError, match=words) as caught:
        load(root)
    assert str(root) not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("content", "words"), [
    (with_line(CSV, 5, "003.png,cat,extra"), "line 5 of train/metadata.csv has 3 fields and the first line 2"),
    (with_line(CSV, 13, "011.png,cat,,,"), "line 13 of train/metadata.csv has 5 fields"),
    (with_line(CSV, 5, '003.png,"a\n b"\n004.png,cat,x,y'), "line 7 of train/metadata.csv has 4 fields"),
    (with_line(CSV, 5, "nope.png,cat"), "line 5 of train/metadata.csv names 'nope.png', which is not there; add"),
    (CSV.replace(".png", ".jpg"), r"line 2 of .* names '000.jpg', which is not there \(and 11 more lines name such\)"),
    (with_line(CSV, 5, ",cat"), "line 5 of train/metadata.csv has no file_name"),
    (with_line(CSV, 5, '003.png,"cat'), "line 5 of train/metadata.csv is no CSV"),
    (with_line(CSV, 5, "../../x.png,cat"), "line 5 of train/metadata.csv names '../../x.png', outside the folder"),
    (with_line(CSV, 5, "/etc/hostname,cat"), "line 5 of train/metadata.csv names '/etc/hostname', outside"),
    (CSV.replace("file_name", "name"), r"line 1 of train/metadata.csv has no column file_name: .* name, label"),
    (CSV.replace(",", ";"), "line 1 of .* has no column file_name: its columns are file_name;label"),
    (CSV.replace(",", ", "), "line 1 of train/metadata.csv has spaces around the name of the column ' label'"),
    ("", "line 1 of train/metadata.csv has no column file_name: its columns are none"),
    (with_line(CSV, 5, "003.png,caf\xe9").encode("latin-1"), "line 5 of train/metadata.csv is not UTF-8 text"),
    (CSV.encode("utf-16"), "line 1 of train/metadata.csv is not UTF-8 text"),
])  # fmt: skip
def test_the_line_of_a_csv_is_named(tmp_path, content, words):
    refused(write(tmp_path / "d", content), words)


@pytest.mark.parametrize(("line", "words"), [
    ('{"file_name": "004.png", ', "is no JSON"), ("[" * 100_000, "is no JSON .*nested too deeply"),
    ('{"file_name": "004.png", "label": "cat", "label": "dog"}', "the key 'label' is there twice"),
    ("[1, 2]", "is no JSON object"), ("null", "is no JSON object"), ('{"label": "cat"}', "has no file_name"),
    ('{"file_name": null, "label": "cat"}', "has no file_name"),
    ('{"file_name": 3, "label": "cat"}', "has a number as 'file_name', and the lines before a text"),
    ('{"file_name": "004.png", "label": ["cat"]}', "has a list as 'label', and the lines before a text"),
    ('{"file_name": "no/004.png", "label": "cat"}', "names 'no/004.png', which is not there"),
])  # fmt: skip
def test_the_line_of_a_jsonl_is_named(tmp_path, line, words):
    refused(write(tmp_path / "d", with_line(JSON, 5, line), "metadata.jsonl"), f"line 5 of train/metadata.jsonl {words}"
            if "there twice" not in words else words)  # fmt: skip


def test_a_jsonl_that_is_one_list_is_named(tmp_path):
    content = json.dumps([json.loads(line) for line in JSON.splitlines()])
    refused(write(tmp_path / "d", content, "metadata.jsonl"), "line 1 of train/metadata.jsonl is no JSON object")
    bad = with_line(JSON, 9, '{"file_name": "\xe9"}').encode("latin-1")
    refused(write(tmp_path / "e", bad, "metadata.jsonl"), "line 9 of train/metadata.jsonl is not UTF-8 text")


@pytest.mark.parametrize(("content", "name"), [
    (CSV, "metadata.csv"), (b"\xef\xbb\xbf" + CSV.encode(), "metadata.csv"),
    (CSV.replace("\n", "\r\n"), "metadata.csv"),
    (CSV + "\n\n", "metadata.csv"), (JSON, "metadata.jsonl"), (JSON + "\n", "metadata.jsonl"),
    (with_line(CSV, 2, '000.png,"cat"'), "metadata.csv"), (CSV.replace("000.png", "./000.png"), "metadata.csv"),
])  # fmt: skip
def test_what_can_be_read_is_read(tmp_path, content, name):
    images, notes = load(write(tmp_path / "d", content, name))
    assert images.clean.labels.tolist() == [i % 3 for i in range(12)]
    assert notes == []


def test_captions_without_labels_are_not_looked_into(tmp_path):
    for split, first in (("train", 0), ("test", 50)):
        for i in range(12):
            path = tmp_path / "d" / split / NAMES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(first + i))
    (tmp_path / "d" / "train" / "metadata.csv").write_text("file_name,weight\nnot-there.png,0.5\n")
    images, notes = load(tmp_path / "d")
    assert len(images.clean) == 12
    assert any("has no label column: the folders' names are the labels" in note for note in notes)


def test_a_metadata_file_above_several_splits_is_refused(tmp_path):
    root = write(tmp_path / "d", CSV)
    for split in ("train", "test"):
        (root / split / "metadata.csv").unlink()
    rows = [f"{split}/{name},{label}\n" for split in ("train", "test") for name, label in ROWS]
    (root / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    with pytest.raises(DatasetError, match="of dataset d is of the splits train, test: put one into the folder"):
        load(root)
    for split in ("train", "test"):
        for name, label in ROWS:
            (root / split / label).mkdir(exist_ok=True)
            (root / split / name).rename(root / split / label / name)
    images, notes = load(root)
    assert len(images.clean) == 12
    assert any("put one into the folder of each; the folders' names are the labels" in note for note in notes)


def test_metadata_files_of_two_kinds_are_refused(tmp_path):
    root = write(tmp_path / "d", CSV)
    (root / "train" / "metadata.jsonl").write_text(JSON)
    refused(root, r"metadata files of several kinds \(.csv, .jsonl\)")
