"""Reading from the Hub: which commit a name stands for now, and files that are what the Hub says they are.

The commit is asked of the Hub before any file, so that a cached copy never stands in for a repository that is gone,
gated or moved; no client library checks content, so every pulled file is hashed here, a cached one too.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id

from hfdetox.documents import read_json
from hfdetox.errors import RunError, UsageError, located, one_line
from hfdetox.files import check_safetensors, git_sha1_file, sha256_file, write_atomically
from hfdetox.hub.client import IntegrityError, OfflineError, UnknownRepoError, UnreachableError, ask, not_cached
from hfdetox.values import read

RepoType = Literal["model", "dataset"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SIDE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE*", "NOTICE*",
    "correction.safetensors",
)  # fmt: skip
ADAPTER = "adapter_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class PickleOnlyError(UsageError):
    """The repository holds weights only as pickles, which can run code when they are read."""


@dataclass(frozen=True)
class FileState:
    """One file at one commit; `sha256` is known for large (LFS) files, `git_sha1` is that of the pointer then.

    Offline both come from the cache's own names: `git_sha1` is then empty for a large file.
    """

    size: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class RepoState:
    """What a name stood for when the Hub was asked: `id` follows a renamed repository, `sha` is the commit."""

    id: str
    sha: str
    files: dict[str, FileState]
    repo_type: RepoType = "model"
    private: bool = False
    offline: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PulledRepo:
    """A model's files on disk: `weights` maps each weight file's name to its SHA-256, verified; `size` is their bytes.

    `folder` is the cache's snapshot; it may hold files that other programs cached and hfdetox did not check.
    """

    id: str
    revision: str
    folder: Path
    weights: dict[str, str]
    warnings: tuple[str, ...] = ()
    size: int = 0


def resolve(repo_id: str, *, repo_type: RepoType = "model", revision: str | None = None) -> RepoState:
    """Ask the Hub which commit `revision` (a branch, tag or commit; default the main branch) stands for now.

    With HF_HUB_OFFLINE=1 the cached commit is taken, with a warning that nobody checked whether it is current.
    Raises UnknownRepoError, AccessError, UnreachableError or OfflineError (all HubError); UsageError for a bad id.
    """
    what = f"{repo_type} {repo_id}" + (f" at {revision}" if revision else "")
    ask(lambda: validate_repo_id(repo_id), what)
    if constants.is_offline_mode():
        return _resolve_offline(repo_id, repo_type, revision, what)
    info = ask_info(repo_id, what, repo_type=repo_type, revision=revision)
    name, sha = str(info.id), str(info.sha)
    ask(lambda: validate_repo_id(name), what)
    if not COMMIT_ID.fullmatch(sha):
        raise UnreachableError(f"{constants.ENDPOINT} names no commit for {what}; check HF_ENDPOINT")
    if info.gated:
        # the facts about a gated repository are public, so that they say nothing about access to its cached files
        ask(lambda: HfApi().auth_check(name, repo_type=repo_type), what)
    files = list_files(name, sha, repo_type=repo_type)
    _remember(name, repo_type, revision, sha)
    moved = () if name == repo_id else (f"{what} is called {name} on the Hub now; using that name",)
    return RepoState(name, sha, files, repo_type, private=bool(info.private), warnings=moved)


def pull_model(
    repo_id: str, *, revision: str | None = None, trust_remote_code: bool = False, with_weights: bool | None = True,
) -> PulledRepo:  # fmt: skip
    """Fetch a model's weights, configuration and card at one commit, each file checked against the Hub's hash.

    Python files are fetched only with `trust_remote_code`, weights only with `with_weights`; where that is None they
    have to be there, and where it is False not even that. Raises PickleOnlyError or NotSafetensorsError (UsageError)
    for a repository without readable weights, IntegrityError (HubError) for a file that is not what the Hub says it is
    (the cached copy is removed, so that the next try is fresh), and whatever `resolve` raises.
    """
    state = resolve(repo_id, revision=revision)
    weights = weight_files(state) if with_weights is not False else []
    wanted = [n for n in state.files if any(fnmatch.fnmatchcase(n, pattern) for pattern in _SIDE_FILES)]
    if trust_remote_code:
        wanted += [n for n in state.files if n.endswith(".py")]
    for name in wanted:
        fetch(state, name)
    hashes: dict[str, str] = {}
    for name in weights if with_weights else ():
        path = fetch(state, name)
        check_safetensors(path)
        hashes[name] = state.files[name].sha256 or sha256_file(path)
    folder = snapshot_folder(state.id, state.repo_type, state.sha)
    size = sum(state.files[name].size for name in weights)
    return PulledRepo(state.id, state.sha, folder, hashes, state.warnings, size)


def ask_info(
    repo_id: str, what: str, *, repo_type: RepoType = "model", revision: str | None
) -> ModelInfo | DatasetInfo:
    """Return `id`, `sha`, `private` and `gated` of a repository as they are now; raises HubError."""
    # only what is needed: the client fails on a malformed card or result file among the rest
    fields: list[Any] = ["sha", "private", "gated"]
    api, patience = HfApi(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    ask_one = api.model_info if repo_type == "model" else api.dataset_info
    return ask(lambda: ask_one(repo_id, revision=revision, timeout=patience, expand=fields), what)


def list_files(repo_id: str, revision: str, *, repo_type: RepoType = "model") -> dict[str, FileState]:
    """Return every file at a commit or branch, folders included, by its path; raises HubError."""
    what = f"{repo_type} {repo_id}"
    tree = HfApi().list_repo_tree
    rows = ask(lambda: list(tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)), what)
    return {
        _safe_name(row.path, what): FileState(row.size, row.lfs.sha256 if row.lfs else None, row.blob_id)
        for row in rows if isinstance(row, RepoFile)
    }  # fmt: skip


def fetch(state: RepoState, filename: str) -> Path:
    """Return the path of one file of a resolved repository, downloaded if need be, its hash checked in any case.

    Raises UnknownRepoError when the listing has no such file, IntegrityError when the content is not the Hub's.
    """
    what = f"{state.repo_type} {state.id}"
    expected = state.files.get(filename)
    if expected is None:
        raise UnknownRepoError(f"{what} has no file {filename} at {state.sha[:12]}")
    path = Path(ask(
        lambda: hf_hub_download(state.id, filename, repo_type=state.repo_type, revision=state.sha), what
    ))  # fmt: skip
    found, named = (sha256_file(path), expected.sha256) if expected.sha256 else (git_sha1_file(path), expected.git_sha1)
    if named and found != named:
        _forget(path)
        raise IntegrityError(f"{filename} of {what} is not what the Hub says it is (hash {found[:12]}, expected "
                             f"{named[:12]}); the damaged copy was removed from the cache, run it again")  # fmt: skip
    return path


def read_text_file(repo_id: str, filename: str, revision: str, repo_type: RepoType = "model") -> str | None:
    """Return a small text file (a card, an eval.yaml) at `revision`, or None when the repository has none there.

    A revision that is not a commit id is asked of the Hub first. Offline, a file that is not cached reads as None.
    Raises what `resolve` raises.
    """
    if not COMMIT_ID.fullmatch(revision):
        revision = resolve(repo_id, repo_type=repo_type, revision=revision).sha

    def read() -> str | None:
        try:
            path = hf_hub_download(repo_id, _safe_name(filename, repo_id), repo_type=repo_type, revision=revision)
        except LocalEntryNotFoundError:
            if not constants.is_offline_mode():
                raise
            return None
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")

    return ask(read, f"{filename} of {repo_type} {repo_id}")


def weight_files(state: RepoState) -> list[str]:
    """Return the names of the safetensors files that make up the model, the shards' index resolved.

    Raises PickleOnlyError (UsageError) when there are weights only as pickles, UsageError when there are none.
    """
    if _WEIGHTS in state.files:
        return [_WEIGHTS]
    if _INDEX in state.files:
        with located(f"model {state.id}"):
            index = read_json(fetch(state, _INDEX), dict[str, Any], "an index of safetensors files")
            shards = sorted(set(read("weight_map", dict[str, str], index.get("weight_map")).values()))
        if not shards or any(s not in state.files or not str(s).endswith(".safetensors") for s in shards):
            raise UsageError(f"{_INDEX} of model {state.id} names files that are not its own safetensors")
        return shards
    if state.offline:
        raise OfflineError(f"model {state.id} is cached without {_WEIGHTS} and HF_HUB_OFFLINE is set; unset it")
    raise no_weights(f"model {state.id}", state.files, lambda: fetch(state, ADAPTER))


def no_weights(what: str, names: Iterable[str], adapter: Callable[[], Path]) -> UsageError:
    """Return why files hold no `model.safetensors`: they are an adapter, called otherwise, in a subfolder, or pickles.

    Args:
        what: what the files are of.
        names: their paths.
        adapter: gives the adapter's configuration, if it is among them.
    """
    known = set(names)
    weights = sorted(name for name in known if name.endswith(".safetensors"))
    here, folders = ([name for name in weights if ("/" in name) is inside] for inside in (False, True))
    if ADAPTER in known:
        base = read_json(adapter(), dict[str, Any]).get("base_model_name_or_path")
        on = one_line(base, 100) if isinstance(base, str) and base else "another model"
        return UsageError(f"{what} is an adapter on {on}; merge it and save the whole model")
    if here:
        return UsageError(f"{what} has {' and '.join(here[:3])} and no {_WEIGHTS}; rename the right one to {_WEIGHTS}")
    if folders:
        place = folders[0].rpartition("/")[0]
        return UsageError(f"{what} is no model itself: its weights lie in {place}/; give a folder of what is in there")
    if pickles := sorted(name for name in known if name.endswith(PICKLE_SUFFIXES)):
        return PickleOnlyError(f"{what} has its weights only as a pickle ({pickles[0]}), which can run its author's "
                               "code when it is read; hfdetox reads safetensors only: ask the author for a "
                               "conversion")  # fmt: skip
    return UsageError(f"{what} has no {_WEIGHTS}; give the folder or id of an image classifier saved as safetensors")


def _resolve_offline(repo_id: str, repo_type: RepoType, revision: str | None, what: str) -> RepoState:
    sha = revision or ""
    if not COMMIT_ID.fullmatch(sha):
        reference = _reference(repo_id, repo_type, revision)
        sha = reference.read_text(encoding="utf-8").strip() if reference is not None and reference.is_file() else ""
    snapshot = snapshot_folder(repo_id, repo_type, sha)
    if not COMMIT_ID.fullmatch(sha) or not snapshot.is_dir():
        raise OfflineError(not_cached(what))
    files = {p.relative_to(snapshot).as_posix(): _cached_state(p) for p in sorted(snapshot.rglob("*")) if p.is_file()}
    notes = [f"offline: {what} is the cached commit {sha[:12]}; nobody checked that it is current or still allowed"]
    if not all(state.sha256 or state.git_sha1 for state in files.values()):
        notes.append(f"offline: this cache keeps no hashes (no symbolic links), so {what} is used unchecked")
    return RepoState(repo_id, sha, files, repo_type, offline=True, warnings=tuple(notes))


def _cached_state(pointer: Path) -> FileState:
    """Return what the cache's own names say of a file: blobs are called by SHA-256 (large files) or git's id."""
    blob = Path(os.readlink(pointer)).name if pointer.is_symlink() else ""
    sha256, git_sha1 = (blob if pattern.fullmatch(blob) else "" for pattern in (_SHA256, COMMIT_ID))
    return FileState(pointer.stat().st_size, sha256 or None, git_sha1)


def snapshot_folder(repo_id: str, repo_type: RepoType, sha: str) -> Path:
    """Return where the cache keeps the files of a repository at a commit."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "snapshots" / sha


