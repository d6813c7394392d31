"""Discussions and pull requests, as plain dictionaries kept with the repo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.hub_server.accounts import Caller, check_logged_in, check_write
from tests.hub_server.answers import Answer, Refusal, json_answer
from tests.hub_server.storage import Commit, Repo, now
from tests.hub_server.wire import Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer


def find(repo: Repo, number: int) -> dict[str, Any]:
    """The discussion with this number; Refusal 404."""
    for discussion in repo.discussions:
        if discussion["num"] == number:
            return discussion
    raise Refusal(404, f"Discussion {number} not found")


def open_new(repo: Repo, title: str, description: str, author: str, base: str | None) -> dict[str, Any]:
    """Add a discussion, a pull request when it has a `base` (the full ref it is to be merged into)."""
    discussion = {
        "num": len(repo.discussions) + 1,
        "title": title,
        "author": author,
        "createdAt": now(),
        "status": "draft" if base else "open",
        "base": base,
        "mergeCommitId": None,
        "events": [],
    }
    repo.discussions.append(discussion)
    _comment(discussion, author, description)
    return discussion


def note_commit(repo: Repo, ref: str, commit: Commit, author: str) -> None:
    """Show a commit to `refs/pr/N` among the events of pull request N."""
    if ref.startswith("refs/pr/"):
        pull = find(repo, int(ref.rsplit("/", 1)[-1]))
        pull["status"] = "open" if pull["status"] == "draft" else pull["status"]
        _event(pull, "commit", author, {"subject": commit.title, "oid": commit.id})
    repo.save()


def _event(discussion: dict[str, Any], kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    event = {
        "id": f"{discussion['num']:08d}{len(discussion['events']):016d}",
        "type": kind,
        "createdAt": now(),
        "author": {"name": author},
        "data": data,
    }
    discussion["events"].append(event)
    return event


def _comment(discussion: dict[str, Any], author: str, text: str) -> dict[str, Any]:
    return _event(discussion, "comment", author, {"edited": False, "hidden": False, "latest": {"raw": text}})


def route(hub: HubServer, request: Request, caller: Caller, repo: Repo, rest: str) -> Answer:
    """`/api/T/ID/discussions[/N[/CHANGE]]`."""
    number, _, change = rest.partition("/")
    if request.method == "GET":
        return json_answer(_details(repo, find(repo, int(number)))) if number else _listed(repo)
    check_logged_in(caller)
    body = request.json
    with hub.storage.lock:
        if not number:
            base = "refs/heads/main" if body.get("pullRequest") else None
            discussion = open_new(repo, body["title"], body.get("description", ""), caller.name, base)
            if base:
                repo.refs[f"refs/pr/{discussion['num']}"] = repo.refs[base]
            answer: dict[str, Any] = {"num": discussion["num"], "pullRequest": bool(base)}
        else:
            answer = _change(repo, find(repo, int(number)), change, body, caller)
        repo.save()
    return json_answer(answer)


def _listed(repo: Repo) -> Answer:
    keys = ("num", "title", "createdAt", "status", "isPullRequest", "author", "repo")
    rows = [{key: _details(repo, item)[key] for key in keys} for item in reversed(repo.discussions)]
    return json_answer({"discussions": rows, "count": len(rows), "start": 0})


def _details(repo: Repo, discussion: dict[str, Any]) -> dict[str, Any]:
    pull = discussion["base"] is not None
    details = {
        **{key: discussion[key] for key in ("num", "title", "createdAt", "status", "events")},
        "author": {"name": discussion["author"]},
        "isPullRequest": pull,
        "repo": {"name": repo.id, "type": repo.type},
    }
    if pull:
        details["changes"] = {"base": discussion["base"], "mergeCommitId": discussion["mergeCommitId"]}
        details["filesWithConflicts"] = []
        before, after = (set(repo.commit(ref).files.items()) for ref in (discussion["base"], _ref(discussion)))
        details["diff"] = "".join(f"diff --git a/{path} b/{path}\n" for path in sorted({p for p, _ in before ^ after}))
    return details


def _ref(discussion: dict[str, Any]) -> str:
    return f"refs/pr/{discussion['num']}"


def _change(repo: Repo, item: dict[str, Any], change: str, body: dict[str, Any], caller: Caller) -> dict[str, Any]:
    if change == "comment":
        return {"newMessage": _comment(item, caller.name, body["comment"])}
    if item["author"] != caller.name:
        check_write(caller, repo)
    if change == "status":
        item["status"] = body["status"]
        return {"newStatus": _event(item, "status-change", caller.name, {"status": body["status"]})}
    if change == "title":
        old, item["title"] = item["title"], body["title"]
        return {"newTitle": _event(item, "title-change", caller.name, {"from": old, "to": body["title"]})}
    if change == "merge" and item["base"]:
        check_write(caller, repo)
        item["mergeCommitId"] = _merge(repo, item, caller).id
        item["status"] = "merged"
        _event(item, "status-change", caller.name, {"status": "merged"})
        return {}
    raise Refusal(404, f"no such change of a discussion: {change}")


def _merge(repo: Repo, pull: dict[str, Any], caller: Caller) -> Commit:
    """Put what the pull request changed, against the commit it started from, on top of its base."""
    ours = {commit.id for commit in repo.history(pull["base"])}
    theirs = repo.history(_ref(pull))
    start = next(commit for commit in theirs if commit.id in ours)
    files = repo.commit(pull["base"]).files
    for path in {*start.files, *theirs[0].files}:
        if start.files.get(path) != theirs[0].files.get(path):
            if path in theirs[0].files:
                files[path] = theirs[0].files[path]
            else:
                files.pop(path, None)
    parents = (repo.refs[pull["base"]], theirs[0].id)
    return repo.add_commit(pull["base"], files, pull["title"], "", caller.name, parents)
