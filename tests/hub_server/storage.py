"""Repos on disk: content-addressed blobs, commits with parents, and refs, all as plain files and JSON.

ROOT/blobs/SHA256                       file contents, shared by all repos
ROOT/repos/TYPE/ID/repo.json            visibility, refs, discussions (ID with "/" written as "--")
ROOT/repos/TYPE/ID/commits/SHA1.json    parents, title, date, author and the complete list of files
ROOT/moved.json                         old "TYPE/ID" -> new ID
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.hub_server.answers import entry_not_found, revision_not_found

REPO_TYPES = ("model", "dataset", "space")
# What the Hub's default .gitattributes sends to LFS; in dataset repos media files too.
LFS_SUFFIXES = (
    ".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gz", ".h5", ".joblib", ".mlmodel", ".model", ".msgpack", ".npy",
    ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors", ".tar",
    ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst",
)  # fmt: skip
MEDIA_SUFFIXES = (".bmp", ".gif", ".png", ".tiff", ".jpg", ".jpeg", ".webp", ".mp4", ".webm", ".wav", ".mp3", ".flac")
LFS_THRESHOLD = 10 * 1024 * 1024


def now() -> str:
    """The time in UTC as the Hub writes it (ISO 8601 with milliseconds and Z)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_sha1(content: bytes) -> str:
    """The id that git gives to a blob with this content (40 hex)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wants_lfs(path: str, size: int, sample: bytes, repo_type: str) -> bool:
    """Whether the Hub stores such a file in LFS: by its name, its size, or because it is binary; never when empty."""
    if size == 0:
        return False
    suffixes = LFS_SUFFIXES + (MEDIA_SUFFIXES if repo_type == "dataset" else ())
    return path.lower().endswith(suffixes) or size > LFS_THRESHOLD or b"\0" in sample


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: its SHA-256 (name of its blob), size in bytes, git object id, and whether LFS holds it."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        """The SHA-256 of an LFS file, the git id of a regular one."""
        return self.sha256 if self.lfs else self.oid


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_file(sha256: str, size: int) -> StoredFile:
    """A file in LFS; its git id is that of the pointer."""
    return StoredFile(sha256, size, git_sha1(lfs_pointer(sha256, size)), True)


class Blobs:
    """File contents under the name of their SHA-256; written beside the target and renamed, so never half there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob with this SHA-256 lies (or would lie)."""
        return self.folder / sha256

    def add(self, chunks: Iterator[bytes], expected: str | None = None) -> tuple[str, int]:
        """Store the content and return (sha256, size); ValueError when it is not the `expected` SHA-256."""
        digest, size = hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += file.write(chunk)
            if expected is not None and digest.hexdigest() != expected:
                raise ValueError(f"content has SHA-256 {digest.hexdigest()}, not {expected}")
            os.replace(name, self.path(digest.hexdigest()))
        finally:
            Path(name).unlink(missing_ok=True)
        return digest.hexdigest(), size

    def store(self, path: str, content: bytes | Path, repo_type: str) -> StoredFile:
        """Store one file as the Hub would: LFS or regular by its name, size and content."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                sample = file.read(512)
                file.seek(0)
                sha256, size = self.add(iter(lambda: file.read(1 << 20), b""))
        else:
            sample = content[:512]
            sha256, size = self.add(iter([content]))
        if wants_lfs(path, size, sample, repo_type):
            return lfs_file(sha256, size)
        return self.regular(sha256, size)

    def regular(self, sha256: str, size: int) -> StoredFile:
        """A blob that is there, as a file that git itself holds."""
        return StoredFile(sha256, size, git_sha1(self.path(sha256).read_bytes()), False)


