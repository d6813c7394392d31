"""`hfdetox --install-completion` in a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# what bash does when a person presses the tab key behind the last word
TAB = """
source "$HOME/.bash_completions/hfdetox.sh"
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_hfdetox_completion hfdetox
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home where the completion is installed, and the command on its PATH."""
    home = tmp_path_factory.mktemp("home")
    command = home / "bin" / "hfdetox"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hfdetox "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    environment = {**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    install = ["bash", "-c", "hfdetox --install-completion; true"]  # a shell that stays, for it is asked which it is
    done = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return environment


def completed(environment: dict[str, str], *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", TAB, "bash", "hfdetox", *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ev"], ["evaluate"]),
        (["list", "trig"], ["triggers"]),
        (["scan", "org/model", "--thor"], ["--thorough"]),
        (["detox", "org/model", "--create"], ["--create-pr"]),
        (["org/model", "--create"], ["--create-pr"]),  # the short form
        (["org/model", "--push-to", "me/model", "--no-s"], ["--no-scan"]),
        (["--vers"], ["--version"]),
    ],
)
def test_tab(environment: dict[str, str], words: list[str], found: list[str]) -> None:
    assert completed(environment, *words) == found


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_the_first_word_is_a_command(environment: dict[str, str]) -> None:
    found = completed(environment, "")
    assert {"detox", "scan", "push"} <= set(found)
    assert all((Path(word).name, word.startswith("-")) == (word, False) for word in found)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not here")
@pytest.mark.parametrize(
    ("line", "found"),
    [("ev", "evaluate"), ("scan org/model --thor", "--thorough"), ("org/model --create", "--create-pr")],
)
def test_tab_in_fish(environment: dict[str, str], line: str, found: str) -> None:
    plain = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    script = "~/.config/fish/completions/hfdetox.fish"
    ask = f"hfdetox --install-completion >/dev/null; source {script}; complete -C 'hfdetox {line}'"
    done = subprocess.run(["fish", "-c", ask], env=plain, capture_output=True, text=True, timeout=600)
    assert [row.split("\t")[0] for row in done.stdout.splitlines()] == [found], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not here")
def test_zsh_is_told_what_fits(environment: dict[str, str]) -> None:
    """As the function asks that `--install-completion` puts into ~/.zfunc; pressing a key needs a terminal."""
    ask = ["zsh", "-f", "-c", "hfdetox --install-completion; true"]
    subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=600, check=True)
    function = (Path(environment["HOME"]) / ".zfunc" / "_hfdetox").read_text(encoding="utf-8")
    assert "_HFDETOX_COMPLETE=complete_zsh hfdetox" in function
    asking = {"_HFDETOX_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "hfdetox org/model --create"}
    done = subprocess.run(["hfdetox"], env={**environment, **asking}, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith('_arguments \'*: :(("--create-pr":')
