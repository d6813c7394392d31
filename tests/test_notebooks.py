"""The notebooks run from top to bottom outside of the clone, show pictures, and need nothing that is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.test_docs import blocks

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.md"))
# what Jupyter shows of a cell is the value of its last expression
RUN = """
import ast, sys
space = {"__name__": "__main__"}
for cell in open(sys.argv[1], encoding="utf-8").read().split("\\x00"):
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    if last is not None:
        print("SHOWN", type(eval(compile(ast.Expression(last.value), "cell", "eval"), space)).__name__)
if "matplotlib.pyplot" in sys.modules:
    print("FIGURES", len(sys.modules["matplotlib.pyplot"].get_fignums()))
"""


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["clean-a-model", "without-the-trigger", "your-own-defense"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupytext_and_the_docs_take_it_for_a_notebook(path: Path) -> None:
    _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(head)
    assert settings["file_format"] == "mystnb"
    assert settings["jupytext"]["text_representation"] == {"extension": ".md", "format_name": "myst"}
    assert settings["kernelspec"]["name"] == "python3"
    assert "how-to/notebooks.md" in text
    jupytext = pytest.importorskip("jupytext")
    cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert cells == [block.rstrip("\n") for block in blocks(path, "python")]
    # nothing that was counted is written by hand
    assert not re.search(r"\d %", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.write_text("\x00".join(blocks(path, "python")), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", RUN, str(cells)], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SHOWN PngImageFile" in done.stdout or "FIGURES 1" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr
