"""The test Hub against the unmodified client libraries: what they read from it and what they raise."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download


def test_snapshot_download_gives_the_files_of_the_commit(hub, repo_name):
    name = repo_name()
    hub.create_repo(name)
    first = hub.commit(name, {"config.json": b"{}", "model.safetensors": b"old", "a/b/c.txt": b"deep"})
    hub.commit(name, {"model.safetensors": b"new", "a/b/c.txt": None})
    for revision, weights in ((first, b"old"), ("main", b"new")):
        folder = Path(snapshot_download(name, revision=revision))
        assert (folder / "model.safetensors").read_bytes() == weights
        assert (folder / "a/b/c.txt").exists() == (weights == b"old")


def test_push_and_pull_round_trip(hub, repo_name, hub_token, tmp_path):
    name = repo_name()
    (tmp_path / "plots").mkdir()
    contents = {"config.json": b"{}", "model.safetensors": b"\1" * 100_000, "README.md": b"---\nlicense: mit\n---\n# hi\n",
                "plots/a.png": b"\x89PNG\0\0", "empty.txt": b""}  # fmt: skip
    for path, content in contents.items():
        (tmp_path / path).write_bytes(content)
    api = HfApi()
    api.create_repo(name)
    api.create_repo(name, exist_ok=True)
    done = api.upload_folder(repo_id=name, folder_path=tmp_path)
    assert hub.head(name) == done.oid
    assert {path: content for path, content in hub.files(name).items() if path != ".gitattributes"} == contents
    info = api.repo_info(name, files_metadata=True)
    sizes = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings}
    assert sizes["model.safetensors"] == (100_000, hashlib.sha256(b"\1" * 100_000).hexdigest())
    assert sizes["config.json"] == (2, None)
    assert Path(hf_hub_download(name, "plots/a.png")).read_bytes() == contents["plots/a.png"]
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage")
