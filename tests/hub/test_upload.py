"""Folders pushed with the unmodified client, against the server in tests/hub_server."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from hfdetox.errors import HubError, UsageError
from hfdetox.hub import client, upload
from hfdetox.hub.client import AccessError, IntegrityError, UnreachableError
from hfdetox.hub.upload import PushResult, RepoExistsError, check_repo
from tests.hub_server.answers import Answer
from tests.hub_server.faults import Rule
from tests.output_folder import OLD_WEIGHTS, contents, folder, foreign, pushed

__all__ = ["folder"]

COMMIT = r"/commit/"
MESSAGE = "Upload a model"


def push_folder(folder: Path, name: str, **options: Any) -> PushResult:
    """Push with the message that is not what a test is about."""
    return upload.push_folder(folder, name, message=MESSAGE, **options)


def test_a_new_repo_gets_everything_in_one_commit(hub, repo_name, hub_token, folder):
    name = repo_name("model", "org")
    assert check_repo(name) == name
    assert not hub.exists(name)
    result = push_folder(folder, name, private=True)
    assert pushed(hub, name) == contents(folder)
    assert hub.head(name) == result.commit
    assert len(hub.history(name)) == 2  # the Hub's own first commit and this one
    assert hub.repo(name).private
    assert (result.repo_id, result.url, result.pull_request) == (name, f"{hub.url}/{name}", None)
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage")


def test_a_name_without_a_namespace_is_the_users_own(hub, repo_name, hub_token, folder):
    name = repo_name()
    assert check_repo(name.removeprefix("me/")) == name
    assert push_folder(folder, name.removeprefix("me/")).repo_id == name
    assert check_repo(name.removeprefix("me/")) == name
    assert not hub.repo(name).private


def test_a_repo_that_hfdetox_did_not_make_is_left_alone(hub, repo_name, hub_token, folder):
    name = repo_name()
    head = foreign(hub, name)
    for call in (lambda: check_repo(name), lambda: push_folder(folder, name)):
        with pytest.raises(RepoExistsError, match=r"was not made by hfdetox.*--create-pr.*--overwrite"):
            call()
    hub.commit(name, {"detox_report.json": "[1, 2]"})
    with pytest.raises(RepoExistsError):
        push_folder(folder, name)
    hub.commit(name, {"detox_report.json": None})
    assert hub.history(name)[2].id == head


def test_overwriting_removes_what_would_bring_the_old_weights_back(hub, repo_name, hub_token, folder):
    name = repo_name()
    foreign(hub, name)
    check_repo(name, overwrite=True)
    push_folder(folder, name, overwrite=True)
    expected = {**contents(folder), "notes.md": b"keep me", "plots/theirs.png": b"png"}
    assert pushed(hub, name) == expected
    assert len(hub.history(name)) == 3
    removed = "onnx/model.onnx, preprocessor_config.json, pytorch_model.bin"
    assert removed in hub.history(name)[0].message


def test_its_own_repo_and_an_empty_one_are_pushed_to_without_asking(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    push_folder(folder, name)
    (folder / "plots/before_after.png").unlink()
    (folder / "model.safetensors").write_bytes(OLD_WEIGHTS)
    check_repo(name)
    result = push_folder(folder, name)
    assert pushed(hub, name) == contents(folder)
    # nothing changed: no commit, and the head is what was meant
    assert push_folder(folder, name).commit == result.commit


def test_a_pull_request_leaves_the_main_branch_alone(hub, repo_name, hub_token, folder):
    name = repo_name("model", "stranger")
    head = foreign(hub, name)
    check_repo(name, create_pr=True)
    result = push_folder(folder, name, create_pr=True)
    assert hub.head(name) == head
    assert result.pull_request == result.url == f"{hub.url}/{name}/discussions/1"
    assert hub.head(name, "refs/pr/1") == result.commit
    proposed = pushed(hub, name, "refs/pr/1")
    assert proposed == {**contents(folder), "notes.md": b"keep me", "plots/theirs.png": b"png"}
    # the same push again finds the open pull request
    assert push_folder(folder, name, create_pr=True) == result
    with pytest.raises(UsageError, match="--create-pr needs an existing repository"):
        push_folder(folder, repo_name(), create_pr=True)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_recognised(hub, repo_name, hub_token, folder, create_pr):
    name = repo_name()
    hub.create_repo(name)
    rule = hub.faults.drop_answer("POST", COMMIT)
    result = push_folder(folder, name, create_pr=create_pr)
    assert rule.hits == len(hub.requests("POST", COMMIT)) == 1
    revision = "refs/pr/1" if create_pr else "main"
    assert hub.head(name, revision) == result.commit
    assert len(hub.history(name, revision)) == 2
    assert len(hub.repo(name).discussions) == int(create_pr)
    assert (result.pull_request is not None) == create_pr


def test_what_the_client_raises_at_once_is_repeated(hub, repo_name, hub_token, folder):
    name = repo_name()
    rules = [
        hub.faults.answer("GET", "/api/whoami-v2", 429, headers={"Retry-After": "0"}),
        hub.faults.answer("POST", "/api/repos/create", 503),
        hub.faults.drop_answer("POST", "/api/repos/create", skip=1),
        hub.faults.answer("POST", "/api/validate-yaml", 502),
        hub.faults.answer("POST", COMMIT, 500, times=2),
        hub.faults.answer("GET", "/auth-check/write", 503),
    ]
    push_folder(folder, name)
    assert pushed(hub, name) == contents(folder)
    assert len(hub.history(name)) == 2
    assert [rule.hits for rule in rules[:5]] == [1, 1, 1, 1, 2]
    check_repo(name)
    assert rules[5].hits == 1


def test_a_gateways_page_in_place_of_an_answer_is_repeated(hub, repo_name, hub_token, folder):
    name = repo_name()
    page = Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
    rule = Rule("POST", re.compile("/api/validate-yaml"), skip=0, left=2, origin="hub", answer=page)
    hub.faults.rules.append(rule)
    push_folder(folder, name)
    assert rule.hits == 2
    assert pushed(hub, name) == contents(folder)


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    hub.faults.before("POST", COMMIT, lambda: hub.commit(name, {"theirs.txt": "mine now"}))
    with pytest.raises(HubError, match="was changed by somebody else meanwhile"):
        push_folder(folder, name)
    assert pushed(hub, name) == {"theirs.txt": b"mine now"}


def test_a_failed_push_leaves_the_folder_whole(hub, repo_name, hub_token, folder):
    name = repo_name()
    before = contents(folder)
    rule = hub.faults.answer("POST", COMMIT, 503, times=None)
    with pytest.raises(UnreachableError, match="fails with status 503") as caught:
        push_folder(folder, name, private=True, overwrite=True)
    assert rule.hits == client.DEFAULT_RETRY.attempts
    assert hub.token not in str(caught.value)
    assert contents(folder) == before
    hub.faults.clear()
    push_folder(folder, name, private=True, overwrite=True)
    assert pushed(hub, name) == before


def test_tokens_that_cannot_push_are_found_before_any_work(hub, repo_name, folder, monkeypatch):
    mine, theirs, existing = repo_name(), repo_name("model", "stranger"), repo_name("model", "stranger")
    hub.create_repo(existing)

    def refused(name, match, **options):
        with pytest.raises(AccessError, match=match) as caught:
            check_repo(name, **options)
        assert caught.value.exit_status == 3
        with pytest.raises(AccessError, match=match):
            push_folder(folder, name, **options)

    refused(mine, "no token.*hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    refused(mine, "refuses the token")
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    refused(mine, "may only read")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    refused(theirs, r"me may not create model stranger/.*; push to one of: me, org")
    refused(existing, r"the Hub refuses a push to model stranger/.*\(403")
    assert not hub.requests("POST")


def test_a_push_needs_the_network(hub, repo_name, hub_token, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        push_folder(folder, repo_name())


def test_private_is_not_promised_for_a_public_repo(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    with pytest.raises(UsageError, match="exists and is public"):
        push_folder(folder, name, private=True)
    assert pushed(hub, name) == {}


@pytest.mark.parametrize("damage", ["content", "missing"])
def test_what_went_up_is_compared_with_what_was_meant(hub, repo_name, hub_token, folder, damage):
    name = repo_name()
    first = hub.create_repo(name)

    def spoil():
        head = hub.head(name)
        if head == first:
            return
        path = hub.repo(name).folder / "commits" / f"{head}.json"
        commit = json.loads(path.read_text())
        if damage == "missing":
            commit["files"].pop("config.json", None)
        else:
            commit["files"]["config.json"] = commit["files"]["README.md"]
        path.write_text(json.dumps(commit))

    hub.faults.before("GET", "/tree/", spoil, times=None)
    with pytest.raises(IntegrityError, match=r"config\.json of model .* is not what was pushed"):
        push_folder(folder, name)


@pytest.mark.parametrize("whole", [200 * 10**6, 100], ids=["whole", "parts"])
@pytest.mark.parametrize("damage", ["a byte", "cut", "longer"])
def test_a_store_that_damages_what_it_was_given_is_noticed(
    hub, repo_name, hub_token, folder, monkeypatch, whole, damage
):
    monkeypatch.setattr("hfdetox.hub.upload._WHOLE", whole)
    name = repo_name()
    push_folder(folder, name)
    # the listing goes on to name the hash that the store was told
    content = (folder / "model.safetensors").read_bytes()
    blob = hub.storage.root / "blobs" / hashlib.sha256(content).hexdigest()
    other = {"a byte": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1], "longer": content + b"x"}[damage]
    blob.write_bytes(other)
    try:
        if damage == "longer" and whole == 100:
            push_folder(folder, name)
        else:
            with pytest.raises(IntegrityError, match=r"model\.safetensors of model .* is not what was pushed"):
                push_folder(folder, name)
        push_folder(folder, name, verify_upload=False)
    finally:
        blob.write_bytes(content)
    hub.faults.answer("GET", "/resolve/", 503, times=2)
    hub.faults.cut_body("", 1000, origin="storage")
    push_folder(folder, name)
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage" and entry.method == "GET")


def test_a_card_that_the_hub_refuses_is_a_usage_error(hub, repo_name, hub_token, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UsageError, match="the Hub refuses the card"):
        push_folder(folder, repo_name())


def test_only_output_folders_of_hfdetox_are_pushed(folder, tmp_path):
    def refused(match):
        with pytest.raises(UsageError, match=match):
            push_folder(folder, "me/never")

    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("is a pickle")
    (folder / "pytorch_model.bin").unlink()
    (folder / "link").symlink_to(tmp_path)
    refused("is a link")
    (folder / "link").unlink()
    (folder / "model.safetensors").write_bytes(b"cut")
    refused("not a safetensors file")
    (folder / "model.safetensors").unlink()
    refused(r"holds no model\.safetensors")
    (folder / "detox_report.json").write_text("{}")
    refused("not an output folder of hfdetox")
    with pytest.raises(UsageError, match="not an output folder"):
        push_folder(tmp_path / "nowhere", "me/never")


def test_a_hub_without_xet_takes_the_files_by_http(hub, repo_name, folder, fresh_env):
    name = repo_name()
    code = (
        "from pathlib import Path\nfrom hfdetox.hub.upload import push_folder\n"
        f"print(push_folder(Path({str(folder)!r}), {name!r}, message='m').commit)"
    )
    environment = {**fresh_env, "HF_HUB_DISABLE_XET": "0", "HF_TOKEN": hub.token}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # client 1.x asks for no Xet where the Hub's answer to the LFS batch names another way
    assert hub.requests("GET", "/xet-write-token/") or huggingface_hub.__version__.startswith("1.")
    assert hub.head(name) == done.stdout.strip()
    assert pushed(hub, name) == contents(folder)
