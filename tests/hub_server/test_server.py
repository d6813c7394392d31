"""The test Hub against the unmodified client libraries: what they read from it and what they write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

from hfdetox.hub.client import Retry, ask
from tests.hub_server.made import model

__all__ = ["model"]

MIB = 1024 * 1024


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


# Reading


def test_snapshots_hold_the_files_of_their_commit(hub, model):
    first = hub.head(model)
    hub.commit(model, {"model.safetensors": b"new", "a/b/c.txt": None})
    for revision, weights in ((first, b"weights"), ("main", b"new")):
        folder = Path(snapshot_download(model, revision=revision))
        assert (folder / "model.safetensors").read_bytes() == weights
        assert (folder / "a/b/c.txt").exists() == (revision == first)


def test_repo_info_in_both_forms(hub, model):
    first = hub.head(model)
    card = "---\nlicense: mit\nlibrary_name: timm\ntags: [x]\ndatasets: [org/d]\n---\n"
    hub.commit(model, {"README.md": card})
    info = HfApi().repo_info(model, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (model, hub.head(model), False, False)
    assert info.library_name == "timm"
    assert info.card_data.license == "mit"
    assert info.tags == ["timm", "x", "dataset:org/d", "license:mit"]
    files = {file.rfilename: file for file in info.siblings}
    assert files["model.safetensors"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert (files["config.json"].size, files["config.json"].lfs) == (2, None)
    old = HfApi().repo_info(model, revision=first)
    assert (old.sha, old.card_data) == (first, None)
    assert HfApi().model_info(model, expand=["sha"]).siblings is None


def test_tree_commits_and_refs(hub, model, hub_token):
    hub.page_size = 2  # lists come in pages
    api = HfApi()
    hub.commit(model, {"config.json": b'{"a": 1}'}, message="Change the config")
    rows = {row.path: row for row in api.list_repo_tree(model, recursive=True, expand=True)}
    assert set(rows) == {".gitattributes", "config.json", "model.safetensors", "a", "a/b", "a/b/c.txt"}
    assert rows["config.json"].last_commit.title == "Change the config"
    assert rows["a/b/c.txt"].last_commit.title == "Add files"
    # git hash-object of a file with "deep" in it
    assert rows["a/b/c.txt"].blob_id == hashlib.sha1(b"blob 4\0deep").hexdigest()
    assert [row.path for row in api.list_repo_tree(model, "a")] == ["a/b"]
    for path in ("nowhere", "config.json"):
        with pytest.raises(RemoteEntryNotFoundError):
            list(api.list_repo_tree(model, path))
    assert [info.path for info in api.get_paths_info(model, ["a", "config.json", "none"])] == ["a", "config.json"]
    titles = [commit.title for commit in api.list_repo_commits(model)]
    assert titles == ["Change the config", "Add files", "initial commit"]
    api.create_branch(model, branch="side", revision=hub.history(model)[1].id)
    api.create_tag(model, tag="v1")
    refs = api.list_repo_refs(model)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {
        "main": hub.head(model),
        "side": hub.history(model)[1].id,
    }
    assert [tag.target_commit for tag in refs.tags] == [hub.head(model)]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(model, tag="v1")
    api.delete_branch(model, branch="side")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(model, revision="side")


def test_content_matches_the_checksums_that_the_hub_gives(hub, model):
    folder = snapshot_download(model)
    assert not HfApi().verify_repo_checksums(model, local_dir=folder).mismatches
    hub.faults.flip_byte("model.safetensors", at=3)
    hub.commit(model, {"model.safetensors": b"weights 2"})
    path = hf_hub_download(model, "model.safetensors")  # no client library looks at what came
    assert Path(path).read_bytes() == b"wei" + bytes([ord("g") ^ 0xFF]) + b"hts 2"
    assert HfApi().verify_repo_checksums(model).mismatches


def test_cut_download_is_resumed_by_range(hub, model):
    content = np.random.default_rng(0).bytes(12 * MIB)
    hub.commit(model, {"big.bin": content})
    rule = hub.faults.cut_body("big.bin", after=11 * MIB)
    # client 1.19 and older go on from what came at the next call only, and ask makes that
    path = ask(lambda: hf_hub_download(model, "big.bin"), "big.bin", retry=Retry(base_delay=0.01))
    assert Path(path).read_bytes() == content
    assert rule.hits == 1
    ranges = [(entry.status, entry.range) for entry in hub.requests("GET", "big.bin")]
    assert ranges == [(200, None), (206, f"bytes={10 * MIB}-")]
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage")


# Writing


def test_push_and_pull_round_trip(hub, repo_name, hub_token, tmp_path):
    name = repo_name()
    contents = {
        "config.json": b"{}",
        "model.safetensors": b"\1" * 100_000,
        "README.md": b"---\nlicense: mit\n---\n# hi\n",
        "plots/a.png": b"\x89PNG\0\0",
        "empty.txt": b"",
    }
    (tmp_path / "plots").mkdir()
    for path, content in contents.items():
        (tmp_path / path).write_bytes(content)
    api = HfApi()
    assert api.create_repo(name, private=True).repo_id == name
    assert api.create_repo(name, exist_ok=True).repo_id == name
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(name)
    first = hub.head(name)
    done = api.upload_folder(repo_id=name, folder_path=tmp_path, commit_description="why")
    assert (hub.head(name), hub.history(name)[0].parents) == (done.oid, (first,))
    assert without_attributes(hub.files(name)) == contents
    lfs = {path for path, file in hub.history(name)[0].files.items() if file.lfs}
    assert lfs == {"model.safetensors", "plots/a.png"}
    assert Path(hf_hub_download(name, "plots/a.png")).read_bytes() == contents["plots/a.png"]
    uploads = [entry for entry in hub.log if entry.origin == "storage" and entry.method == "PUT"]
    assert len(uploads) == 2
    assert not any(entry.had_token for entry in uploads)
    # unchanged files make no commit
    assert api.upload_folder(repo_id=name, folder_path=tmp_path).oid == done.oid
    api.delete_repo(name)
    assert not hub.exists(name)


def test_large_files_go_up_in_parts(hub, repo_name, hub_token):
    name = repo_name()
    hub.create_repo(name)
    hub.multipart_above, hub.multipart_chunk = 1 * MIB, 1 * MIB
    content = np.random.default_rng(1).bytes(5 * MIB // 2)
    HfApi().upload_file(repo_id=name, path_or_fileobj=content, path_in_repo="x.bin")
    assert hub.files(name)["x.bin"] == content
    assert len(hub.requests("PUT", "/part-")) == 3


def test_commit_deletes_copies_and_checks_its_parent(hub, model, hub_token):
    api, first = HfApi(), hub.head(model)
    operations = [
        CommitOperationDelete("config.json"),
        CommitOperationDelete("a/"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
    ]
    api.create_commit(model, operations, commit_message="Change", parent_commit=first)
    assert without_attributes(hub.files(model)) == {"model.safetensors": b"weights", "copy.safetensors": b"weights"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(model, [CommitOperationAdd("x", b"x")], commit_message="Late", parent_commit=first)
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(model, [CommitOperationDelete("x")], commit_message="Nothing there")


def test_pull_request_of_a_stranger_is_merged_by_the_owner(hub, model):
    stranger, owner = HfApi(token=hub.stranger_token), HfApi(token=hub.token)
    add = CommitOperationAdd("model.safetensors", b"better weights")
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_commit(model, [add], commit_message="Mine now")
    before = hub.head(model)
    done = stranger.create_commit(model, [add], commit_message="Better", create_pr=True)
    assert done.pr_url == f"{hub.url}/{model}/discussions/1"
    assert hub.head(model) == before
    assert hub.head(model, "refs/pr/1") == done.oid
    assert Path(hf_hub_download(model, "model.safetensors", revision="refs/pr/1")).read_bytes() == b"better weights"
    assert owner.list_repo_refs(model, include_pull_requests=True).pull_requests[0].target_commit == done.oid
    details = owner.get_discussion_details(model, 1)
    assert (details.title, details.author, details.status, details.is_pull_request) == (
        "Better",
        "stranger",
        "open",
        True,
    )
    hub.commit(model, {"config.json": b'{"meanwhile": 1}'})
    owner.merge_pull_request(model, 1)
    assert hub.files(model)["model.safetensors"] == b"better weights"
    assert hub.files(model)["config.json"] == b'{"meanwhile": 1}'
    assert [item.status for item in owner.get_repo_discussions(model)] == ["merged"]


def test_card_is_checked_and_pushed(hub, repo_name, hub_token):
    name = repo_name()
    hub.create_repo(name)
    card = b"---\nlicense: mit\n---\n# Card\n"
    HfApi().upload_file(repo_id=name, path_or_fileobj=card, path_in_repo="README.md")
    assert ModelCard.load(name).data.license == "mit"
    model_index = "model-index:\n- name: x\n  results: [{task: {type: t}, metrics: []}]"
    expected = {
        "base_model_relation: child": "base_model_relation",
        "license: no-such": "license",
        "tags: x": "tags",
        "a: [": "YAML",
        model_index: "dataset.type",
    }
    for metadata, message in expected.items():
        card = f"---\n{metadata}\n---\n".encode()
        with pytest.raises(ValueError, match=message):
            HfApi().upload_file(repo_id=name, path_or_fileobj=card, path_in_repo="README.md")
    assert len(hub.history(name)) == 2
