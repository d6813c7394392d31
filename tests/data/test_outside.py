"""Data folders of strangers: only files inside the dataset's folder are opened, whatever its rows and links name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from huggingface_hub import snapshot_download

from hfdetox.data.opened import DatasetError
from hfdetox.data.readers import DamagedFileError
from tests.image_data import NAMES, cycle, load, png, write_dataset, write_folders

OUTSIDE = "outside the dataset's folder"


def on_disk(folder: Path, paths: list[str]) -> Path:
    """Write what `load_from_disk` reads, with images that are named and not held."""
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": file, "label": datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": None, "path": path} for path in paths]
    rows = {"image": images, "label": cycle(len(paths))}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table, test=table).save_to_disk(folder)
    for split in ("train", "test"):
        # saving a column of images would put the files in
        info = folder / split / "dataset_info.json"
        plain = json.loads(info.read_text())
        plain["features"]["image"] = {"_type": "Image"}
        info.write_text(json.dumps(plain))
    return folder


def test_a_saved_table_cannot_name_images_anywhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "d" / "images").mkdir(parents=True)
    inside = []
    for i in range(30):
        (tmp_path / "d" / "images" / f"{i}.png").write_bytes(png(i))
        inside.append(str(tmp_path / "d" / "images" / f"{i}.png"))
    images, _ = load(on_disk(tmp_path / "d", inside))
    assert len(images.clean) == 12
    (tmp_path / "d" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("secret.png", "d/../secret.png", "d/images/link.png"):
        shutil.rmtree(tmp_path / "d" / "train")
        shutil.rmtree(tmp_path / "d" / "test")
        with pytest.raises(DatasetError, match=OUTSIDE):
            load(on_disk(tmp_path / "d", [str(tmp_path / name)] * 30))


def test_a_saved_table_cannot_name_tables_anywhere(tmp_path: Path) -> None:
    on_disk(tmp_path / "mine", [str(tmp_path / "mine" / "x.png")] * 30)
    on_disk(tmp_path / "d", [str(tmp_path / "d" / "x.png")] * 30)
    state = tmp_path / "d" / "train" / "state.json"
    plain = json.loads(state.read_text())
    plain["_data_files"] = [{"filename": "../../mine/train/" + plain["_data_files"][0]["filename"]}]
    state.write_text(json.dumps(plain))
    with pytest.raises(DatasetError, match=OUTSIDE):
        load(tmp_path / "d")


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_an_image_folder_cannot_link_to_images_anywhere(how: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(77))
    for split in ("train", "test"):
        write_folders(tmp_path / "d", split, 30, 100 if split == "test" else 0)
    first = tmp_path / "d" / "train" / NAMES[0] / "000.png"
    kept = first.with_name("kept.dat")
    first.rename(kept)
    first.symlink_to("kept.dat")
    load(tmp_path / "d")
    first.unlink()
    first.symlink_to(tmp_path / "secret.png" if how == "absolute" else "../../../secret.png")
    with pytest.raises(DatasetError, match=OUTSIDE):
        load(tmp_path / "d")


def test_a_parquet_file_cannot_be_a_link_to_one_elsewhere(tmp_path: Path) -> None:
    write_dataset(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "d")
    for file in (tmp_path / "d" / "data").iterdir():
        file.unlink()
        file.symlink_to(tmp_path / "mine" / "data" / file.name)
    with pytest.raises(DatasetError, match=OUTSIDE):
        load(tmp_path / "d")


def test_a_metadata_file_cannot_name_images_anywhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(77))
    for split in ("train", "test"):
        folder = tmp_path / "d" / split
        folder.mkdir(parents=True)
        lines = ["file_name,label"]
        for i in range(30):
            (folder / f"{i}.png").write_bytes(png(i))
            lines.append(f"{i}.png,{NAMES[i % 3]}")
        lines[1] = f"../../secret.png,{NAMES[0]}"
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    # datasets refuses such a name itself, in some versions
    with pytest.raises((DatasetError, DamagedFileError)):
        load(tmp_path / "d")


@pytest.mark.parametrize("write", ["parquet", "folders"])
def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any(hub, repo_name, tmp_path: Path, write: str) -> None:  # type: ignore[no-untyped-def]
    if write == "parquet":
        write_dataset(tmp_path / "made")
    else:
        write_folders(tmp_path / "made", "train", 30)
        write_folders(tmp_path / "made", "test", 30, 100)
    name = repo_name("dataset")
    hub.create_repo(name, "dataset")
    files = {
        str(p.relative_to(tmp_path / "made")): p.read_bytes() for p in (tmp_path / "made").rglob("*") if p.is_file()
    }
    hub.commit(name, files, repo_type="dataset")
    snapshot = Path(snapshot_download(name, repo_type="dataset", cache_dir=tmp_path / "cache"))
    assert any(path.is_symlink() for path in snapshot.rglob("*"))
    images, _ = load(snapshot)
    assert len(images.clean) == 12
