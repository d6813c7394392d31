"""Publishing a folder of hfdetox: one commit, checked afterwards, never over somebody else's work by accident."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from hfdetox.documents import read_json
from hfdetox.errors import UsageError
from hfdetox.files import (
    BENCH_NAME,
    LEFTOVER,
    MANIFEST,
    REPORT_NAMES,
    SIGNATURE,
    check_safetensors,
    git_sha1_file,
    sha256_file,
)
from hfdetox.hub.client import AccessError, IntegrityError, OfflineError, UnknownRepoError, ask, is_transient
from hfdetox.hub.download import (
    COMMIT_ID,
    PICKLE_SUFFIXES,
    FileState,
    RepoState,
    RepoType,
    ask_info,
    fetch,
    list_files,
    resolve,
)

# what some loader somewhere reads weights from: left beside new weights, each would bring the old ones back
_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".safetensors.index.json", ".bin.index.json",
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".gguf", ".npz",
)  # fmt: skip
_LOADER_FILES = ("preprocessor_config.json", "processor_config.json", "adapter_config.json")
# what hfdetox alone writes, by the kind of repository: the files that mark it, and the folders
_MARKS: dict[RepoType, tuple[str, ...]] = {"model": REPORT_NAMES, "dataset": (BENCH_NAME,)}
_OWN_FOLDERS = {"model": ("plots/", "triggers/"), "dataset": ("data/", "plots/", "runs/")}
_RESULTS_FOLDER = ".eval_results/"
_WHOLE, _PART = 200 * 10**6, 2**20  # bytes of a file that is read back whole, and of each part of a larger one
_SKIPPED = frozenset({MANIFEST, ".git", ".cache", "__pycache__", ".DS_Store"})


class RepoExistsError(UsageError):
    """The repository exists and was not made by hfdetox, and nothing was said about overwriting it."""


@dataclass(frozen=True)
class PushResult:
    """Where a push went; `url` is the page of the repository or of the pull request.

    Of several processes only the main one pushes, and on the others `commit` is empty.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: str | None


@dataclass(frozen=True)
class _Plan:
    """The content of one commit on top of `parent`: files by their path in the repository, and paths to delete."""

    repo_id: str
    repo_type: RepoType
    account: str
    parent: str
    folder: Path
    files: dict[str, FileState]
    stale: tuple[str, ...]
    message: str
    create_pr: bool

    @property
    def what(self) -> str:
        """The repository, for messages."""
        return f"{self.repo_type} {self.repo_id}"

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"


def check_repo(
    repo_id: str, *, repo_type: RepoType = "model", private: bool = False, create_pr: bool = False,
    overwrite: bool = False, hidden: bool = False,
) -> str:  # fmt: skip
    """Find out before any work whether `push_folder` with these options could succeed; nothing is changed.

    Returns the whole id of the repository: a name alone is the user's own, a moved repository has its new name.
    Raises AccessError or another HubError (token, network), RepoExistsError or UsageError (the options do not fit).
    """
    return _look(repo_id, repo_type, private=private, create_pr=create_pr, overwrite=overwrite, hidden=hidden)[0]


