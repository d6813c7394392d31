"""The test Hub against the unmodified client libraries: what it refuses, and the faults that tests ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, auth_check, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfdetox.hub.client import http
from tests.hub_server.made import model
from tests.hub_server.server import HubServer

__all__ = ["model"]

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
    assert http.get(f"{hub.url}/api/nothing").json().keys() == {"error"}


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
    statuses = [http.get(f"{hub.url}/api/models/{model}") for _ in range(4)]
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
    with pytest.raises(http.ReadTimeout):
        http.get(f"{hub.url}/api/nothing", timeout=0.2)
    assert http.get(f"{hub.url}/api/nothing", timeout=0.2).status_code == 404


def test_dropped_answer_has_happened(hub, model, hub_token):
    hub.faults.drop_answer("POST", "/commit/main")
    before = hub.head(model)
    with pytest.raises(http.RemoteProtocolError):
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
    answer = http.head(f"{hub.url}/{model}/resolve/main/model.safetensors")
    location = answer.headers["Location"]
    assert not location.startswith(hub.url)
    assert http.get(location).content == b"weights"
    assert http.get(location, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
    assert http.get(location.split("?")[0]).status_code == 403
    assert http.get(location, headers={"Range": "bytes=2-3"}).content == b"ig"
    assert http.get(location, headers={"Range": "bytes=99-"}).status_code == 416
    assert http.put(location, content=b"other").status_code == 403


def test_commit_refuses_missing_lfs_objects_and_broken_cards(hub, model, hub_token):
    lines = (
        b'{"key": "header", "value": {"summary": "x"}}\n'
        b'{"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "' + b"0" * 64 + b'", "size": 3}}\n'
    )
    url = f"{hub.url}/api/models/{model}/commit/main"
    answer = http.post(url, content=lines, headers={"Authorization": f"Bearer {hub_token}"})
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
        client = http.Client()
        assert client.get(f"{first.url}/api/nothing").status_code == 404
    with pytest.raises(http.TransportError):
        client.get(f"{first.url}/api/nothing")  # a kept-alive connection ends with the server
    with HubServer(tmp_path) as second:
        assert second.head("org/y", repo_type="dataset") == commit
        assert second.repo("org/y", "dataset").private
        headers = {"Authorization": f"Bearer {second.token}"}
        answer = http.get(f"{second.url}/api/datasets/org/x", headers=headers, follow_redirects=True)
        assert answer.json()["id"] == "org/y"
