"""File contents over HTTP: /resolve on the Hub's origin, and LFS storage on another one, behind signed URLs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tests.hub_server.accounts import Caller, check_files, check_logged_in
from tests.hub_server.answers import Answer, Refusal, json_answer
from tests.hub_server.storage import Repo
from tests.hub_server.wire import Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


def resolve(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET or HEAD `/ID/resolve/REV/FILE`: the file itself, or 302 to the storage's origin for LFS files."""
    check_files(caller, repo)
    revision, _, path = rest.partition("/")
    path = unquote(path)
    commit, file = repo.file(unquote(revision), path)
    headers = {
        "X-Repo-Commit": commit.id,
        "Accept-Ranges": "bytes",
        "Access-Control-Expose-Headers": "X-Repo-Commit,X-Linked-Size,X-Linked-Etag,ETag",
    }
    if not file.lfs:
        return ranged(hub, request, file.sha256, {**headers, "ETag": f'"{file.oid}"'})
    location = signed(hub, "GET", repo, file.sha256, path.rsplit("/", 1)[-1])
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "ETag": f'"{file.oid}"'}
    return Answer(302, b"", {**headers, **linked, "Location": location})


def ranged(hub: HubServer, request: Request, sha256: str, headers: dict[str, str]) -> Answer:
    """A blob, whole or the part that the Range header names (206)."""
    path = hub.storage.blobs.path(sha256)
    size = path.stat().st_size
    headers = {"Content-Type": "application/octet-stream", **headers}
    span = request.span(size)
    if span is None:
        return Answer(200, path, headers)
    start, stop = span
    return Answer(206, path, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, start, stop)


def lfs_batch(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST `/ID.git/info/lfs/objects/batch`: where to put the objects that the repo does not have yet."""
    check_logged_in(caller)
    answers = []
    for item in request.json["objects"]:
        oid, size = item["oid"], item["size"]
        answer = {"oid": oid, "size": size}
        if not (oid in repo.lfs_objects and hub.storage.blobs.path(oid).exists()):
            answer["actions"] = {"upload": _upload_action(hub, repo, oid, size)}
        answers.append(answer)
    transfer = "multipart" if any("header" in a.get("actions", {}).get("upload", {}) for a in answers) else "basic"
    return json_answer({"transfer": transfer, "objects": answers})


def _upload_action(hub: HubServer, repo: Repo, oid: str, size: int) -> dict[str, object]:
    if hub.multipart_above is None or size <= hub.multipart_above:
        return {"href": signed(hub, "PUT", repo, oid, "object")}
    count = -(-size // hub.multipart_chunk)
    parts = {f"{n:05d}": signed(hub, "PUT", repo, oid, f"part-{n}") for n in range(1, count + 1)}
    return {
        "href": signed(hub, "POST", repo, oid, "complete"),
        "header": {"chunk_size": str(hub.multipart_chunk), **parts},
    }


def signed(hub: HubServer, method: str, repo: Repo, oid: str, name: str) -> str:
    """A URL on the storage's origin that allows this method on this object and needs no token."""
    path = f"/{repo.type}s/{quote(repo.id)}/{oid}/{quote(name)}"
    return f"{hub.storage_url}{path}?X-Signature={_signature(hub, method, path)}"


def _signature(hub: HubServer, method: str, path: str) -> str:
    return hmac.new(hub.secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()


def respond_storage(hub: HubServer, request: Request) -> Answer:
    """The storage's origin: GET and HEAD objects, PUT objects or parts, POST to put the parts together."""
    if "Authorization" in request.headers:
        # As S3 does; a client that sends its token here gives it to somebody who must not have it.
        raise Refusal(400, "Only one auth mechanism allowed: a signed URL must come without Authorization")
    method = "GET" if request.method == "HEAD" else request.method
    given = request.query.get("X-Signature", [""])[0]
    if not hmac.compare_digest(given, _signature(hub, method, request.path)):
        raise Refusal(403, "SignatureDoesNotMatch")
    kind, repo_id, oid, name = _storage_path(request.path)
    if method == "GET":
        return ranged(hub, request, oid, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
    if method == "PUT" and name.startswith("part-"):
        sha256, _ = hub.storage.blobs.add(request.chunks())
        hub.parts[oid, int(name.removeprefix("part-"))] = sha256
        return Answer(200, b"", {"ETag": f'"{sha256}"'})
    pieces = request.chunks() if method == "PUT" else _joined(hub, request, oid)
    try:
        hub.storage.blobs.add(pieces, expected=oid)
    except ValueError as error:
        raise Refusal(400, str(error)) from None
    repo = hub.storage.get(repo_id, kind)
    if repo is not None:
        with hub.storage.lock:
            repo.lfs_objects.append(oid)
    return Answer(200, b"", {"ETag": f'"{oid}"'})


def _storage_path(path: str) -> tuple[str, str, str, str]:
    kind, *names, oid, name = path.strip("/").split("/")
    return kind.removesuffix("s"), unquote("/".join(names)), oid, unquote(name)


def _joined(hub: HubServer, request: Request, oid: str) -> Iterator[bytes]:
    for part in request.json["parts"]:
        sha256 = hub.parts.pop((oid, part["partNumber"]), None)
        if sha256 is None or part["etag"].strip('"') != sha256:
            raise Refusal(400, f"InvalidPart: part {part['partNumber']} of {oid} was not uploaded")
        yield hub.storage.blobs.path(sha256).read_bytes()