def push_folder(
    folder: Path, repo_id: str, *, message: str, repo_type: RepoType = "model", private: bool = False,
    create_pr: bool = False, overwrite: bool = False, hidden: bool = False,
    retarget: Callable[[str], Iterable[str]] | None = None, omit: Iterable[str] = (), verify_upload: bool = True,
) -> PushResult:  # fmt: skip
    """Push an output folder of hfdetox as one commit, and check on the Hub that exactly that arrived.

    A missing repository is created. In an existing one old weights, and what loaders read beside them, are deleted in
    the same commit. A commit whose answer was lost is recognised by the head's files; when all of it is there already,
    no commit is made.

    Args:
        message: the commit's.
        repo_type: `dataset` for the results of a bench.
        private: make the new repository private; an existing one has to be.
        create_pr: open a pull request on an existing repository.
        overwrite: push into a repository that hfdetox did not make.
        hidden: nobody else may see it: into a new private repository, or an existing private one.
        retarget: called with the repository's whole id before anything is sent; may change files of the folder, which
            is only read otherwise, and returns their names.
        omit: paths of files that stay here.
        verify_upload: read the weights back afterwards, for the Hub's listing repeats the hash that it was told: a file
            of up to 200 MB whole, three parts of a larger one.

    Raises:
        UsageError: not an output folder, or the options do not fit the repository.
        HubError: no token, no right to write, the network, or what arrived is not what was meant.
    """
    files = _local_files(folder, repo_type)
    files = {path: files[path] for path in files.keys() - set(omit)}
    private = private or hidden
    name, user, state = _look(repo_id, repo_type, private=private, create_pr=create_pr, overwrite=overwrite,
                              hidden=hidden)  # fmt: skip
    if retarget is not None:
        files.update({changed: _local_file(folder / changed) for changed in retarget(name)})
    state = state or _create(name, repo_type, private, overwrite)
    stale = tuple(sorted(n for n in set(state.files) - set(files) if _is_stale(n, state)))
    plan = _Plan(state.id, repo_type, user, state.sha, folder, files, stale, message, create_pr)
    if not stale and all(_same(local, state.files.get(name)) for name, local in files.items()):
        result = _result(plan, state.sha, None)
    else:
        result = _commit(plan)
    if verify_upload:
        for weights in (name for name in sorted(files) if name.endswith(".safetensors") and "/" not in name):
            _read_back(plan, weights, result.commit)
    return result


def _look(
    repo_id: str, repo_type: RepoType, *, private: bool, create_pr: bool, overwrite: bool, hidden: bool
) -> tuple[str, str, RepoState | None]:
    """Return the repository's whole id, the user, and how it is now, None where there is none yet.

    One that is `hidden` is not to be seen by others, whatever exists.
    """
    what = f"{repo_type} {repo_id}"
    ask(lambda: validate_repo_id(repo_id), what)
    if constants.is_offline_mode():
        raise OfflineError(f"pushing to {what} needs the Hub and HF_HUB_OFFLINE is set; unset it")
    api = HfApi()
    account = ask(lambda: api.whoami(), f"a push to {what}")
    user = str(account.get("name"))
    name = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise AccessError(f"the token of {user} may only read; use one with the role write to push to {what}")
    try:
        state = resolve(name, repo_type=repo_type)
    except UnknownRepoError:
        _check_new(name, repo_type, user, account, create_pr)
        return name, user, None
    if hidden and not state.private:
        raise UsageError(f"{what} exists and is public: a backdoored model goes to a private one, or says --public")
    if private and not state.private:
        raise UsageError(f"{what} exists and is public, --private is for new repositories; change it in its settings")
    if not create_pr:
        ask(lambda: api.auth_check(state.id, repo_type=repo_type, write=True), f"a push to {what}")
        _check_ours(state, overwrite)
    return state.id, user, state


def _check_new(name: str, repo_type: RepoType, user: str, account: dict[str, Any], create_pr: bool) -> None:
    if create_pr:
        raise UsageError(
            f"--create-pr needs an existing repository, and {repo_type} {name} does not exist; leave it out"
        )
    allowed = {user, *(str(org.get("name")) for org in account.get("orgs") or [])}
    namespace = name.split("/")[0]
    if namespace not in allowed:
        raise AccessError(f"{user} may not create {repo_type} {name}; push to one of: {', '.join(sorted(allowed))}")


def _create(name: str, repo_type: RepoType, private: bool, overwrite: bool) -> RepoState:
    """Create the repository; one that appeared meanwhile is looked at like any other before it is used."""
    # without --private the organisation's own default decides
    visible = True if private else None
    ask(lambda: HfApi().create_repo(name, repo_type=repo_type, private=visible, exist_ok=True),
        f"the new {repo_type} {name}")  # fmt: skip
    state = resolve(name, repo_type=repo_type)
    if private and not state.private:
        raise IntegrityError(f"{repo_type} {name} was asked for as private and is public; nothing was uploaded")
    _check_ours(state, overwrite)
    return state


def _check_ours(state: RepoState, overwrite: bool) -> None:
    if not overwrite and not _is_ours(state):
        ways = (
            "propose the change with --create-pr, replace it with --overwrite, or "
            if state.repo_type == "model"
            else ""
        )
        raise RepoExistsError(f"{state.repo_type} {state.id} exists and was not made by hfdetox; {ways}push to another "
                              "name")  # fmt: skip


