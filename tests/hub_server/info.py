"""What the Hub tells about a repo: repo_info, tree rows, commits, refs."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import yaml

from tests.hub_server.accounts import Caller
from tests.hub_server.answers import Answer, Refusal, entry_not_found, json_answer
from tests.hub_server.storage import Commit, Repo, StoredFile, lfs_pointer
from tests.hub_server.wire import Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


def card_metadata(text: str) -> dict[str, Any] | None:
    """The YAML mapping at the head of a README, None without one; yaml.YAMLError or ValueError when it is broken."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    end = next((n for n, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return None
    metadata = yaml.safe_load("\n".join(lines[1:end]))
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("the metadata must be a mapping")
    plain: dict[str, Any] | None = json.loads(json.dumps(metadata, default=str))
    return plain


def repo_info(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET `/api/T/ID` or `/api/T/ID/revision/REV`; with `expand` only the fields asked for."""
    commit = repo.commit(unquote(rest) or "main")
    fields = _fields(hub, repo, commit, request.flag("blobs"))
    wanted = request.query.get("expand", []) + request.query.get("expand[]", [])
    if wanted:
        fields = {name: value for name, value in fields.items() if name in {"_id", "id", *wanted}}
    return json_answer(fields)


def _fields(hub: HubServer, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    card = _card(hub, commit)
    fields = {
        "_id": hashlib.sha1(f"{repo.type}/{repo.created}".encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": repo.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "siblings": [_sibling(path, file, blobs) for path, file in commit.files.items()],
    }
    if card:
        fields["cardData"] = card
    if repo.type != "model":
        return fields
    fields["modelId"] = repo.id
    fields.update({name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card})
    parameters = _parameters(hub, commit)
    if parameters:
        fields["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
    results = [
        entry for path in commit.files if path.startswith(".eval_results/") for entry in _yaml(hub, commit, path)
    ]
    if results:
        fields["evalResults"] = results
    return fields


def _card(hub: HubServer, commit: Commit) -> dict[str, Any]:
    if "README.md" not in commit.files:
        return {}
    try:
        return card_metadata(hub.content(commit.files["README.md"]).decode(errors="replace")) or {}
    except (yaml.YAMLError, ValueError):
        return {}  # the Hub shows such a repo without card data


def _yaml(hub: HubServer, commit: Commit, path: str) -> list[Any]:
    try:
        value = yaml.safe_load(hub.content(commit.files[path]))
    except yaml.YAMLError:
        return []
    return json.loads(json.dumps(value, default=str)) if isinstance(value, list) else []


def _tags(card: dict[str, Any]) -> list[str]:
    def listed(name: str) -> list[Any]:
        value = card.get(name) or []
        return value if isinstance(value, list) else [value]

    tags = [*listed("library_name"), *listed("tags"), *listed("pipeline_tag")]
    tags += [f"{label}:{v}" for name, label in _TAG_PREFIXES.items() for v in listed(name)]
    return list(dict.fromkeys(str(tag) for tag in tags))


_TAG_PREFIXES = {"datasets": "dataset", "base_model": "base_model", "license": "license"}


def _sibling(path: str, file: StoredFile, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    sibling = {"rfilename": path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        pointer = len(lfs_pointer(file.sha256, file.size))
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer}
    return sibling


def _parameters(hub: HubServer, commit: Commit) -> dict[str, int]:
    """Number of parameters by dtype in the repo's model*.safetensors, none when one of them is broken."""
    counts: dict[str, int] = {}
    for path, file in commit.files.items():
        if not (path.startswith("model") and path.endswith(".safetensors")):
            continue
        with hub.storage.blobs.path(file.sha256).open("rb") as blob:
            length = int.from_bytes(blob.read(8), "little")
            try:
                header = json.loads(blob.read(length)) if length < file.size else None
            except ValueError:
                header = None
        if not isinstance(header, dict):
            return {}
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + size
    return counts


def file_row(path: str, file: StoredFile) -> dict[str, Any]:
    """A file as tree and paths-info list it."""
    row: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        pointer = len(lfs_pointer(file.sha256, file.size))
        row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer}
    return row


def rows_of(repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """All files and folders of a commit by path, with the last commit that changed each when expanded."""
    rows = {path: file_row(path, file) for path, file in commit.files.items()}
    for path in commit.files:
        for end in (n for n, letter in enumerate(path) if letter == "/"):
            inside = sorted(f"{p}:{f.oid}" for p, f in commit.files.items() if p.startswith(path[: end + 1]))
            oid = hashlib.sha1("\n".join(inside).encode()).hexdigest()
            rows[path[:end]] = {"type": "directory", "oid": oid, "size": 0, "path": path[:end]}
    if expand:
        history = repo.history(commit.id)
        for path, row in rows.items():
            last = _last_change(history, path)
            row["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
            if row["type"] == "file":
                row["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return rows


def _last_change(history: list[Commit], path: str) -> Commit:
    def content(commit: Commit) -> dict[str, StoredFile]:
        return {p: f for p, f in commit.files.items() if p == path or p.startswith(f"{path}/")}

    for newer, older in itertools.pairwise(history):
        if content(newer) != content(older):
            return newer
    return history[-1]


def tree(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET `/api/T/ID/tree/REV[/PATH]`: the rows below a folder, page by page; 404 for a file or a missing folder."""
    revision, _, folder = rest.partition("/")
    folder = unquote(folder).strip("/")
    commit = repo.commit(unquote(revision))
    rows = rows_of(repo, commit, request.flag("expand"))
    if folder and rows.get(folder, {}).get("type") != "directory":
        raise entry_not_found(folder)
    start = f"{folder}/" if folder else ""
    found = [
        row
        for path, row in sorted(rows.items())
        if path.startswith(start) and (request.flag("recursive") or "/" not in path[len(start) :])
    ]
    return paged(hub, request, found)


def paged(hub: HubServer, request: Request, rows: list[Any]) -> Answer:
    """One page of a list, with a Link header to the next."""
    first = int(request.query.get("cursor", ["0"])[-1])
    last = first + hub.page_size
    headers = {}
    if last < len(rows):
        query = "&".join(part for part in request.raw_query.split("&") if part and not part.startswith("cursor="))
        headers["Link"] = f'<{hub.url}{request.path}?{query}{"&" if query else ""}cursor={last}>; rel="next"'
    return json_answer(rows[first:last], headers=headers)


def paths_info(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """POST `/api/T/ID/paths-info/REV` (a form, or JSON): the rows of these paths; unknown ones are left out."""
    form = request.form
    rows = rows_of(repo, repo.commit(unquote(rest)), form.get("expand", [""])[-1].lower() in ("1", "true"))
    return json_answer([rows[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in rows])


def commits(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET `/api/T/ID/commits/REV`, newest first."""
    rows = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in repo.history(unquote(rest))
    ]
    return paged(hub, request, rows)


def refs(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """GET `/api/T/ID/refs`: branches and tags, with `include_prs` pull requests too."""

    def listed(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
            for ref, commit in repo.refs.items()
            if ref.startswith(prefix)
        ]

    answer = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
    if request.flag("include_prs"):
        answer["pullRequests"] = listed("refs/pr/")
    return json_answer(answer)


def page_url(hub: HubServer, repo: Repo, rest: str) -> str:
    """The page of a repo, as the Hub's answers name it."""
    prefix = "" if repo.type == "model" else f"{repo.type}s/"
    return f"{hub.url}/{prefix}{quote(repo.id)}{rest}"


def unknown(request: Request) -> Refusal:
    """404 as JSON, for everything that this server does not speak."""
    return Refusal(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")
