"""Users, their organisations and tokens, and who may do what with a repo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.hub_server.answers import Refusal, repo_not_found
from tests.hub_server.storage import Repo

Role = Literal["write", "read", "none"]


@dataclass(frozen=True)
class Caller:
    """Who asks. `role` is that of the token: "none" is a fine-grained token without any permission."""

    name: str = ""
    role: Role = "none"
    orgs: tuple[str, ...] = ()

    @property
    def anonymous(self) -> bool:
        """Whether no token came with the request."""
        return not self.name

    def member_of(self, namespace: str) -> bool:
        """Whether the namespace is the caller's own or one of the organisations."""
        return not self.anonymous and namespace in (self.name, *self.orgs)


class Accounts:
    """The callers by token, and the permission rules."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}

    def add(self, name: str, token: str, role: Role = "write", orgs: tuple[str, ...] = ()) -> None:
        """Give the user `name` (made when new) one more token with this role."""
        self._callers[token] = Caller(name, role, tuple(orgs))

    def remove(self, token: str) -> None:
        """Revoke a token; KeyError when there is none."""
        del self._callers[token]

    def caller(self, authorization: str | None) -> Caller:
        """Who the Authorization header belongs to; Refusal 401 when it belongs to nobody."""
        if authorization is None:
            return Caller()
        token = authorization.removeprefix("Bearer ")
        if token not in self._callers:
            # The Hub sends no code here, and this very message.
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self._callers[token]


def check_visible(caller: Caller, repo: Repo | None) -> Repo:
    """The repo, when the caller may know that it exists; Refusal RepoNotFound."""
    if repo is None or (repo.private and not (caller.member_of(repo.namespace) and caller.role != "none")):
        raise repo_not_found(caller.anonymous)
    if repo.disabled:
        raise Refusal(403, "Access to this resource is disabled.")
    return repo


def check_files(caller: Caller, repo: Repo) -> None:
    """Refusal GatedRepo unless the caller may read the files of a gated repo."""
    if not repo.gated:
        return
    restricted = f"Access to {repo.type} {repo.id} is restricted"
    if caller.anonymous:
        message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
        raise Refusal(401, message, "GatedRepo")
    if caller.role == "none" or not (caller.member_of(repo.namespace) or caller.name in repo.granted):
        raise Refusal(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")


def check_logged_in(caller: Caller) -> None:
    """Refusal 401 for anonymous requests, 403 for tokens that cannot write."""
    if caller.anonymous:
        raise Refusal(401, "Invalid username or password.")
    if caller.role != "write":
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")


def check_namespace(caller: Caller, namespace: str, what: str) -> None:
    """Refusal unless the caller may create or change things of the namespace."""
    check_logged_in(caller)
    if not caller.member_of(namespace):
        raise Refusal(403, f'Forbidden: you do not have the rights to {what} under the namespace "{namespace}"')


def check_write(caller: Caller, repo: Repo) -> None:
    """Refusal unless the caller may push to the repo's branches."""
    check_logged_in(caller)
    if not caller.member_of(repo.namespace):
        raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
