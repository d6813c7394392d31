"""What changes a repo: preupload, commit, pull requests, branches, tags, settings."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.hub_server import cards, discussions
from tests.hub_server.accounts import Caller, check_files, check_logged_in, check_write
from tests.hub_server.answers import Answer, Refusal, json_answer, revision_not_found
from tests.hub_server.info import page_url
from tests.hub_server.storage import Repo, StoredFile, lfs_file, wants_lfs
from tests.hub_server.wire import Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


def check_push(caller: Caller, repo: Repo, ref: str | None, create_pr: bool) -> None:
    """Refusal unless the caller may commit there: pull requests are open to everybody who can read the repo."""
    check_logged_in(caller)
    number = int(ref.rsplit("/", 1)[-1]) if ref and ref.startswith("refs/pr/") else None
    own = number is not None and discussions.find(repo, number)["author"] == caller.name
    if create_pr or own:
        check_files(caller, repo)
    else:
        check_write(caller, repo)


def preupload(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST `/api/T/ID/preupload/REV`: LFS or regular for each file, and what lies there now."""
    revision = unquote(rest)
    check_push(caller, repo, repo.ref(revision), request.flag("create_pr"))
    present = repo.commit(revision).files
    answers = []
    for file in request.json["files"]:
        sample = base64.b64decode(file.get("sample", ""))
        mode = "lfs" if wants_lfs(file["path"], file["size"], sample, repo.type) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if file["path"] in present:
            answer["oid"] = present[file["path"]].etag
        answers.append(answer)
    return json_answer({"files": answers})


def commit(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST `/api/T/ID/commit/REV`, NDJSON: one commit on a branch or pull request, or a new pull request."""
    revision, create_pr = unquote(rest), request.flag("create_pr")
    header, operations = _read_lines(request.body)
    with hub.storage.lock:
        ref = repo.ref(revision)
        check_push(caller, repo, ref, create_pr)
        base = repo.commit(revision)
        if not create_pr and (ref is None or ref.startswith("refs/tags/")):
            raise revision_not_found(revision)
        parent = header.get("parentCommit")
        if parent is not None and parent != base.id:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for key, value in operations:
            _apply(hub, repo, files, key, value)
        if files.get("README.md") != base.files.get("README.md") and "README.md" in files:
            errors = cards.check(hub.content(files["README.md"]).decode(errors="replace"), repo.type)[0]
            if errors:
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        title, description = header["summary"], header.get("description", "")
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if create_pr:
            branch = revision if ref and ref.startswith("refs/heads/") else "main"
            pull = discussions.open_new(repo, title, description, caller.name, base=f"refs/heads/{branch}")
            ref = f"refs/pr/{pull['num']}"
            answer["pullRequestUrl"] = page_url(hub, repo, f"/discussions/{pull['num']}")
        done = repo.add_commit(str(ref), files, title, description, caller.name, (base.id,))
        discussions.note_commit(repo, str(ref), done, caller.name)
    return json_answer({**answer, "commitOid": done.id, "commitUrl": page_url(hub, repo, f"/commit/{done.id}")})


def _read_lines(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        pairs = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise Refusal(400, "every line must be a JSON object with key and value") from None
    if not pairs or pairs[0][0] != "header" or not pairs[0][1].get("summary"):
        raise Refusal(400, "the first line must be a header with a summary")
    return pairs[0][1], pairs[1:]


def _apply(hub: HubServer, repo: Repo, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    path = value["path"].strip("/")
    if key == "file":
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error:
            raise Refusal(400, f"{path}: the content is not base64") from None
        sha256, size = hub.storage.blobs.add(iter([content]))
        files[path] = hub.storage.blobs.regular(sha256, size)
    elif key == "lfsFile":
        oid = value["oid"]
        blob = hub.storage.blobs.path(oid)
        if oid not in repo.lfs_objects or not blob.exists():
            raise Refusal(400, f"{path}: the LFS object {oid} was not uploaded")
        if value.get("size", blob.stat().st_size) != blob.stat().st_size:
            raise Refusal(400, f"{path}: the LFS object {oid} has another size")
        files[path] = lfs_file(oid, blob.stat().st_size)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(f"{path}/")]
        if not inside:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise Refusal(400, f"unknown operation {key}")


def branch(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST and DELETE `/api/T/ID/branch/NAME`."""
    check_write(caller, repo)
    if request.method == "DELETE":
        return _drop_ref(hub, repo, f"refs/heads/{unquote(rest)}")
    return _add_ref(hub, repo, f"refs/heads/{unquote(rest)}", request.json.get("startingPoint") or "main")


def tag(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST `/api/T/ID/tag/REV` with the name in the body, DELETE `/api/T/ID/tag/NAME`."""
    check_write(caller, repo)
    if request.method == "DELETE":
        return _drop_ref(hub, repo, f"refs/tags/{unquote(rest)}")
    return _add_ref(hub, repo, f"refs/tags/{request.json['tag']}", unquote(rest))


def _add_ref(hub: HubServer, repo: Repo, ref: str, start: str) -> Answer:
    with hub.storage.lock:
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.commit_id(start)
        repo.save()
    return json_answer({})


def _drop_ref(hub: HubServer, repo: Repo, ref: str) -> Answer:
    with hub.storage.lock:
        if ref not in repo.refs:
            raise revision_not_found(ref)
        if ref == "refs/heads/main":
            raise Refusal(403, "Cannot delete the default branch")
        del repo.refs[ref]
        repo.save()
    return json_answer({})


def settings(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """PUT `/api/T/ID/settings`: visibility and gating."""
    check_write(caller, repo)
    wanted = request.json
    with hub.storage.lock:
        if "visibility" in wanted:
            repo.private = wanted["visibility"] == "private"
        if "private" in wanted:
            repo.private = bool(wanted["private"])
        if "gated" in wanted:
            repo.gated = wanted["gated"]
        repo.save()
    return json_answer({"private": repo.private, "gated": repo.gated})


def auth_check(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET `/api/T/ID/auth-check[/write]`."""
    check_files(caller, repo)
    if rest == "write":
        check_write(caller, repo)
    return json_answer({})
