"""The work of the Space: each job is the command hfdetox in a process of its own, with limits and without secrets."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

# whatever token the Space has is not for a visitor's work; read when the client is imported
os.environ.pop("HF_TOKEN", None)
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

from datasets import ClassLabel, Dataset, Features, Image

import hfdetox
from hfdetox.errors import one_line, refusing
from hfdetox.evidence.results import ScanReport
from hfdetox.hub.client import AccessError, UnknownRepoError
from hfdetox.hub.download import RepoState, RepoType, resolve
from hfdetox.values import read

MINUTES = float(os.environ.get("HFDETOX_SPACE_MINUTES", "10"))
MEGABYTES = int(os.environ.get("HFDETOX_SPACE_MEGABYTES", "500"))
ROOT = Path(tempfile.mkdtemp(prefix="hfdetox-space-"))
DEMO = Path(os.environ.get("HFDETOX_SPACE_DEMO", ROOT / "demo"))
# what a job gets of the Space's variables: none of its secrets
KEPT = (
    "PATH", "PYTHONPATH", "LANG", "HF_ENDPOINT", "SSL_CERT_FILE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
REPO_NAME = re.compile(rf"({HUB_ID.pattern}|[A-Za-z0-9][\w.-]*)", re.ASCII)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ELSEWHERE = "on a machine of yours there is no limit: pip install hfdetox"

atexit.register(shutil.rmtree, ROOT, ignore_errors=True)


def make_demo() -> None:
    """Make the digits and the backdoored model of `hfdetox demo`, unless they are there; it takes about a minute."""
    if DEMO.is_dir():
        return
    from hfdetox import demo

    DEMO.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=DEMO.parent))
    demo.write_digits(fresh / "digits", seed=0)
    demo.backdoored(fresh / "digits", fresh / "backdoored", seed=0)
    fresh.rename(DEMO)


def demo_words() -> list[str]:
    """Return model and images of the demo, as words of the command line."""
    return [str(DEMO / "backdoored"), "--dataset", str(DEMO / "digits"), "--samples", "600"]


def demo_trigger() -> list[str]:
    """Return the demo's own trigger, so that it is measured."""
    return ["--trigger", str(DEMO / "backdoored" / "triggers" / "badnets.safetensors")]


