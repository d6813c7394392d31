"""What people of the Hub run: `hf detox`, an extension of its client, and a script for its Jobs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tomllib
import venv
from datetime import UTC, datetime
from pathlib import Path

import pytest

import hfdetox
from hfdetox.reporting.report import Report
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER, Made
from tests.conftest import REPOSITORY
from tests.runs.test_resume import wait_for_epoch

HF = Path(sys.executable).with_name("hf")
EXTENSION = REPOSITORY / "examples" / "hf-detox"
JOB = REPOSITORY / "examples" / "jobs" / "detox_job.py"


def runs_python_extensions() -> bool:
    """Whether the installed client has extensions in Python; the first ones with extensions had binaries only."""
    if importlib.util.find_spec("huggingface_hub.cli.extensions") is None:
        return False
    return hasattr(importlib.import_module("huggingface_hub.cli.extensions"), "_install_python_extension")


extensions = pytest.mark.skipif(not runs_python_extensions(), reason="this hf has no extensions in Python")


def hf(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed client with a home of its own."""
    code = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=600,
        env={**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the extension is installed as the client does it: but from the folder, not from GitHub."""
    home = tmp_path_factory.mktemp("home")
    place = home / ".local" / "share" / "hf" / "extensions" / "hf-detox"
    venv.create(place / "venv", symlinks=True)
    [site] = (place / "venv").glob("lib/python*/site-packages")
    # what the client would install beside it is what this Python has
    (site / "here.pth").write_text("\n".join([str(REPOSITORY), *filter(os.path.isdir, sys.path)]), encoding="utf-8")
    source = home / "hf-detox"
    source.mkdir()
    for path in EXTENSION.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", str(source)]
    done = subprocess.run([place / "venv" / "bin" / "python", *install], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    manifest = {
        "owner": "me", "repo": "hf-detox", "repo_id": "me/hf-detox", "short_name": "detox", "type": "python",
        "executable_path": str(place / "venv" / "bin" / "hf-detox"), "installed_at": datetime.now(UTC).isoformat(),
        **json.loads((EXTENSION / "manifest.json").read_text(encoding="utf-8")),
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return home


def test_the_extension_starts_what_the_package_starts() -> None:
    """The script of the package answers Ctrl-C while the libraries are imported; the command line alone does not."""
    package, extension = (tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
                          for folder in (REPOSITORY, EXTENSION))  # fmt: skip
    assert extension == {"hf-detox": package["hfdetox"]}


@extensions
def test_hf_detox_is_hfdetox(home: Path) -> None:
    listed = hf(home, "extensions", "list")
    assert "hf detox" in listed.stdout, listed.stderr
    done = hf(home, "detox", "--version")
    assert (done.returncode, done.stdout) == (0, f"hfdetox {hfdetox.__version__}\n"), done.stderr
    refused = hf(home, "detox", "nowhere/at-all", "--samples", "0")
    assert refused.returncode == 2
    assert "--samples 0 leaves no images" in refused.stderr


def test_the_job_says_what_it_needs() -> None:
    header = pytest.importorskip("huggingface_hub.cli._uv_script_header", reason="this hf reads no [tool.hf-jobs]")
    found = header.parse_uv_script_header(JOB.read_text(encoding="utf-8"))
    assert (found.flavor, found.timeout, found.secrets) == ("t4-small", "2h", ["HF_TOKEN"])


def test_the_client_reads_the_job(hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub.cli._uv_script_header", reason="this hf reads no [tool.hf-jobs]")
    done = hf(tmp_path, "jobs", "uv", "run", "--dry-run", str(JOB), "org/model", HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    assert "t4-small" in done.stdout + done.stderr


def job(*words: str) -> list[str]:
    return [sys.executable, str(JOB), *words]


def test_a_later_attempt_publishes_as_the_first_was_told(tmp_path: Path) -> None:
    """Every option that says how to publish is said anew, when a run is resumed and when only the push is left."""
    spec = importlib.util.spec_from_file_location("detox_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    how = ["--private", "--create-pr", "--overwrite", "--accept-accuracy-loss", "--publish-images",
           "--no-verify-upload"]  # fmt: skip
    words = ["org/net", "--dataset", "org/images", *how, "--push-to", "me/net", "--runs", str(tmp_path)]
    output = tmp_path / "net-detoxed"
    assert module.command(words) == [
        "org/net", "--dataset", "org/images", *how, "--output", str(output), "--push-to", "me/net",
    ]  # fmt: skip
    for made, begins in (
        (tmp_path / "net-detoxed.run" / "run.json", ["--resume", f"{output}.run", "--push-to", "me/net"]),
        (output / "detox_report.json", ["push", str(output), "me/net"]),
    ):
        made.parent.mkdir()
        made.touch()
        assert module.command(words) == [*begins, *how]


def test_an_attempt_goes_on_where_one_died_and_pushes(hub, repo_name, fresh_env, tmp_path_factory, tmp_path) -> None:
    made: Made = backdoored.made(tmp_path_factory)
    name, runs = repo_name(), tmp_path / "runs"
    runs.mkdir()
    words = [str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "100", "--no-scan",
             "--trigger", TRIGGER, "--target", TARGET, "--precision", "no", "--runs", str(runs), "--push-to", name,
             "--private", *backdoored.settings(epochs=30, batch_size=50)]  # fmt: skip
    environment = {**fresh_env, "HF_TOKEN": hub.token, "PYTHONPATH": str(REPOSITORY)}
    output = runs / f"{made.timm.name}-detoxed"
    first = subprocess.Popen(job(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_epoch(first, output.with_name(f"{output.name}.run"), 3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = subprocess.run(job(*words), env=environment, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith(f"hfdetox --resume {output}.run --push-to {name} --private\n")
    assert hub.repo(name).private
    assert Report.load(output).output.commit == hub.head(name)
    # a third one, as after a push that failed, sends it anew and changes nothing
    head = hub.head(name)
    third = subprocess.run(job(*words), env=environment, capture_output=True, text=True, timeout=600)
    assert third.returncode == 0, third.stderr
    assert third.stdout.startswith(f"hfdetox push {output} {name} --private\n")
    assert hub.head(name) == head
