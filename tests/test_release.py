"""What a release is made of says the same everywhere: version, changelog, workflows, hooks, citation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

import hfdetox
from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def steps(path: Any) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_the_changelog_begins_with_the_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", text, flags=re.MULTILINE)[0] == hfdetox.__version__


def test_the_version_stands_in_one_place() -> None:
    for name in ("pyproject.toml", "CITATION.cff", ".github/workflows/release.yml"):
        assert hfdetox.__version__ not in (REPOSITORY / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(path: Any) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    called = set(re.findall(r"\bmake ([\w-]+)", "\n".join(commands)))
    assert called
    assert called <= TARGETS
    assert all("@" in step["uses"] for step in steps(path) if "uses" in step)


def test_every_python_of_the_package_is_tested() -> None:
    matrix = yaml.safe_load(WORKFLOWS[-1].read_text(encoding="utf-8"))["jobs"]["newest"]["strategy"]["matrix"]["python"]
    classifiers = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix == re.findall(r"Python :: (3\.\d+)", classifiers)


def test_a_release_needs_no_secret() -> None:
    text = (REPOSITORY / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    assert jobs["space"]["permissions"] == {"contents": "read", "id-token": "write"}
    assert jobs["space"]["env"]["HF_OIDC_RESOURCE"].startswith("spaces/")
    assert (REPOSITORY / "examples" / "space" / "app.py").is_file()


def test_hooks_are_targets() -> None:
    [local] = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {hook["entry"].removeprefix("make ") for hook in local["hooks"]} <= TARGETS


def test_citation_names_the_licence() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == "Apache-2.0"