@contextlib.contextmanager
def job() -> Iterator[Path]:
    """Give a folder of the job's own: everything that it pulls and writes is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix="job-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def hub_words(folder: Path, model: str, dataset: str, archive: str | None, samples: int, measured: int) -> list[str]:
    """Return model and images of a visitor's job, as words of the command line, at the commits that were checked.

    Args:
        folder: of the job.
        model: a Hub id.
        dataset: a Hub id; empty: what the model's card names.
        archive: the path of a zip with images, in place of a dataset.
        samples: how many clean images.
        measured: on how many it is measured; 0: on the whole split.

    Raises:
        UsageError: no Hub ids, not for everybody, too large, or what hfdetox says of them.
    """
    found = find("model", model)
    words = [found.id, "--revision", found.sha, "--samples", str(int(samples))]
    words += ["--eval-samples", str(int(measured))] if measured else []
    if archive:
        write_images(archive, folder / "images")
        words += ["--dataset", str(folder / "images")]
    elif dataset.strip():
        words += images_of(dataset)
    plan = json.loads(run("detox", *words, "--dry-run", "--json", folder=folder))
    check_size("model", found, plan["model"]["files"])
    # a card may name anything, also a folder of this machine
    return words if "--dataset" in words else [*words, *images_of(plan["dataset"]["id"] or "")]


def images_of(dataset: str) -> list[str]:
    """Return a dataset of the Hub as words of the command line."""
    found = find("dataset", dataset)
    check_size("dataset", found)
    return ["--dataset", found.id, "--dataset-revision", found.sha]


def find(what: RepoType, name: str) -> RepoState:
    """Return what a name stands for on the Hub now; UsageError for what is no id, so that no path is opened."""
    if not HUB_ID.fullmatch(name.strip()):
        raise hfdetox.UsageError(f"the {what} must be an id of the Hub, such as org/name, not {one_line(name, 80)!r}")
    try:
        return resolve(name.strip(), repo_type=what)
    except (AccessError, UnknownRepoError) as error:
        raise hfdetox.UsageError(f"the {what} {name.strip()} is not on the Hub for everybody: check the spelling "
                                 "(private and gated ones cannot be used here)") from error  # fmt: skip


def check_size(what: str, found: RepoState, files: list[str] | None = None) -> None:
    """Raise UsageError where the files of a repository, or those of them that are used, are too large."""
    size = sum(state.size for path, state in found.files.items() if files is None or path in files)
    if size > MEGABYTES * 1e6:
        raise too_large(f"the {what} {found.id} has", size)


def too_large(what: str, size: int) -> hfdetox.UsageError:
    """Return the refusal of so many bytes."""
    return hfdetox.UsageError(f"{what} {size / 1e6:,.0f} MB, and this Space takes {MEGABYTES:,} MB; {ELSEWHERE}")


def write_images(archive: str, folder: Path) -> None:
    """Write the pictures of a zip as one parquet file; what they are called is a label at most, and never a path.

    Raises:
        UsageError: it is no zip, too large, or has no pictures in folders.
    """
    with refusing("the images are no zip that can be read"), zipfile.ZipFile(archive) as opened:
        members = {one: PurePosixPath(one.filename) for one in opened.infolist() if not one.is_dir()}
        members = {one: path for one, path in members.items() if path.suffix.lower() in PICTURES
                   and path.parent.name and "__MACOSX" not in path.parts}  # fmt: skip
        size = sum(one.file_size for one in members)
        if size > MEGABYTES * 1e6:
            raise too_large("the images have", size)
        images = [{"bytes": opened.read(one), "path": None} for one in members]
    names = sorted({path.parent.name for path in members.values()})
    if not names:
        raise hfdetox.UsageError("the zip has no pictures in folders; give one folder a class: cat/1.jpg, dog/2.jpg")
    labels = [names.index(path.parent.name) for path in members.values()]
    folder.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def scan(words: list[str], folder: Path) -> ScanReport:
    """Run `hfdetox scan`, and return what it found."""
    document: Any = json.loads(run("scan", *words, "--json", folder=folder))
    found: ScanReport = read("scan", ScanReport, document)
    return found


def clean(words: list[str], folder: Path) -> tuple[Path, str]:
    """Run `hfdetox MODEL`.

    Returns:
        The folder of the result, which outlives the job (`remove` it), and its report as one HTML page, in which
        strangers' words are words.
    """
    output, path = folder / "result", folder / "page.html"
    run("detox", *words, "--max-minutes", f"{MINUTES:g}", "--output", str(output), folder=folder, result=output)
    run("report", str(output), "--html", str(path), folder=folder)
    kept = Path(tempfile.mkdtemp(dir=ROOT, prefix="result-"))
    return output.rename(kept / output.name), path.read_text(encoding="utf-8")


def publish(result: Path | None, repo: str, *, private: bool, token: str) -> str:
    """Push a result with the token of a visitor, which the one process that pushes gets; return what it says."""
    if result is None or not result.is_dir():
        raise hfdetox.UsageError("there is no result any more; clean the model again")
    if not REPO_NAME.fullmatch(repo.strip()):
        raise hfdetox.UsageError(f"{one_line(repo, 80)!r} cannot be the name of a repository: give one such as "
                                 "my-model-detoxed")  # fmt: skip
    with job() as folder:
        how = ["--private"] if private else []
        return run("push", str(result), repo.strip(), *how, folder=folder, token=token, warned=True)


def remove(result: Path | None) -> None:
    """Remove a result that nobody waits for any more."""
    if result is not None:
        shutil.rmtree(result.parent, ignore_errors=True)


def run(*words: str, folder: Path, token: str | None = None, result: Path | None = None, warned: bool = False) -> str:
    """Run one command of hfdetox, and return its standard output.

    It gets an environment and a home of its own, so that it finds no token but `token`, and is killed with everything
    that it started when the time is over. No file may be larger than twice the limit.

    Args:
        words: of the command line.
        folder: of the job.
        token: what it may publish with.
        result: a folder that is written also by a run whose status is not 0: that of a model that was rejected.
        warned: return the warnings too, a line each.

    Raises:
        UsageError: the line that the command ended with.
    """
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder), "MPLBACKEND": "Agg",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    if token is not None:
        environment["HF_TOKEN"] = token
    (folder / "empty").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hfdetox", *words], env=environment, cwd=folder / "empty", text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        largest = int(2 * MEGABYTES * 1e6)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest, largest))
        printed, said = process.communicate(timeout=MINUTES * 60)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise hfdetox.RunError(f"stopped: a job may take {MINUTES:g} minutes here; {ELSEWHERE}") from None
        raise
    if process.returncode and not (result is not None and result.is_dir()):
        errors = [line.partition("error: ")[2] for line in said.splitlines() if line.startswith("hfdetox: error: ")]
        raise hfdetox.UsageError(
            errors[-1] if errors else f"hfdetox ended without a word (status {process.returncode})"
        )
    warnings = [line.partition("warning: ")[2] for line in said.splitlines() if line.startswith("hfdetox: warning: ")]
    return "\n".join([printed.strip(), *warnings]) if warned else printed
