"""Datasets of strangers that are not what they should be: one line that names the file, and the right exit status."""

from __future__ import annotations

import gc
import json
import struct
import zlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfdetox.errors import HfdetoxError, HubError
from tests.image_data import NAMES, cycle, load, png, write_dataset, write_folders, write_parquet, write_tar


def refused(dataset, status, *words, **options):
    with pytest.raises(HfdetoxError) as caught:
        load(dataset, **options)
    line = str(caught.value)
    assert not isinstance(caught.value, HubError)
    assert caught.value.exit_status == status
    assert "\n" not in line
    assert len(line) < 700
    for word in words:
        assert word in line
    assert "HF_ENDPOINT" not in line
    return line


@pytest.fixture(params=["here", "on the Hub"])
def publish(request, hub, repo_name):
    """Give a folder as it is, or as a dataset on the Hub."""

    def give(folder):
        if request.param == "here":
            return folder
        name = repo_name(folder.name)
        hub.create_repo(name, "dataset")
        hub.commit_folder(name, folder, repo_type="dataset")
        return name

    return give


@pytest.mark.parametrize("card", [
    "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype: ClassLabel\n",
    "dataset_info:\n  features:\n  - name: image\n    dtype: picture9\n",
    "dataset_info:\n  features: 3\n",
    "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names: [cat, cat]\n",
    "dataset_info:\n  splits:\n  - name: train\n    num_examples: many\n",
    "configs: 5\n",
    "configs:\n- config_name: default\n  data_files:\n  - path: 3\n",
    "dataset_info: [\n",
])  # fmt: skip
def test_a_card_that_cannot_be_read_is_named(tmp_path, publish, card):
    folder = write_dataset(tmp_path / "d")
    (folder / "README.md").write_text(f"---\n{card}---\n# set\n")
    name = publish(folder)
    try:
        load(name)  # what `datasets` makes nothing of is no fault
    except HfdetoxError:
        refused(name, 2, "README.md" if "path: 3" not in card else "dataset")


def parquet(path, image=None, label=None, count=12, schema=None):
    columns = {"image": image or [{"bytes": png(i), "path": None} for i in range(count)],
               "label": label if label is not None else cycle(count)}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path)


@pytest.mark.parametrize("cut", [4, 100, -20])
def test_a_parquet_file_that_is_cut_off_is_named(tmp_path, publish, cut):
    folder = write_dataset(tmp_path / "d")
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    refused(publish(folder), 1, "train-00000-of-00001.parquet", "cannot be read")


def test_features_of_a_newer_version_are_named(tmp_path, publish):
    parquet(tmp_path / "d" / "test.parquet")
    table = pq.read_table(tmp_path / "d" / "test.parquet")
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Hologram", "depth": 3}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "d" / "train.parquet")
    refused(publish(tmp_path / "d"), 1, "train.parquet", "Hologram")


@pytest.mark.parametrize("label", [[[0, 1]] * 12, [{"a": 1}] * 12, [[["x"]]] * 12, [b"x"] * 12])
def test_labels_of_wrong_types_are_asked_about(tmp_path, label):
    for split in ("train", "test"):
        parquet(tmp_path / "d" / f"{split}.parquet", label=label)
    refused(tmp_path / "d", 2, "label")
    refused(tmp_path / "d", 2, "column 'label' holds", label_column="label")


@pytest.mark.parametrize("image", [
    [None] * 12, [{"bytes": None, "path": None}] * 12, [{"bytes": b"", "path": None}] * 12,
    [{"bytes": png(0)[:40], "path": None}] * 12, [{"bytes": b"\x93NUMPY", "path": None}] * 12,
    [{"bytes": None, "path": "/etc/hostname"}] * 12,
])  # fmt: skip
def test_images_that_are_none_are_named_by_their_row(tmp_path, image):
    for split in ("train", "test"):
        schema = pa.schema({"image": datasets.Image().pa_type, "label": pa.int64()})
        parquet(tmp_path / "d" / f"{split}.parquet", image=image, schema=schema)
    refused(tmp_path / "d", 1, "of split train cannot be decoded")


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not an image in a known format"), (b"<html>404</html>", "not an image in a known format"),
    (png(0)[:40], ""), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "run `git lfs pull`"),
])  # fmt: skip
def test_a_broken_file_of_an_image_folder_is_named(tmp_path, content, reason):
    for split in ("train", "test"):
        write_folders(tmp_path / "d", split, 12)
    broken = sorted((tmp_path / "d").glob("train/*/*.png"))[0]
    broken.write_bytes(content)
    refused(tmp_path / "d", 1, f"cannot be decoded ({broken.parent.name}/{broken.name}: ", reason)


