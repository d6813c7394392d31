"""Which function answers which request of the Hub's own origin."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tests.hub_server import cards, discussions, files, info, push
from tests.hub_server.accounts import Caller, check_namespace, check_visible
from tests.hub_server.answers import Answer, Refusal, json_answer, repo_not_found
from tests.hub_server.storage import Repo
from tests.hub_server.wire import Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer

Action = Callable[["HubServer", Request, Caller, Repo, str], Answer]

# By method and first word after the repo's id; "" is the repo itself.
ACTIONS: dict[tuple[str, str], Action] = {
    ("GET", ""): info.repo_info,
    ("GET", "revision"): info.repo_info,
    ("GET", "tree"): info.tree,
    ("POST", "paths-info"): info.paths_info,
    ("GET", "commits"): info.commits,
    ("GET", "refs"): info.refs,
    ("GET", "auth-check"): push.auth_check,
    ("POST", "preupload"): push.preupload,
    ("POST", "commit"): push.commit,
    ("POST", "branch"): push.branch,
    ("DELETE", "branch"): push.branch,
    ("POST", "tag"): push.tag,
    ("DELETE", "tag"): push.tag,
    ("PUT", "settings"): push.settings,
    ("GET", "discussions"): discussions.route,
    ("POST", "discussions"): discussions.route,
}
WORDS = "|".join(sorted({*(word for _, word in ACTIONS if word), "xet-read-token", "xet-write-token"}))
# Old ids have no namespace, so that the second part of an id must not be one of the words above.
API_PATH = re.compile(
    rf"/api/(models|datasets|spaces)/([^/]+(?:/(?!(?:{WORDS})(?:/|$))[^/]+)?)(?:/({WORDS})(?:/(.*))?)?"
)
RESOLVE_PATH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/(?!resolve/)[^/]+)?)/resolve/(.+)")
COLLECTION_PATH = re.compile(r"/api/collections/([^/]+/[^/]+)(/items)?")
LFS_PATH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch")


def respond_hub(hub: HubServer, request: Request) -> Answer:
    """Answer a request to the Hub's own origin; Refusal for every error."""
    caller = hub.accounts.caller(request.headers.get("Authorization"))
    method = "GET" if request.method == "HEAD" else request.method
    fixed = FIXED.get((method, request.path.rstrip("/")))
    if fixed is not None:
        return fixed(hub, request, caller)
    if match := COLLECTION_PATH.fullmatch(request.path):
        if (method == "GET") is (match[2] is None):
            return collection(hub, request, caller, match[1], match[2])
        raise info.unknown(request)
    action, rest = None, ""
    if match := API_PATH.fullmatch(request.path):
        kind, repo_id, word, rest = match.groups()
        action = ACTIONS.get((method, word or ""))
    elif method == "GET" and (match := RESOLVE_PATH.fullmatch(request.path)):
        kind, repo_id, rest = match.groups()
        action = files.resolve
    elif method == "POST" and (match := LFS_PATH.fullmatch(request.path)):
        kind, repo_id = match.groups()
        action = files.lfs_batch
    if action is None:
        raise info.unknown(request)
    return _on_repo(hub, request, caller, kind, repo_id, action, rest or "")


def _on_repo(
    hub: HubServer, request: Request, caller: Caller, kind: str | None, quoted: str, action: Action, rest: str
) -> Answer:
    """Find the repo that the caller may see and answer, or send the client on to the new id of a moved one."""
    repo_id, repo_type = unquote(quoted), (kind or "models").removesuffix("s")
    repo = hub.storage.get(repo_id, repo_type)
    new = hub.storage.new_name(repo_id, repo_type) if repo is None else None
    if new is not None:
        check_visible(caller, hub.storage.get(new, repo_type))
        return Answer(307, b"", {"Location": request.target.replace(quoted, quote(new), 1)})
    return action(hub, request, caller, check_visible(caller, repo), rest)


