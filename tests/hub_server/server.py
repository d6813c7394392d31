"""A Hub-compatible HTTP server on 127.0.0.1, for tests and for trying things by hand.

python -m tests.hub_server.server --root DIR --port 8765   serves DIR (made when missing) until interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.hub_server.accounts import Accounts, Role
from tests.hub_server.faults import Faults, Logged
from tests.hub_server.files import respond_storage
from tests.hub_server.routes import respond_hub
from tests.hub_server.storage import Commit, Repo, Storage, StoredFile
from tests.hub_server.wire import Listener

USER, ORG, STRANGER = "me", "org", "stranger"


class HubServer:
    """The Hub on one free port and its LFS storage on another.

    `token` is a write token of the user `me` (member of `org`), `read_token` a read-only one of the same user,
    `stranger_token` a write token of somebody with no rights on their repos. `faults` makes requests fail, `log` holds
    the requests that came, `errors` the tracebacks of mistakes in this server (answered 500).
    Repo types are "model" (default), "dataset" and "space".
    """

    token, read_token, stranger_token = "hf_test_write_me", "hf_test_read_me", "hf_test_write_stranger"

    def __init__(self, root: Path, port: int = 0) -> None:
        self.storage = Storage(Path(root))
        self.faults = Faults()
        self.log: list[Logged] = []
        self.errors: list[str] = []
        self.secret = secrets.token_bytes(16)
        self.parts: dict[tuple[str, int], str] = {}
        self._hub = Listener("hub", port, lambda request: respond_hub(self, request), self)
        self._store = Listener("storage", 0, lambda request: respond_storage(self, request), self)
        self.url, self.storage_url = self._hub.url, self._store.url
        self.reset()

    def reset(self) -> None:
        """Forget faults and log, and make accounts and limits what they are at the start; repos stay."""
        self.faults.clear()
        self.log.clear()
        self.errors.clear()
        self.page_size = 1000
        # LFS objects of more bytes than this are uploaded in parts of `multipart_chunk` bytes; None: never.
        self.multipart_above: int | None = None
        self.multipart_chunk = 5 * 1024 * 1024
        self.accounts = Accounts()
        # the ids of the models in each collection, by its slug (OWNER/TITLE-ID)
        self.collections: dict[str, list[str]] = {}
        self.add_user(USER, self.token, "write", (ORG,))
        self.add_user(USER, self.read_token, "read", (ORG,))
        self.add_user(STRANGER, self.stranger_token)

    def start(self) -> None:
        """Begin to answer, in threads of this process."""
        self._hub.start()
        self._store.start()

    def stop(self) -> None:
        """Close both ports; the repos stay on disk."""
        self._hub.stop()
        self._store.stop()

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_user(self, name: str, token: str, role: Role = "write", orgs: tuple[str, ...] = ()) -> None:
        """Give a user a token; `role` "write", "read", or "none" (fine-grained, without any permission)."""
        self.accounts.add(name, token, role, orgs)

    def create_repo(
        self, repo_id: str, repo_type: str = "model", *, private: bool = False, gated: bool | str = False
    ) -> str:
        """Make a repo (any namespace) and return the id of its first commit, which holds a .gitattributes."""
        return self.storage.create(repo_id, repo_type, private, gated).refs["refs/heads/main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path | None],
        *,
        repo_type: str = "model",
        message: str = "Add files",
        revision: str = "main",
        author: str = USER,
        replace: bool = False,
    ) -> str:
        """Commit files by path (bytes, text, or a Path to copy; None deletes one) and return the commit id.

        A `revision` that does not exist becomes a branch of main. `replace` drops all files that were there.
        """
        repo = self.repo(repo_id, repo_type)
        with self.storage.lock:
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            base = repo.commit(ref if ref in repo.refs else "main")
            stored = {} if replace else dict(base.files)
            for path, content in files.items():
                if content is None:
                    del stored[path]
                else:
                    content = content.encode() if isinstance(content, str) else content
                    stored[path] = self.storage.blobs.store(path, content, repo_type)
            return repo.add_commit(ref, stored, message, "", author, (base.id,)).id

    def commit_folder(
        self,
        repo_id: str,
        folder: Path,
        *,
        repo_type: str = "model",
        message: str = "Add files",
        revision: str = "main",
    ) -> str:
        """Commit every file below a folder and return the commit id."""
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return self.commit(repo_id, found, repo_type=repo_type, message=message, revision=revision)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """The repo with this id; KeyError when there is none. Set its fields and call `save()` to change settings."""
        return self.storage.repos[repo_type, repo_id]

    def exists(self, repo_id: str, repo_type: str = "model") -> bool:
        """Whether there is such a repo (a moved one is not followed)."""
        return self.storage.get(repo_id, repo_type) is not None

    def head(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> str:
        """The commit id of a branch, tag or `refs/pr/N`."""
        return self.repo(repo_id, repo_type).commit_id(revision)

    def history(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The commits, newest first; `.title`, `.author`, `.parents`, and `.files` (path -> sha256, size, oid, lfs)."""
        return self.repo(repo_id, repo_type).history(revision)

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The contents of all files of a revision, by path."""
        commit = self.repo(repo_id, repo_type).commit(revision)
        return {path: self.content(file) for path, file in commit.files.items()}

    def content(self, file: StoredFile) -> bytes:
        """The content of one file of a commit."""
        return self.storage.blobs.path(file.sha256).read_bytes()

    def set_access(
        self, repo_id: str, *, repo_type: str = "model", private: bool | None = None, gated: bool | str | None = None
    ) -> None:
        """Make a repo private or public, gated or open."""
        repo = self.repo(repo_id, repo_type)
        with self.storage.lock:
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else ("auto" if gated is True else gated)
            repo.save()

    def grant(self, repo_id: str, user: str, *, repo_type: str = "model") -> None:
        """Let a user read the files of a gated repo."""
        repo = self.repo(repo_id, repo_type)
        repo.granted.append(user)
        repo.save()

    def move_repo(self, old: str, new: str, *, repo_type: str = "model") -> None:
        """Rename a repo; requests for the old id are redirected (307)."""
        self.storage.move(old, new, repo_type)

    def delete_repo(self, repo_id: str, *, repo_type: str = "model") -> None:
        """Remove a repo; KeyError when there is none."""
        self.storage.delete(repo_id, repo_type)

    def requests(self, method: str | None = None, path: str = "") -> list[Logged]:
        """The logged requests with this method whose path contains `path`."""
        return [entry for entry in list(self.log) if method in (None, entry.method) and path in entry.path]


def main() -> None:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(description="A Hub-compatible server for tests, on 127.0.0.1.")
    parser.add_argument("--root", type=Path, required=True, help="folder with the repos, made when missing")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    arguments = parser.parse_args()
    with HubServer(arguments.root, arguments.port) as server:
        print(f"export HF_ENDPOINT={server.url} HF_TOKEN={server.token} HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
