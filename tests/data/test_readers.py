"""Reading image folders, streams and the Hub, no more than is needed."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image

from hfdetox.config import DetoxOptions
from hfdetox.data import readers as sources
from hfdetox.data import sampling as data_module
from hfdetox.data.columns import Columns
from hfdetox.data.load import TooFewImagesError, pull_images
from hfdetox.data.opened import DatasetError, LocalFiles
from hfdetox.detox import plan
from hfdetox.errors import HubError, RunError
from hfdetox.hub.client import AccessError, Retry, UnknownRepoError, UnreachableError, ask, http
from hfdetox.models.classifier import load_classifier
from tests.image_data import (
    cycle,
    load,
    png,
    write_dataset,
    write_folders,
    write_parquet,
    write_tar,
)
from tests.tiny_models import timm_folder


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "d")


# image folders and streams


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
        load(tmp_path / "w", clean_samples=22)
    images, notes = load(tmp_path / "w", clean_samples=0.5)
    assert len(images.evaluation) == 21
    assert any("split test is a stream: its first 21 rows were read" in note for note in notes)


def test_a_damaged_tar_is_an_error_of_one_line(tmp_path):
    write_tar(tmp_path / "w" / "train-000.tar", 60)
    write_tar(tmp_path / "w" / "test-000.tar", 9, 500)
    path = tmp_path / "w" / "train-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:60_000])
    with pytest.raises(RunError, match="split train cannot be read") as caught:
        load(tmp_path / "w", clean_samples=60)
    assert "\n" not in str(caught.value)
    # tarfile takes a damaged header for the end; only the card knows how many rows there should be
    path.write_bytes(content[:40_960] + b"\xff" * 2048 + content[43_008:])
    info = "dataset_info:\n  splits:\n  - name: train\n    num_examples: 60\n  - name: test\n    num_examples: 9\n"
    (tmp_path / "w" / "README.md").write_text(f"---\n{info}---\n")
    with pytest.raises(RunError, match=r"split train ends after .* of 60 rows"):
        load(tmp_path / "w", clean_samples=60)


class Impatient(LocalFiles):
    """Local files whose failed reads are repeated as the Hub's are, without the pauses."""

    def guard(self, what, call):
        return ask(call, "dataset me/stream", retry=Retry(attempts=3, base_delay=0.01))


def failing_stream(failures, count=50):
    """A stream that loses its connection at row 20 the first `failures` times that it is read, and what was read."""
    read = []

    def rows():
        for i in range(count):
            if i == 20 and sum(row == 20 for row in read) < failures:
                read.append(i)
                raise http.ReadError("connection lost")
            yield {"image": {"bytes": png(i), "path": None}, "label": i % 3}

    spec = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.IterableDataset.from_generator(rows, features=spec), read


def scanned(stream, tmp_path):
    source = sources.StreamReader(stream, Columns("image", "label", "integer"), "train", Impatient(tmp_path), None)
    labels = [label for _, values in source.scan() for label in values]
    images = source.fetch(range(len(labels)))
    return labels, [image() for image in images]


def test_a_stream_goes_on_where_its_connection_was_lost(tmp_path):
    stream, read = failing_stream(failures=2)
    labels, images = scanned(stream, tmp_path)
    assert read == [20, 20]
    assert labels == cycle(50)
    assert images == [png(i) for i in range(50)]


def test_a_stream_that_stays_lost_is_an_error_and_not_its_end(tmp_path):
    stream, _ = failing_stream(failures=99)
    with pytest.raises(UnreachableError, match="connection lost"):
        scanned(stream, tmp_path)


def test_members_of_a_webdataset_that_are_no_label_stay_bytes(tmp_path):
    extra = {"pth": b"not what torch reads", "npy": b"\x93NUMPY no", "mp": b"\xc1"}  # their decoders would fail
    write_tar(tmp_path / "w" / "train-000.tar", 30, extra=extra)
    write_tar(tmp_path / "w" / "test-000.tar", 9, 500, extra=extra)
    images, _ = load(tmp_path / "w")
    assert np.bincount(images.clean.labels).tolist() == [4, 4, 4]
    # other users of `datasets` in this process keep what it does
    assert "pth" in WebDataset.DECODERS


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
    images, _ = load(name, clean_samples=30)
    assert images.info.indices_sha256 == load(tmp_path, clean_samples=30)[0].info.indices_sha256
    whole = (tmp_path / "train.parquet").stat().st_size
    ranges = [r for r in hub.log if r.origin == "storage" and "train" in r.path]
    assert all(request.range for request in ranges)
    sizes = [int(end) - int(start) + 1 for start, end in (r.range.removeprefix("bytes=").split("-") for r in ranges)]
    # the footer is asked for with 64 KiB around it; what is left is one row group of twenty and labels
    assert whole > 2_000_000
    assert sum(sizes) < whole / 4
    # all of the test split is wanted, so it is fetched in one piece
    assert any(r.range is None and "test" in r.path for r in hub.log if r.origin == "storage" and r.method == "GET")


@pytest.fixture
def namesake(repo, tmp_path, monkeypatch):
    """A working directory with a folder that is called as the dataset on the Hub is, and holds other images."""
    write_parquet(tmp_path / "here" / repo / "train.parquet", cycle(60), first=7000)
    write_parquet(tmp_path / "here" / repo / "test.parquet", cycle(9), first=8000)
    monkeypatch.chdir(tmp_path / "here")
    return repo


def test_a_name_from_elsewhere_is_never_a_folder(hub, namesake):
    assert load(namesake)[0].info.source == "folder"
    images, _ = load(namesake, hub_only=True, clean_samples=1.0)
    assert (images.info.source, images.info.clean_samples) == ("hub", 90)


def test_the_dataset_of_a_models_card_is_never_a_folder(hub, namesake, tmp_path):
    model = timm_folder(tmp_path / "model")
    (model / "README.md").write_text(f"---\ndatasets: [{namesake}]\n---\n")
    head = hub.repo(namesake, "dataset").refs["refs/heads/main"]
    (tmp_path / "map.json").write_text('{"horse": "elk"}')
    planned = functools.partial(plan, str(model), label_map=str(tmp_path / "map.json"))
    assert planned()["dataset"]["revision"] == head
    assert planned(dataset=namesake)["dataset"]["revision"] is None
    options = DetoxOptions(str(model), clean_samples=12, allow_missing_classes=True,
                         label_map=str(tmp_path / "map.json"))  # fmt: skip
    images = pull_images(options, None, load_classifier(model), print)
    assert images.info.revision == head


def test_the_commit_is_pinned_and_chosen(hub, repo, tmp_path):
    old = hub.repo(repo, "dataset").refs["refs/heads/main"]
    write_parquet(tmp_path / "new.parquet", cycle(60))
    hub.commit(repo, {"data/train-00000-of-00001.parquet": tmp_path / "new.parquet"}, repo_type="dataset")
    assert load(repo, clean_samples=1.0)[0].info.clean_samples == 60
    images, _ = load(repo, clean_samples=1.0, revision=old)
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
    images, _ = load(name, dataset_config="big", eval_samples=60, clean_samples=30)
    assert images.info.config == "big"
    for config in (None, "huge"):
        with pytest.raises(DatasetError, match=r"small.*big.*--config"):
            load(name, dataset_config=config)


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
from hfdetox.data.load import load_images
images = load_images(sys.argv[1], labels=["cat", "dog", "horse"], clean_samples=12)
print(images.info.indices_sha256)
"""


def run_script(environment, name, timeout=600):
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
