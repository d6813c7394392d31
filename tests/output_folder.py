"""An output folder as hfdetox leaves it, and what of it is on the Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hfdetox.reporting.card import build_card
from tests.hub_server.server import HubServer
from tests.written_report import SOURCE, written_report

WEIGHTS = save({"head.weight": np.arange(600, dtype=np.float32)})
OLD_WEIGHTS = save({"head.weight": np.ones(600, dtype=np.float32)})


def card_for(name: str | None) -> str:
    """Return the card of the folder in the repository `name`; None before it is pushed."""
    labels = ("plane", "car", "a `b`, mode `native`) [c]")
    return build_card(
        written_report(), source_card=SOURCE, repo_id=name, labels=labels, plots=["plots/before_after.png"]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder as hfdetox leaves it."""
    folder = tmp_path / "out"
    for name, content in {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "README.md": card_for(None).encode(),
        "detox_report.json": written_report().to_json().encode(),
        "plots/before_after.png": b"\x89PNG\0\0",
        ".eval_results/hfdetox.yaml": b"- value: 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    """Return the files of a repository, but for those of the Hub itself."""
    files = hub.files(name, revision)
    files.pop(".gitattributes")
    return files


def foreign(hub: HubServer, name: str) -> str:
    """Create a repository that hfdetox did not make; returns the commit."""
    hub.create_repo(name)
    return hub.commit(name, {
        "config.json": "{old}", "model.safetensors": OLD_WEIGHTS, "pytorch_model.bin": b"\x80\x04.",
        "onnx/model.onnx": b"onnx", "preprocessor_config.json": "{}", "notes.md": "keep me", "plots/theirs.png": b"png",
        "README.md": "# theirs",
    })  # fmt: skip