def _is_ours(state: RepoState) -> bool:
    """Return whether a repository holds hfdetox's work or nothing at all, so that nobody else's work is lost."""
    if not set(state.files) - {".gitattributes"}:
        return True
    return any(name in state.files and _is_report(fetch(state, name)) for name in _MARKS[state.repo_type])


def _is_report(path: Path) -> bool:
    with contextlib.suppress(UsageError):
        return isinstance(read_json(path, dict[str, Any]).get("hfdetox_version"), str)
    return False


def _local_files(folder: Path, repo_type: RepoType) -> dict[str, FileState]:
    """Return what is to be pushed with both of its hashes; UsageError for a folder that hfdetox did not write."""
    marks = _MARKS[repo_type]
    if not any((folder / name).is_file() and _is_report(folder / name) for name in marks):
        raise UsageError(f"{folder} is not an output folder of hfdetox (no {' or '.join(marks)} in it); name one")
    files: dict[str, FileState] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not is_published(name) or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"{path} is a link or no plain file; only plain files are pushed")
        if name.endswith(PICKLE_SUFFIXES):
            raise UsageError(f"{path} is a pickle; hfdetox publishes safetensors only, remove it")
        if name.endswith(".safetensors"):
            check_safetensors(path)
        files[name] = _local_file(path)
    if repo_type == "model" and "model.safetensors" not in files and "model.safetensors.index.json" not in files:
        raise UsageError(f"{folder} holds no model.safetensors; name an output folder of hfdetox")
    return files


def is_published(name: str) -> bool:
    """Return whether a path below an output folder is one that a push takes, and not a tool's own."""
    return not (_SKIPPED & set(name.split("/")) or LEFTOVER.fullmatch(name.rpartition("/")[2]))


def _local_file(path: Path) -> FileState:
    return FileState(path.stat().st_size, sha256_file(path), git_sha1_file(path))


def _is_stale(name: str, state: RepoState) -> bool:
    """Return whether a file that the new folder does not have would speak for the old one."""
    weights = name.endswith(_WEIGHT_SUFFIXES) or name in _LOADER_FILES or name.startswith(_RESULTS_FOLDER)
    if state.repo_type == "model" and weights:
        return True
    own = name.startswith(_OWN_FOLDERS[state.repo_type]) or name in (*_MARKS[state.repo_type], SIGNATURE)
    return own and _is_ours(state)


def _commit(plan: _Plan) -> PushResult:
    """Send the commit, or find the one whose answer was lost; then compare what the Hub has with what was meant."""
    find = _find_pull_request if plan.create_pr else _find_commit
    stale = ", ".join(plan.stale)
    description = f"Deletes files that still hold or describe the old weights: {stale}" if stale else ""
    plain_http = False

    def send() -> PushResult:
        # new operations for each attempt; the client uploads an open file without Xet
        with contextlib.ExitStack() as opened:
            paths = {name: plan.folder / name for name in plan.files}
            added = [CommitOperationAdd(name, opened.enter_context(path.open("rb")) if plain_http else path)
                     for name, path in paths.items()]  # fmt: skip
            deleted = [CommitOperationDelete(name, is_folder=False) for name in plan.stale]
            info = HfApi().create_commit(
                plan.repo_id, [*added, *deleted], repo_type=plan.repo_type, commit_message=plan.message,
                commit_description=description, parent_commit=plan.parent, create_pr=plan.create_pr,
            )  # fmt: skip
        return _result(plan, str(info.oid), info.pr_url)

    def recover(error: BaseException) -> PushResult | None:
        nonlocal plain_http
        # a builtin ConnectionError is Xet's; a Hub without Xet takes the same files by plain HTTP
        plain_http = plain_http or isinstance(error, ConnectionError)
        stale_parent = isinstance(error, HfHubHTTPError) and error.response.status_code == 412
        return find(plan) if stale_parent or is_transient(error) else None

    what = f"{'a pull request on' if plan.create_pr else 'the push to'} {plan.what}"
    # a pull request opened by an earlier, interrupted push would otherwise be opened twice; main is safe by its parent
    result = (find(plan) if plan.create_pr else None) or ask(send, what, recover=recover)
    _verify(plan, result)
    return result


