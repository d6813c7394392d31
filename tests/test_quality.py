"""The lint rules that guard against untrusted files do bite."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def codes(source: str, path: str) -> list[str]:
    """Return the codes of what ruff finds in `source`, as if it stood at `path` in the repository."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", f"--stdin-filename={path}", "-"]
    done = subprocess.run(command, cwd=REPOSITORY, input=source, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith(path)]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('import torch\n\nweights = torch.load("model.pt")\n', "TID251"),
        ("from torch import load\n\nweights = load\n", "TID251"),
        ('import torch\n\ntorch.save({}, "model.pt")\n', "TID251"),
        ("import pickle\n\nload = pickle.load\n", "TID251"),
        ("from pickle import loads\n\nload = loads\n", "TID251"),
        ("import cloudpickle\n\nload = cloudpickle.load\n", "TID251"),
        ('print("accuracy")\n', "T201"),
        ("try:\n    x = 1\nexcept Exception:\n    x = 2\n", "BLE001"),
        ("# y = 2 * x\nx = 1\n", "ERA001"),
    ],
)
def test_banned_code_is_found(source: str, code: str) -> None:
    assert code in codes(source, "hfdetox/new.py")


def test_bans_on_unpickling_hold_for_tests_and_examples_too() -> None:
    source = 'import torch\n\nweights = torch.load("model.pt")\nprint(weights)\n'
    assert codes(source, "examples/new.py") == ["TID251"]
    assert codes(source, "tests/new.py") == ["TID251"]


def test_harmless_code_passes() -> None:
    assert codes("import torch\n\nzero = torch.zeros(1)\n", "hfdetox/new.py") == []
