"""Reading from the Hub with the unmodified client, against the server in tests/hub_server."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from hfdetox.errors import HubError, UsageError
from hfdetox.files import check_safetensors, sha256_file
from hfdetox.hub.client import AccessError, IntegrityError, UnknownRepoError
from hfdetox.hub.download import PickleOnlyError, pull_model, read_text_file, resolve
from tests.hub_server.made import OTHER_WEIGHTS, WEIGHTS, make_model


def cached_file(name, filename, repo_type="model"):
    folder = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{name.replace('/', '--')}"
    return next(folder.glob(f"snapshots/*/{filename}"))


def test_pull_pins_the_commit_and_names_the_hash_of_the_weights(hub, repo_name):
    name = repo_name()
    first = make_model(
        hub, name, **{"LICENSE": "MIT", "NOTICE.txt": "by me", "modeling.py": "x = 1", "notes.txt": "no"}
    )
    hub.commit(name, {"model.safetensors": OTHER_WEIGHTS})
    pulled = pull_model(name, revision=first)
    assert (pulled.id, pulled.revision) == (name, first)
    assert pulled.weights == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    assert sorted(path.name for path in pulled.folder.iterdir()) == [
        "LICENSE", "NOTICE.txt", "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    assert (pulled.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert pull_model(name).weights == {"model.safetensors": hashlib.sha256(OTHER_WEIGHTS).hexdigest()}


def test_python_files_come_only_when_remote_code_is_trusted(hub, repo_name):
    name = repo_name()
    make_model(hub, name, **{"modeling.py": "x = 1", "parts/layer.py": "y = 2"})
    assert not list(pull_model(name).folder.rglob("*.py"))
    folder = pull_model(name, trust_remote_code=True).folder
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")) == ["modeling.py", "parts/layer.py"]


def test_every_file_is_asked_for_at_the_commit_that_was_named_first(hub, repo_name):
    name = repo_name()
    first = make_model(hub, name)
    # somebody pushes other weights between the first answer and the files
    hub.faults.before("GET", f"{name}/tree/", lambda: hub.commit(name, {"model.safetensors": OTHER_WEIGHTS}))
    pulled = pull_model(name)
    assert hub.head(name) != first
    assert pulled.revision == first
    assert (pulled.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert all(f"/resolve/{first}/" in entry.path for entry in hub.requests(path="/resolve/"))


def test_a_cached_copy_does_not_stand_in_for_a_repo_that_is_gone(hub, repo_name):
    name = repo_name()
    make_model(hub, name)
    pull_model(name)
    hub.delete_repo(name)
    with pytest.raises(UnknownRepoError, match=rf"model {name} is not on the Hub"):
        pull_model(name)


def test_a_cached_copy_does_not_stand_in_for_a_gated_repo(hub, repo_name, monkeypatch):
    name = repo_name()
    make_model(hub, name)
    pull_model(name)
    hub.set_access(name, gated=True)
    with pytest.raises(AccessError, match=r"is gated and there is no token.*hf auth login"):
        pull_model(name)
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    with pytest.raises(AccessError, match="is gated and this account has no access"):
        pull_model(name)
    hub.grant(name, "stranger")
    assert pull_model(name).id == name


def test_a_moved_repo_is_followed_under_its_new_name_and_said_so(hub, repo_name):
    old, new = repo_name(), repo_name()
    commit = make_model(hub, old)
    pull_model(old)
    hub.move_repo(old, new)
    pulled = pull_model(old)
    assert (pulled.id, pulled.revision) == (new, commit)
    assert pulled.warnings == (f"model {old} is called {new} on the Hub now; using that name",)
    assert new.replace("/", "--") in str(pulled.folder)


def test_a_private_repo_needs_the_token(hub, repo_name, monkeypatch):
    name = repo_name()
    make_model(hub, name)
    hub.set_access(name, private=True)
    with pytest.raises(UnknownRepoError, match="if it is private `hf auth login`"):
        pull_model(name)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert pull_model(name).id == name
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage")


def test_wrong_names_and_tokens_are_one_clear_line_each(hub, repo_name, monkeypatch):
    name = repo_name()
    make_model(hub, name)
    with pytest.raises(UnknownRepoError, match=r"^dataset org/nothing-here is not on the Hub"):
        resolve("org/nothing-here", repo_type="dataset")
    with pytest.raises(UnknownRepoError, match=r"at v9: no such branch, tag or commit"):
        resolve(name, revision="v9")
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        resolve("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(AccessError, match="refuses the token") as caught:
        pull_model(name)
    assert "hf_wrong_secret" not in str(caught.value)
    assert caught.value.exit_status == 3


def test_a_token_that_a_server_echoes_is_left_out_of_the_line(hub, repo_name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.faults.answer("GET", "/api/models/", 418, message=f"no tea for {hub.token}\nsecond line")
    with pytest.raises(HubError) as caught:
        resolve(repo_name())
    assert "no tea for <token> second line" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("filename", "origin"), [("model.safetensors", "storage"), ("config.json", "hub")])
def test_a_file_damaged_on_its_way_is_refused_and_the_next_try_is_fresh(hub, repo_name, filename, origin):
    name = repo_name()
    make_model(hub, name)
    hub.faults.flip_byte(f"/{filename}" if origin == "hub" else name, at=1, origin=origin)
    with pytest.raises(IntegrityError, match=rf"{filename} of model {name} is not what the Hub says it is"):
        pull_model(name)
    pulled = pull_model(name)
    assert (pulled.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (pulled.folder / "config.json").read_text() == "{}"


def test_a_damaged_cached_file_is_refused_and_the_next_try_is_fresh(hub, repo_name):
    name = repo_name()
    make_model(hub, name)
    pull_model(name)
    blob = cached_file(name, "model.safetensors").resolve()
    blob.write_bytes(OTHER_WEIGHTS)
    with pytest.raises(IntegrityError, match="damaged copy was removed"):
        pull_model(name)
    assert not blob.exists()
    assert (pull_model(name).folder / "model.safetensors").read_bytes() == WEIGHTS


def test_weights_that_git_holds_itself_are_checked_by_gits_hash(hub, repo_name, monkeypatch):
    name = repo_name()
    hub.create_repo(name)
    monkeypatch.setattr("tests.hub_server.storage.wants_lfs", lambda *arguments: False)
    hub.commit(name, {"config.json": "{}", "model.safetensors": WEIGHTS})
    assert resolve(name).files["model.safetensors"].sha256 is None
    assert pull_model(name).weights == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    cached_file(name, "model.safetensors").resolve().write_bytes(OTHER_WEIGHTS)
    with pytest.raises(IntegrityError):
        pull_model(name)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "weights/best.pth"])
def test_a_pickle_only_repo_is_refused_without_fetching_it(hub, repo_name, pickle):
    name = repo_name()
    hub.create_repo(name)
    hub.commit(name, {"config.json": "{}", pickle: b"\x80\x04."})
    with pytest.raises(PickleOnlyError, match=rf"only as a pickle \({pickle}\), which can run its author's code"):
        pull_model(name)
    assert not hub.requests(path="/resolve/")


def test_files_that_are_not_safetensors_are_refused(hub, repo_name, tmp_path):
    for content, reason in ((b"\x80\x04 pickled", "not a safetensors file"),
                            (WEIGHTS[:-1], "not a safetensors file"),
                            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
                            (b"", "not a safetensors file")):  # fmt: skip
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match=rf"^model\.safetensors.*{reason}"):
            check_safetensors(tmp_path / "model.safetensors")
    name = repo_name()
    hub.create_repo(name)
    hub.commit(name, {"config.json": "{}", "model.safetensors": b"\x80\x04 pickled under another name"})
    with pytest.raises(UsageError, match="not a safetensors file"):
        pull_model(name)
    empty = repo_name()
    hub.create_repo(empty)
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        pull_model(empty)


def test_the_header_names_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(WEIGHTS)
    assert check_safetensors(path) == {"head.weight": {"dtype": "F32", "shape": [2, 300], "data_offsets": [0, 2400]}}
    assert sha256_file(path) == hashlib.sha256(WEIGHTS).hexdigest()


def test_shards_are_pulled_by_their_index(hub, repo_name):
    name = repo_name()
    hub.create_repo(name)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = "model.safetensors.index.json"
    shards = {names["a"]: WEIGHTS, names["b"]: OTHER_WEIGHTS, index: json.dumps({"weight_map": names})}
    hub.commit(name, {"config.json": "{}", **shards})
    pulled = pull_model(name)
    assert pulled.weights == {f: hashlib.sha256(shards[f]).hexdigest() for f in names.values()}
    assert (pulled.folder / index).is_file()
    for broken in (json.dumps({"weight_map": {"a": "../../other.safetensors"}}), "[]", json.dumps({"weight_map": {}})):
        hub.commit(name, {index: broken})
        with pytest.raises(UsageError, match=index):
            pull_model(name)


@pytest.mark.parametrize("path", ["../evil.py", "a/../../evil.py", "/etc/evil.py"])
def test_a_listing_cannot_name_files_outside_its_folder(hub, repo_name, path):
    name = repo_name()
    make_model(hub, name, **{path: "evil"})
    with pytest.raises(IntegrityError, match="would leave its folder"):
        pull_model(name, trust_remote_code=True)


def test_a_dataset_is_resolved_with_its_files(hub, repo_name):
    name = repo_name("data")
    hub.create_repo(name, "dataset")
    commit = hub.commit(name, {"data/train.parquet": b"PAR1", "eval.yaml": "tasks: []\n"}, repo_type="dataset")
    state = resolve(name, repo_type="dataset")
    assert (state.id, state.sha, state.repo_type) == (name, commit, "dataset")
    assert set(state.files) == {".gitattributes", "data/train.parquet", "eval.yaml"}
    assert state.files["data/train.parquet"].sha256 == hashlib.sha256(b"PAR1").hexdigest()
    assert state.files["eval.yaml"].sha256 is None
    assert read_text_file(name, "eval.yaml", commit, "dataset") == "tasks: []\n"
    assert read_text_file(name, "eval.yaml", "main", "dataset") == "tasks: []\n"
    assert read_text_file(name, "README.md", commit, "dataset") is None