def whoami(hub: HubServer, request: Request, caller: Caller) -> Answer:
    """GET `/api/whoami-v2`."""
    if caller.anonymous:
        raise Refusal(401, "Invalid username or password.")
    role = "fineGrained" if caller.role == "none" else caller.role
    return json_answer(
        {
            "type": "user",
            "id": caller.name,
            "name": caller.name,
            "fullname": caller.name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in caller.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


def create_repo(hub: HubServer, request: Request, caller: Caller) -> Answer:
    """POST `/api/repos/create`; 409 with the url in its body when the repo exists."""
    body = request.json
    namespace = body.get("organization") or caller.name
    repo_type = body.get("type") or "model"
    check_namespace(caller, namespace, f"create a {repo_type}")
    repo_id = f"{namespace}/{body['name']}"
    if not re.fullmatch(r"[\w.-]{1,96}", body["name"]):
        raise Refusal(400, f"invalid repo name: {body['name']}")
    with hub.storage.lock:
        repo = hub.storage.get(repo_id, repo_type)
        if repo is not None:
            message = f"You already created this {repo_type} repo: {repo_id}"
            raise Refusal(409, message, extra={"url": info.page_url(hub, repo, "")})
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = hub.storage.create(repo_id, repo_type, private)
    return json_answer({"url": info.page_url(hub, repo, ""), "name": repo_id, "id": repo_id})


def delete_repo(hub: HubServer, request: Request, caller: Caller) -> Answer:
    """DELETE `/api/repos/delete`."""
    body = request.json
    namespace, repo_type = body.get("organization") or caller.name, body.get("type") or "model"
    repo = check_visible(caller, hub.storage.get(f"{namespace}/{body['name']}", repo_type))
    check_namespace(caller, namespace, f"delete a {repo_type}")
    hub.storage.delete(repo.id, repo_type)
    return json_answer({})


def move_repo(hub: HubServer, request: Request, caller: Caller) -> Answer:
    """POST `/api/repos/move`."""
    body = request.json
    repo_type = body.get("type") or "model"
    repo = hub.storage.get(body["fromRepo"], repo_type)
    if repo is None:
        raise repo_not_found(caller.anonymous)
    for repo_id in (repo.id, body["toRepo"]):
        check_namespace(caller, repo_id.split("/")[0], f"move a {repo_type}")
    try:
        hub.storage.move(repo.id, body["toRepo"], repo_type)
    except ValueError as error:
        raise Refusal(409, str(error)) from None
    return json_answer({})


def validate_yaml(hub: HubServer, request: Request, caller: Caller) -> Answer:
    """POST `/api/validate-yaml`."""
    body = request.json
    errors, warnings = cards.check(body["content"], body.get("repoType") or "model")
    answer = {name: [{"message": m} for m in found] for name, found in (("errors", errors), ("warnings", warnings))}
    return json_answer(answer, status=400 if errors else 200)


def collection(hub: HubServer, request: Request, caller: Caller, slug: str, action: str | None) -> Answer:
    """GET `/api/collections/{slug}`, POST `…/items`; 404, 403 and 409 as the Hub gives them."""
    if slug not in hub.collections:
        raise Refusal(404, "Collection not found")
    items = hub.collections[slug]
    if action is not None:
        check_namespace(caller, slug.split("/")[0], "change a collection")
        item = request.json["item"]["id"]
        check_visible(caller, hub.storage.get(item, request.json["item"]["type"]))
        if item in items:
            raise Refusal(409, "Item is already in the collection")
        items.append(item)
    owner = {"name": slug.split("/")[0], "type": "user"}
    shown = [{"_id": f"{n:024x}", "id": name, "type": "model", "position": n} for n, name in enumerate(items)]
    facts = {"slug": slug, "title": slug, "owner": owner, "items": shown, "lastUpdated": "2026-01-01T00:00:00.000Z"}
    return json_answer(facts | {"position": 0, "private": False, "theme": "green", "upvotes": 0})


FIXED: dict[tuple[str, str], Callable[[HubServer, Request, Caller], Answer]] = {
    ("GET", "/api/whoami-v2"): whoami,
    ("POST", "/api/repos/create"): create_repo,
    ("DELETE", "/api/repos/delete"): delete_repo,
    ("POST", "/api/repos/move"): move_repo,
    ("POST", "/api/validate-yaml"): validate_yaml,
}
