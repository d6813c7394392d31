"""What a route gives back: an answer to send, or a refusal that becomes the Hub's JSON error with its headers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """Status, headers and a body: bytes, or a file of which `start` to `stop` (exclusive) is sent."""

    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None

    @property
    def length(self) -> int:
        """Number of bytes that the body has."""
        if isinstance(self.body, bytes):
            return len(self.body)
        return (self.body.stat().st_size if self.stop is None else self.stop) - self.start


class Refusal(Exception):  # noqa: N818 -- a refusal is a regular answer here, not a failure of the server
    """An error as the Hub words it: `X-Error-Code` decides which exception the client raises."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.extra = headers or {}, extra or {}

    def answer(self) -> Answer:
        """The JSON body `{"error": message}` with the error headers (which must not hold line breaks)."""
        headers = {"X-Error-Message": " ".join(self.message.split()), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_answer({"error": self.message, **self.extra}, status=self.status, headers=headers)


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """An answer whose body is `value` as JSON."""
    body = json.dumps(value).encode()
    return Answer(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def repo_not_found(anonymous: bool) -> Refusal:
    """A missing repo and a hidden one look the same; a stranger is not told which of the two it is."""
    if anonymous:
        return Refusal(401, "Invalid username or password.", "RepoNotFound")
    return Refusal(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    """A branch, tag, pull request or commit that the repo does not have."""
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, headers: dict[str, str] | None = None) -> Refusal:
    """A file or folder that the commit does not have."""
    return Refusal(404, f"{path} does not exist", "EntryNotFound", headers)
