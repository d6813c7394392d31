"""The test Hub against the unmodified client libraries: what they read from it and what they raise."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    auth_check,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from tests.hub.server import HubServer

MIB = 1024 * 1024
NewName = Callable[..., str]


@pytest.fixture
def model(hub: HubServer, repo_name: NewName) -> str:
    """A public model with a regular file, an LFS file and a folder."""
    name = repo_name("model", "org")
    hub.create_repo(name)
    hub.commit(name, {"config.json": b"{}", "model.safetensors": b"weights", "a/b/c.txt": b"deep"})
    return name


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
    assert Path(hf_hub_download(model, "big.bin")).read_bytes() == content
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
    ModelCard("---\nlicense: mit\n---\n# Card\n").push_to_hub(name)
    assert ModelCard.load(name).data.license == "mit"
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard("---\nbase_model_relation: child\n---\n").push_to_hub(name)
    model_index = "model-index:\n- name: x\n  results: [{task: {type: t}, metrics: []}]"
    expected = {"license: no-such": "license", "tags: x": "tags", "a: [": "YAML", model_index: "dataset.type"}
    for metadata, message in expected.items():
        card = f"---\n{metadata}\n---\n".encode()
        with pytest.raises(ValueError, match=message):
            HfApi().upload_file(repo_id=name, path_or_fileobj=card, path_in_repo="README.md")
    assert len(hub.history(name)) == 2


# Refusals


def test_missing_things_raise_what_the_client_documents(hub, model, repo_name):
    with pytest.raises(RepositoryNotFoundError, match="401"):
        HfApi().repo_info(repo_name())
    with pytest.raises(RepositoryNotFoundError, match="404"):
        HfApi(token=hub.token).repo_info(repo_name())
    with pytest.raises(RevisionNotFoundError):
        HfApi().repo_info(model, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(model, "pytorch_model.bin")
    assert not HfApi().file_exists(model, "pytorch_model.bin")
    hub.repo(model).disabled = True
    with pytest.raises(DisabledRepoError):
        HfApi().repo_info(model)
    assert httpx2.get(f"{hub.url}/api/nothing").json().keys() == {"error"}


def test_private_repo_is_hidden_from_strangers(hub, model):
    hub.set_access(model, private=True)
    for token in (False, hub.stranger_token):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info(model)
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).hf_hub_download(model, "config.json")
    assert HfApi(token=hub.read_token).repo_info(model).private is True
    assert Path(hf_hub_download(model, "config.json", token=hub.read_token)).read_bytes() == b"{}"


def test_gated_repo_shows_itself_but_not_its_files(hub, model):
    hub.set_access(model, gated=True)
    for token, status in ((False, "401"), (hub.stranger_token, "403")):
        assert HfApi(token=token).repo_info(model).gated == "auto"
        with pytest.raises(GatedRepoError, match=status):
            HfApi(token=token).hf_hub_download(model, "model.safetensors")
        with pytest.raises(GatedRepoError):
            auth_check(model, token=token)
    hub.grant(model, "stranger")
    assert hf_hub_download(model, "model.safetensors", token=hub.stranger_token)


def test_tokens_do_only_what_they_may(hub, model, repo_name):
    assert HfApi(token=hub.token).whoami()["orgs"][0]["name"] == "org"
    assert HfApi(token=hub.read_token).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        HfApi(token="hf_wrong").repo_info(model)
    assert type(caught.value) is HfHubHTTPError
    for token in (hub.read_token, hub.stranger_token):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            HfApi(token=token).create_repo(repo_name("new", "org"))
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            HfApi(token=token).upload_file(repo_id=model, path_or_fileobj=b"x", path_in_repo="x")
    hub.add_user("me", "hf_nothing", "none", ("org",))
    hub.set_access(model, private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_nothing").repo_info(model)


def test_moved_repo_answers_under_its_new_name(hub, model, repo_name):
    new = repo_name("moved", "org")
    hub.move_repo(model, new)
    assert HfApi().repo_info(model).id == new
    assert Path(hf_hub_download(model, "model.safetensors")).read_bytes() == b"weights"
    assert 307 in {entry.status for entry in hub.requests(path=model)}
    HfApi(token=hub.token).upload_file(repo_id=model, path_or_fileobj=b"x", path_in_repo="x.bin")
    assert hub.files(new)["x.bin"] == b"x"


# Faults


def test_rules_act_on_the_requests_they_name(hub, model):
    rule = hub.faults.answer("GET", f"/api/models/{model}$", 429, headers={"Retry-After": "7"}, times=2, skip=1)
    statuses = [httpx2.get(f"{hub.url}/api/models/{model}") for _ in range(4)]
    assert [(answer.status_code, answer.headers.get("Retry-After")) for answer in statuses] == [
        (200, None),
        (429, "7"),
        (429, "7"),
        (200, None),
    ]
    assert rule.hits == 2
    assert [entry.status for entry in hub.requests("GET", f"/api/models/{model}")] == [200, 429, 429, 200]


def test_delay_waits_before_the_request_is_carried_out(hub):
    hub.faults.delay("GET", "/api/nothing", 0.5)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{hub.url}/api/nothing", timeout=0.2)
    assert httpx2.get(f"{hub.url}/api/nothing", timeout=0.2).status_code == 404


def test_dropped_answer_has_happened(hub, model, hub_token):
    hub.faults.drop_answer("POST", "/commit/main")
    before = hub.head(model)
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().create_commit(model, [CommitOperationAdd("x", b"x")], commit_message="Lost")
    assert hub.history(model)[0].parents == (before,)
    assert hub.files(model)["x"] == b"x"


def test_action_before_a_request_lets_somebody_else_commit(hub, model, hub_token):
    hub.faults.before("POST", "/commit/main", lambda: hub.commit(model, {"theirs": b"1"}))
    parent = hub.head(model)
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit(model, [CommitOperationAdd("x", b"x")], commit_message="Mine", parent_commit=parent)
    assert "theirs" in hub.files(model)


def test_storage_wants_signed_urls_and_no_token(hub, model):
    answer = httpx2.head(f"{hub.url}/{model}/resolve/main/model.safetensors")
    location = answer.headers["Location"]
    assert not location.startswith(hub.url)
    assert httpx2.get(location).content == b"weights"
    assert httpx2.get(location, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
    assert httpx2.get(location.split("?")[0]).status_code == 403
    assert httpx2.get(location, headers={"Range": "bytes=2-3"}).content == b"ig"
    assert httpx2.get(location, headers={"Range": "bytes=99-"}).status_code == 416
    assert httpx2.put(location, content=b"other").status_code == 403


def test_commit_refuses_missing_lfs_objects_and_broken_cards(hub, model, hub_token):
    lines = (
        b'{"key": "header", "value": {"summary": "x"}}\n'
        b'{"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "' + b"0" * 64 + b'", "size": 3}}\n'
    )
    url = f"{hub.url}/api/models/{model}/commit/main"
    answer = httpx2.post(url, content=lines, headers={"Authorization": f"Bearer {hub_token}"})
    assert (answer.status_code, "not uploaded" in answer.json()["error"]) == (400, True)
    # what validate-yaml would refuse (here it is kept from it), the commit refuses too
    hub.faults.answer("POST", "/api/validate-yaml", 200, body={"errors": [], "warnings": []})
    with pytest.raises(BadRequestError, match="README"):
        HfApi().upload_file(repo_id=model, path_or_fileobj=b"---\nlicense: 7\n---\n", path_in_repo="README.md")


def test_repos_survive_a_restart_and_a_stopped_server_is_gone(tmp_path):
    with HubServer(tmp_path) as first:
        first.create_repo("org/x", "dataset", private=True)
        commit = first.commit("org/x", {"a.txt": b"a"}, repo_type="dataset")
        first.move_repo("org/x", "org/y", repo_type="dataset")
        client = httpx2.Client()
        assert client.get(f"{first.url}/api/nothing").status_code == 404
    with pytest.raises(httpx2.TransportError):
        client.get(f"{first.url}/api/nothing")  # a kept-alive connection ends with the server
    with HubServer(tmp_path) as second:
        assert second.head("org/y", repo_type="dataset") == commit
        assert second.repo("org/y", "dataset").private
        headers = {"Authorization": f"Bearer {second.token}"}
        answer = httpx2.get(f"{second.url}/api/datasets/org/x", headers=headers, follow_redirects=True)
        assert answer.json()["id"] == "org/y"


# The libraries above the client


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_load_dataset_parquet_and_streaming(hub, repo_name, hub_token):
    import datasets

    name = repo_name("data")
    images = [{"bytes": png(n), "path": None} for n in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    made.push_to_hub(name)
    loaded = datasets.load_dataset(name, split="train")
    assert loaded["label"] == [0, 1] * 3
    assert loaded.features["label"].names == ["no", "yes"]
    assert loaded[5]["image"].getpixel((0, 0)) == (5, 5, 5)
    stream = datasets.load_dataset(name, split="train", streaming=True)
    assert [row["image"].getpixel((0, 0))[0] for row in stream] == list(range(6))
    assert any(entry.range and entry.status == 206 for entry in hub.log)


def test_load_dataset_imagefolder(hub, repo_name):
    import datasets

    name = repo_name("folder")
    hub.create_repo(name, "dataset")
    files = {
        f"{split}/{kind}/{n}.png": png(n) for split in ("train", "test") for kind in ("cat", "dog") for n in (1, 2)
    }
    hub.commit(name, files, repo_type="dataset")
    loaded = datasets.load_dataset(name)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "test": 4}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    stream = datasets.load_dataset(name, split="test", streaming=True)
    assert [(row["label"], row["image"].getpixel((0, 0))[0]) for row in stream] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_transformers_round_trip(hub, repo_name, hub_token):
    import torch
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    name = repo_name("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    made = ResNetForImageClassification(config).eval()
    made.push_to_hub(name)
    loaded = AutoModelForImageClassification.from_pretrained(name).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(made(images).logits, loaded(images).logits)
    parameters = sum(tensor.numel() for tensor in made.state_dict().values() if tensor.is_floating_point())
    assert HfApi().model_info(name).safetensors.parameters["F32"] == parameters


def test_timm_round_trip(hub, repo_name, hub_token):
    import timm
    import torch

    name = repo_name("timm")
    torch.manual_seed(0)
    made = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.push_to_hf_hub(made, name, model_config={"num_classes": 3}, safe_serialization=True)
    loaded = timm.create_model(f"hf_hub:{name}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(made(images), loaded(images))


# The fixtures


def test_cli_runs_in_an_environment_of_its_own(hub, run_cli, fresh_env):
    done = run_cli(["--version"])
    assert done.returncode == 0, done.stderr
    assert "HF_TOKEN" not in fresh_env
    assert fresh_env["HF_HOME"] != os.environ["HF_HOME"]
    code = "from huggingface_hub import constants as c; print(c.ENDPOINT, c.HF_HOME)"
    shown = subprocess.run([sys.executable, "-c", code], env=fresh_env, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [hub.url, fresh_env["HF_HOME"]]


def test_session_refuses_to_start_after_the_client_was_imported():
    command = [sys.executable, "-c", "import huggingface_hub, tests.conftest"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "was imported before tests/conftest.py" in done.stderr


def test_server_runs_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.hub.server", "--root", str(tmp_path), "--port", "0"]
    folder = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().split()[1].removeprefix("HF_ENDPOINT=")
            assert httpx2.get(f"{endpoint}/api/whoami-v2").status_code == 401
        finally:
            process.terminate()
