"""The documents are true: commands parse, Python compiles and imports, the tutorial runs, tables are of the results."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import hfdetox
from hfdetox.bench.tasks import load_suite
from hfdetox.cli.app import app, with_command
from hfdetox.defenses import parse_defense
from hfdetox.triggers import parse_triggers
from tests.benchmarks import tables
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
# a cell of a notebook is in Python too
FENCE = re.compile(r"^```(?:\{code-cell\} i(?=python3))?(\w+?)3?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    """Give the fenced blocks of one language."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found[1] == language:
            yield found[2]


def words(line: str) -> list[str] | None:
    """Return what follows `hfdetox` on a line of a shell, None where it calls something else."""
    found = shlex.split(line, comments=True)
    for place, word in enumerate(found):
        if word == "hfdetox" and (place == 0 or found[place - 1] == "-m"):
            return found[place + 1 :]
    return None


def command_lines() -> Iterator[tuple[Path, str]]:
    """Give every line of the pages that calls hfdetox: of shell blocks, and `hfdetox …` in the text."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words(line) is not None:
                    yield page, line
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        yield from ((page, line) for line in re.findall(r"`(hfdetox [^`]*)`", prose) if "…" not in line)


LINES = [pytest.param(line, id=f"{page.stem}-{i}") for i, (page, line) in enumerate(command_lines())]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' commands name: models, images, results, files."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("images", "model-detoxed", "model-detoxed.run", "backdoored", "zoo", "ZOO", "ZOO1", "ZOO2"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels.yaml").write_text("kitten: cat\n")
    for name in ("FILE", "key.pem", "author.pub"):
        (tmp_path / name).touch()
    [suite] = blocks(DOCS / "how-to" / "compare-defenses.md", "yaml")
    (tmp_path / "suite.yaml").write_text(suite)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_command_parses(line: str, reader: Path) -> None:
    arguments = words(line)
    assert arguments is not None
    name, *rest = with_command(arguments)
    if name.startswith("--") or (name == "detox" and rest[:1] == ["COMMAND"]):
        return  # an option of no command, or of any
    command = typer.main.get_command(app).commands[name]
    # the text names a command, or an argument of it, by its capital letters
    if rest in ([], ["MODEL"], ["SUITE"], ["--help"]):
        return
    values = command.make_context(name, rest).params
    if name == "detox":
        parse_defense(values["defense"], dict(item.split("=", 1) for item in values["settings"]))
    specs = [spec for spec in values.get("triggers") or () if not spec.endswith(".safetensors") and spec != "none"]
    parse_triggers(specs)


def test_commands_were_found() -> None:
    assert len(LINES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_compiles_and_its_imports_exist(page: Path) -> None:
    saved = set(re.findall(r"[Ss]ave (?:it|this) as\s+`(\w+)\.py`", page.read_text(encoding="utf-8")))
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module not in saved:
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)


def test_keywords_of_the_api_exist() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                function = getattr(hfdetox, called, None)
                if inspect.isfunction(function):
                    named = {keyword.arg for keyword in node.keywords if keyword.arg}
                    unknown = named - set(inspect.signature(function).parameters)
                    assert not unknown, f"{page.name}: {called} has no {unknown}"


def test_suites_of_the_pages_are_suites(reader: Path) -> None:
    load_suite(reader / "suite.yaml")


def test_tutorial_runs(tmp_path: Path) -> None:
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": place, "HF_HUB_OFFLINE": "1"}
    printed = ""
    for block in blocks(DOCS / "tutorial.md", "bash"):
        command = block.replace("CLONE", shlex.quote(str(REPOSITORY))).replace(
            "python ", f"{shlex.quote(sys.executable)} "
        )
        command = re.sub(r"^hfdetox ", f"{shlex.quote(sys.executable)} -m hfdetox ", command, flags=re.MULTILINE)
        done = subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        # a rejected run ends with 1, as the page says
        assert done.returncode == ("REJECTED: " in done.stdout), done.stderr
        printed += done.stdout
    rates = [float(rate) for rate in re.findall(r"attack success +(?:[\d.]+ % \S+ +)?([\d.]+) %", printed)]
    assert len(rates) == 4
    assert rates[0] >= 90
    assert max(rates[1:]) <= 10
    for block in blocks(DOCS / "tutorial.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    # the tree that the page shows
    for name in ("README.md", "detox_report.json", "model.safetensors", "plots", "triggers"):
        assert (tmp_path / "cleaned-600" / name).exists()


def test_tables_are_those_of_the_results() -> None:
    pages = [path.read_text(encoding="utf-8") for path in tables.PAGES]
    assert [tables.render(page) for page in pages] == pages, "run `make tables`"
    assert {name for page in pages for _, name, _ in tables.PLACE.findall(page)} == set(tables.TABLES)


def test_results_are_small_and_say_who_made_them() -> None:
    made = tables.read("made")
    for path in tables.RESULTS.iterdir():
        assert path.stat().st_size < (150_000 if path.suffix == ".png" else 100_000), path.name
    quoted = {path.stem for path in tables.RESULTS.glob("*.json")} - {"made"}
    assert set(made) <= quoted


def test_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_the_text_names_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:hfdetox|tests|examples|docs)/[\w/.-]+)`", text)
    # the defense that the reader writes on the page Add a defense
    missing = [name for name in named if not (REPOSITORY / name).exists() and "shrink" not in name]
    assert missing == []