@dataclass(frozen=True)
class Commit:
    """One commit with the complete list of its files, by path."""

    id: str
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """One repo: its settings, its refs (`refs/heads/main` -> commit id), its discussions and its commits on disk."""

    folder: Path
    id: str
    type: str
    private: bool = False
    gated: str | bool = False
    disabled: bool = False
    granted: list[str] = field(default_factory=list)
    created: str = field(default_factory=now)
    refs: dict[str, str] = field(default_factory=dict)
    lfs_objects: list[str] = field(default_factory=list)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        """The user or organisation that owns the repo ("" for the old ids without one)."""
        return self.id.split("/")[0] if "/" in self.id else ""

    def save(self) -> None:
        """Write the settings to disk, complete or not at all."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        target = self.folder / "repo.json"
        target.with_suffix(".new").write_text(json.dumps(values))
        os.replace(target.with_suffix(".new"), target)

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request, or None."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def commit_id(self, revision: str) -> str:
        """The commit that a branch, tag, `refs/pr/N` or (abbreviated) commit id means; Refusal RevisionNotFound."""
        name = self.ref(revision)
        if name is not None:
            return self.refs[name]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = list((self.folder / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise revision_not_found(revision)

    def commit(self, revision: str) -> Commit:
        """The commit with its files; Refusal RevisionNotFound."""
        values = json.loads((self.folder / "commits" / f"{self.commit_id(revision)}.json").read_text())
        files = {path: StoredFile(**file) for path, file in values.pop("files").items()}
        return Commit(**{**values, "parents": tuple(values["parents"])}, files=files)

    def history(self, revision: str) -> list[Commit]:
        """The commit and its first parents, newest first."""
        commits = [self.commit(revision)]
        while commits[-1].parents:
            commits.append(self.commit(commits[-1].parents[0]))
        return commits

    def file(self, revision: str, path: str) -> tuple[Commit, StoredFile]:
        """The commit and one of its files; Refusal EntryNotFound, which names the commit so that clients cache it."""
        commit = self.commit(revision)
        if path not in commit.files:
            raise entry_not_found(path, {"X-Repo-Commit": commit.id})
        return commit, commit.files[path]

    def add_commit(
        self, ref: str, files: dict[str, StoredFile], title: str, message: str, author: str, parents: tuple[str, ...]
    ) -> Commit:
        """Write a commit and move `ref` to it. Two equal commits still get different ids (as with git's dates)."""
        values = {
            "parents": parents, "title": title, "message": message, "author": author, "date": now(),
            "files": {path: asdict(file) for path, file in sorted(files.items())},
        }  # fmt: skip
        commit_id = hashlib.sha1(json.dumps(values).encode() + os.urandom(16)).hexdigest()
        folder = self.folder / "commits"
        folder.mkdir(exist_ok=True)
        (folder / f"{commit_id}.json").write_text(json.dumps({"id": commit_id, **values}))
        self.refs[ref] = commit_id
        self.lfs_objects = sorted({*self.lfs_objects, *(file.sha256 for file in files.values() if file.lfs)})
        self.save()
        return self.commit(commit_id)


class Storage:
    """All repos of a server. `lock` must be held while something is changed; reading needs none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root / "blobs")
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[str, str] = {}
        for file in sorted((root / "repos").glob("*/*/repo.json")):
            repo = Repo(folder=file.parent, **json.loads(file.read_text()))
            self.repos[repo.type, repo.id] = repo
        if (root / "moved.json").exists():
            self.moved = json.loads((root / "moved.json").read_text())

    def create(self, repo_id: str, repo_type: str, private: bool = False, gated: str | bool = False) -> Repo:
        """Make a repo with the Hub's first commit, a .gitattributes; ValueError when it exists."""
        with self.lock:
            if repo_type not in REPO_TYPES or (repo_type, repo_id) in self.repos:
                raise ValueError(f"cannot create the {repo_type} {repo_id}: it exists or there is no such type")
            folder = self._folder(repo_id, repo_type)
            folder.mkdir(parents=True)
            repo = Repo(folder, repo_id, repo_type, private, "auto" if gated is True else gated)
            self.repos[repo_type, repo_id] = repo
            self.moved.pop(f"{repo_type}/{repo_id}", None)
            suffixes = LFS_SUFFIXES + (MEDIA_SUFFIXES if repo_type == "dataset" else ())
            text = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in suffixes)
            file = self.blobs.store(".gitattributes", text.encode(), repo_type)
            repo.add_commit("refs/heads/main", {".gitattributes": file}, "initial commit", "", "system", ())
            return repo

    def get(self, repo_id: str, repo_type: str) -> Repo | None:
        """The repo with this very id (moved ones are not followed), or None."""
        return self.repos.get((repo_type, repo_id))

    def new_name(self, repo_id: str, repo_type: str) -> str | None:
        """The id that a moved repo has now, or None."""
        name = self.moved.get(f"{repo_type}/{repo_id}")
        return self.new_name(name, repo_type) or name if name else None

    def move(self, old: str, new: str, repo_type: str) -> None:
        """Rename a repo; the old id is remembered. KeyError when it does not exist, ValueError when `new` does."""
        with self.lock:
            repo = self.repos[repo_type, old]
            if (repo_type, new) in self.repos:
                raise ValueError(f"{new} exists")
            folder = self._folder(new, repo_type)
            shutil.move(repo.folder, folder)
            del self.repos[repo_type, old]
            repo.folder, repo.id = folder, new
            repo.save()
            self.repos[repo_type, new] = repo
            self.moved.pop(f"{repo_type}/{new}", None)
            self.moved[f"{repo_type}/{old}"] = new
            (self.root / "moved.json").write_text(json.dumps(self.moved))

    def delete(self, repo_id: str, repo_type: str) -> None:
        """Remove a repo (blobs stay, others may share them); KeyError when it does not exist."""
        with self.lock:
            shutil.rmtree(self.repos.pop((repo_type, repo_id)).folder)

    def _folder(self, repo_id: str, repo_type: str) -> Path:
        return self.root / "repos" / repo_type / repo_id.replace("/", "--")