def _reference(repo_id: str, repo_type: RepoType, revision: str | None) -> Path | None:
    """Return the file in which the cache keeps a branch's or tag's commit, or None for a name that is not a path."""
    try:
        name = _safe_name(revision or constants.DEFAULT_REVISION, repo_id)
    except IntegrityError:
        return None
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs" / name


def _remember(repo_id: str, repo_type: RepoType, revision: str | None, sha: str) -> None:
    """Note in the cache which commit a name stood for: the client does so only for files asked for by branch."""
    reference = _reference(repo_id, repo_type, revision)
    if revision == sha or reference is None:
        return
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(reference, sha)
    except (OSError, RunError):
        return  # a cache that cannot be written only makes a later offline run impossible


def _forget(pointer: Path) -> None:
    """Remove a cached file with every link on the way to its content, as far as they lie in the cache."""
    cache = Path(constants.HF_HUB_CACHE).resolve()
    while True:
        target = pointer.parent / os.readlink(pointer) if pointer.is_symlink() else None
        if cache in pointer.parent.resolve().parents:
            pointer.unlink(missing_ok=True)
        if target is None:
            return
        pointer = target


def _safe_name(name: str, what: str) -> str:
    """Return `name` when it stays inside a folder; the names in a listing are written by strangers."""
    parts = PurePosixPath(name).parts
    alien = "\0\\:" if os.name == "nt" else "\0"
    if not parts or name != "/".join(parts) or parts[0] == "/" or ".." in parts or set(name) & set(alien):
        raise IntegrityError(f"{what} names a file {name!r} that would leave its folder; do not use it")
    return name