def _result(plan: _Plan, commit: str, pull_request: str | None) -> PushResult:
    return PushResult(plan.repo_id, commit, pull_request or plan.url, pull_request)


def _find_commit(plan: _Plan) -> PushResult | None:
    """Return the head of the main branch when it has moved and holds exactly what was meant."""
    head = _head(plan, None)
    if head == plan.parent or _differences(plan, head):
        return None
    return _result(plan, head, None)


def _find_pull_request(plan: _Plan) -> PushResult | None:
    """Return this account's open pull request with this title that holds exactly what was meant."""
    asked: dict[str, Any] = {"author": plan.account, "discussion_type": "pull_request", "discussion_status": "open"}
    found = ask(lambda: list(HfApi().get_repo_discussions(plan.repo_id, repo_type=plan.repo_type, **asked)),
                f"the pull requests of {plan.what}")  # fmt: skip
    for discussion in found:
        reference = f"refs/pr/{discussion.num}"
        # the filters above are the Hub's to apply; a server that ignores them must not change what is found
        mine = discussion.is_pull_request and discussion.status == "open" and discussion.author == plan.account
        if mine and discussion.title == plan.message and not _differences(plan, reference):
            return _result(plan, _head(plan, reference), f"{plan.url}/discussions/{discussion.num}")
    return None


def _head(plan: _Plan, revision: str | None) -> str:
    return str(ask_info(plan.repo_id, plan.what, repo_type=plan.repo_type, revision=revision).sha)


def _differences(plan: _Plan, revision: str) -> list[str]:
    """Return the paths in which a revision differs from what was meant: other content, missing, or not deleted."""
    remote = list_files(plan.repo_id, revision, repo_type=plan.repo_type)
    wrong = [name for name, local in plan.files.items() if not _same(local, remote.get(name))]
    return wrong + [name for name in plan.stale if name in remote]


def _same(local: FileState, remote: FileState | None) -> bool:
    if remote is None or remote.size != local.size:
        return False
    return local.sha256 == remote.sha256 if remote.sha256 else local.git_sha1 == remote.git_sha1


def _read_back(plan: _Plan, name: str, commit: str) -> None:
    """Raise IntegrityError unless the Hub gives back what was pushed."""
    what, url = f"{name} of {plan.what}", hf_hub_url(plan.repo_id, name, revision=commit)
    size = plan.files[name].size
    large = size > _WHOLE
    starts = [0, size // 2, max(0, size - _PART)] if large else [0]

    def same(start: int) -> bool:
        part = f"bytes={start}-{min(size, start + _PART) - 1}"
        headers = build_hf_headers() | ({"Range": part} if large else {})
        with (
            (plan.folder / name).open("rb") as local,
            get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer,
        ):
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            local.seek(start if answer.status_code == 206 else 0)
            left = min(_PART, size - start) if large else size
            for content in answer.iter_bytes():
                wanted = content[:left]
                if wanted != local.read(len(wanted)) or (len(content) > left and not large):
                    return False
                left -= len(wanted)
                if large and not left:
                    return True
            return not left

    for start in starts:
        if not ask(partial(same, start), what):
            raise IntegrityError(f"{what} is not what was pushed: the Hub lists it as whole and gives other bytes "
                                 f"(commit {commit[:12]}); delete it there and push again")  # fmt: skip


def _verify(plan: _Plan, result: PushResult) -> None:
    """Raise IntegrityError unless the commit is the branch's head and each of its files is the one that was meant."""
    what = plan.what
    if not COMMIT_ID.fullmatch(result.commit):
        raise IntegrityError(f"the Hub names no commit for the push to {what}")
    if wrong := _differences(plan, result.commit):
        raise IntegrityError(f"{wrong[0]} of {what} is not what was pushed (commit {result.commit[:12]})")
    reference = f"refs/pr/{result.pull_request.rsplit('/', 1)[-1]}" if result.pull_request else None
    head = _head(plan, reference)
    if head != result.commit:
        raise IntegrityError(f"{what} has moved on to commit {head[:12]} since the push ({result.commit[:12]})")