def bomb(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + data


def array_bomb():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 100000), }"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize("content", [bomb(40_000, 40_000), array_bomb()])
def test_a_picture_bomb_is_an_image_that_cannot_be_decoded(tmp_path, content):
    for split in ("train", "test"):
        parquet(tmp_path / "d" / f"{split}.parquet", image=[{"bytes": content, "path": None}] * 12)
    refused(tmp_path / "d", 1, "of split train cannot be decoded")


def test_a_second_file_of_another_kind_is_named(tmp_path):
    write_dataset(tmp_path / "d")
    other = tmp_path / "d" / "data" / "train-00001-of-00001.parquet"
    pq.write_table(pa.table({"other": [1, 2, 3]}), other)
    refused(tmp_path / "d", 1, "cannot be read")


# saved by `datasets`


@pytest.fixture
def saved(tmp_path):
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(30)], "label": cycle(30)}
    spec = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    table = datasets.Dataset.from_dict(rows, features=spec)
    datasets.DatasetDict(train=table, test=table.select(range(9))).save_to_disk(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"splits": 3}', "\xff\xfe", '{"features": {"image": 3}}'])
def test_a_saved_dataset_with_a_file_that_is_cut_off(saved, file, content):
    (saved / file).write_bytes(content.encode("latin-1"))
    try:
        load(saved)
    except HfdetoxError:
        refused(saved, 2, f"dataset {saved}")


def test_a_saved_dataset_of_a_newer_version(saved):
    path = saved / "train" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["label"] = {"_type": "Hologram"}
    path.write_text(json.dumps(info))
    refused(saved, 2, "may be of a newer version of `datasets` or cut off", "Hologram")


def test_a_saved_dataset_whose_table_is_cut_off(saved):
    path = next((saved / "train").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:200])
    refused(saved, 2, "cut off")


# tar files


@pytest.mark.parametrize("name", ["scan.{:04d}", "a.b.{}", "{}.scan"])
def test_dotted_names_in_tar_files_are_said(tmp_path, publish, name):
    for split, count in (("train", 30), ("test", 9)):
        write_tar(tmp_path / "w" / f"{split}-000.tar", count, name=name)
    line = refused(publish(tmp_path / "w"), 2, "have a dot before the ending", "rename them")
    assert "--label-column" not in line
    assert len(line) < 300


def test_no_stream_of_the_hub_is_left_to_be_collected_in_a_request(tmp_path, hub, repo_name):
    """A half-read one takes a lock of the client's then, and the process would wait for itself (seen once)."""
    for split, count in (("train", 30), ("test", 9)):
        write_tar(tmp_path / "w" / f"{split}-000.tar", count)
    name = repo_name("tars")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path / "w", repo_type="dataset")
    gc.collect()
    gc.disable()
    try:
        load(name)
        left = [one for one in gc.get_objects() if type(one).__name__ == "HfFileSystemStreamFile"]
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()
    assert left == []


def test_a_list_of_columns_is_capped(tmp_path):
    for split in ("train", "test"):
        columns = {f"column\x1b[31m{i}" + "x" * 200: cycle(12) for i in range(400)}
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "d" / f"{split}.parquet")
    assert refused(tmp_path / "d", 2, "no image column").isprintable()


@pytest.mark.parametrize("columns", [
    {"image": "image", "label": "string", "kind": "string"}, {"picture": "image", "label": "string"},
    {"image": "image", "class": "int64"},
])  # fmt: skip
def test_columns_of_a_card_that_the_files_lack_are_named(tmp_path, columns):
    for split in ("train", "test"):
        write_parquet(tmp_path / "d" / f"{split}.parquet", [NAMES[i] for i in cycle(12)], text=True)
    lines = [f"  - name: {name}\n    dtype: {kind}\n" for name, kind in columns.items()]
    head = "---\ndataset_info:\n  features:\n"
    (tmp_path / "d" / "README.md").write_text(head + "".join(lines) + "---\n")
    lacking = next(name for name in columns if name not in ("image", "label"))
    refused(tmp_path / "d", 1, f".parquet cannot be read: it has no column {lacking!r}", "card")


def test_what_the_network_does_is_still_the_networks(hub, repo_name, tmp_path):
    write_folders(tmp_path / "f", "train", 30)
    name = repo_name("slow")
    hub.create_repo(name, "dataset")
    hub.commit_folder(name, tmp_path / "f", repo_type="dataset")
    hub.faults.answer("GET", f"/datasets/{name}/resolve", 404, times=None)
    hub.faults.answer("HEAD", f"/datasets/{name}/resolve", 404, times=None)
    with pytest.raises(HubError):
        load(name)
