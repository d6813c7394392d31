"""docs/how-to/add-a-defense.md says what works: its files are written, its commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hfdetox.reporting.report import Report
from tests.colours import train_on_colours
from tests.conftest import REPOSITORY
from tests.plugged import install

PAGE = REPOSITORY / "docs" / "how-to" / "add-a-defense.md"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Block:
    """A block of code, and the file that the sentence before it tells to save it as."""

    language: str
    code: str
    file: str | None


def blocks() -> list[Block]:
    """Return the page's blocks of code in their order."""
    found, end = [], 0
    text = PAGE.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        named = re.findall(r"[Ss]ave (?:it|this) as\s+`([\w.]+)`", text[end : match.start()])
        found.append(Block(match[1], match[2], named[-1] if named else None))
        end = match.end()
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `my-model` and `my-images`."""
    model, images = train_on_colours(tmp_path / "made")
    work = tmp_path / "work"
    work.mkdir()
    (work / "my-model").symlink_to(model)
    (work / "my-images").symlink_to(images)
    return work


def test_the_page_works_as_it_stands(place: Path, run_cli: Cli, fresh_env: dict[str, str], tmp_path: Path) -> None:
    project, installs = tmp_path / "project", 0
    project.mkdir()
    commands: list[str] = []
    for block in blocks():
        if block.file is not None:
            (project / block.file).write_text(block.code, encoding="utf-8")
        if block.file == "clean.py":
            done = subprocess.run([sys.executable, project / "clean.py"], env=fresh_env, cwd=place, capture_output=True,
                                  text=True, timeout=600)  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert 0 <= float(done.stdout) <= 1
        elif block.language == "toml" and block.file is None:
            with (project / "pyproject.toml").open("a", encoding="utf-8") as file:
                file.write("\n" + block.code)
            text = (project / "pyproject.toml").read_text(encoding="utf-8")
            (project / "pyproject.toml").write_text(text.replace('["shrink"]', '["shrink", "negative"]'))
        elif block.language == "console":
            for command in re.findall(r"^\$ (.*)$", block.code, flags=re.MULTILINE):
                commands.append(command)
                if command == "pip install .":
                    installs += 1
                    site = install(project, tmp_path / f"site{installs}")
                    continue
                program, *arguments = shlex.split(command)
                assert program == "hfdetox"
                environment = {**fresh_env, "PYTHONPATH": os.pathsep.join([str(site), fresh_env["PYTHONPATH"]])}
                done = run_cli(arguments, env=environment, cwd=place)
                # this model is too small for the attack to be sure of success, or to keep its accuracy
                lost = arguments[0] == "attack" or "warning: the model is rejected: " in done.stderr
                assert done.returncode == 0 or (lost and done.returncode == 1), done.stderr
                if arguments == ["list", "defenses"]:
                    assert "shrink: make every weight smaller, then fine-tune" in done.stdout
    assert len(commands) == 6
    for folder, preset, keep in (("cleaned", None, 0.9), ("cleaned-hard", None, 0.3)):
        defense = Report.load(place / folder).defense
        assert (defense.name, defense.preset, defense.parameters["keep"]) == ("shrink", preset, keep)
    assert (place / "backdoored" / "triggers" / "negative.safetensors").is_file()


def test_what_the_page_says_of_the_repository_is_so() -> None:
    paths = set(re.findall(r"`((?:hfdetox|tests|examples)/[\w./]+)`", PAGE.read_text(encoding="utf-8")))
    new = {"hfdetox/defenses/shrink.py", "tests/defenses/test_shrink.py"}
    assert new < paths
    assert [path for path in sorted(paths - new) if not (REPOSITORY / path).exists()] == []
