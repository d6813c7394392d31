"""Wheel, sdist and editable install hold the package and the card templates; what is imported is declared."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import hfdetox
from tests.conftest import REPOSITORY

TEMPLATES = {f"hfdetox/cards/{path.name}" for path in (REPOSITORY / "cards").glob("*.jinja")}
MODULES = {
    path.relative_to(REPOSITORY).as_posix().removesuffix(".py") for path in (REPOSITORY / "hfdetox").rglob("*.py")
} | {"hfdetox/cards/__init__"}
USED_BY_OTHERS = {"torchvision"}  # timm's transforms and the image processors of transformers
# what a person's Python does with the installed package, without the rest of this environment (-S): only it is found
PROBE = """
import site, sys
site.addsitedir(sys.argv[1])
import hfdetox, hfdetox.cards
from importlib.resources import files
print(hfdetox.__file__, *sorted(f.name for f in files("hfdetox.cards").iterdir() if f.name.endswith(".jinja")))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that nothing is built inside the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("hfdetox", "cards"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in filter(Path.is_file, REPOSITORY.iterdir()):
        shutil.copy(path, folder)
    return folder


def build(kind: str, checkout: Path, into: Path) -> Path:
    """Build a `wheel`, `sdist` or `editable` as pip does, without its isolated environment (that needs a registry)."""
    into.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    [built] = into.iterdir()
    return built


def unpack(archive: Path, into: Path) -> set[str]:
    """Unpack a wheel and return the names of its files."""
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(into)
        return set(wheel.namelist())


def installed(folder: Path) -> list[str]:
    """Return where the package that was unpacked into `folder` is imported from, and the templates it finds."""
    done = subprocess.run([sys.executable, "-S", "-c", PROBE, folder], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("built") / "wheel")


def test_wheel_holds_every_module_and_template(wheel: Path, tmp_path: Path) -> None:
    names = unpack(wheel, tmp_path)
    assert TEMPLATES
    assert {name.removesuffix(".py") for name in names if name.endswith(".py")} == MODULES
    assert {name for name in names if name.endswith(".jinja")} == TEMPLATES
    assert "hfdetox/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    file, *templates = installed(tmp_path)
    assert Path(file) == tmp_path / "hfdetox" / "__init__.py"
    assert {f"hfdetox/cards/{name}" for name in templates} == TEMPLATES


def test_wheel_declares_version_licence_and_command(wheel: Path, tmp_path: Path) -> None:
    unpack(wheel, tmp_path)
    [information] = tmp_path.glob("*.dist-info")
    metadata = (information / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {hfdetox.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "hfdetox = hfdetox.__main__:main" in (information / "entry_points.txt").read_text(encoding="utf-8")


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert set(second.namelist()) == set(first.namelist())


def test_editable_install_finds_the_templates_in_the_checkout(checkout: Path, tmp_path: Path) -> None:
    unpack(build("editable", checkout, tmp_path / "editable"), tmp_path / "site")
    file, *templates = installed(tmp_path / "site")
    assert Path(file) == checkout / "hfdetox" / "__init__.py"
    assert {f"hfdetox/cards/{name}" for name in templates} == TEMPLATES


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Return the dependencies of the package, or of one of its extras, by normalised name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {normal(r.name): r for r in map(Requirement, requirements)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Return the top-level names that the package's files import."""
    names: set[str] = set()
    for path in [*(REPOSITORY / "hfdetox").rglob("*.py"), *(REPOSITORY / "cards").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"hfdetox"}


def test_every_import_is_of_a_declared_dependency_and_every_dependency_is_imported() -> None:
    owners = importlib.metadata.packages_distributions()
    found = {name: {normal(owner) for owner in owners[name]} & set(declared()) for name in imported()}
    assert [name for name, distributions in found.items() if not distributions] == []
    assert set(declared()) - set().union(*found.values()) == USED_BY_OTHERS


@pytest.mark.parametrize("extra", [None, "test", "quality", "tensorboard"])
def test_installed_versions_meet_the_lower_bounds_and_no_bound_is_missing(extra: str | None) -> None:
    requirements = {name: r for name, r in declared(extra).items() if name != "hfdetox"}
    for name, requirement in requirements.items():
        [bound] = [part for part in requirement.specifier if part.operator == ">="]
        installed_version = Version(importlib.metadata.version(name))
        assert requirement.specifier.contains(installed_version, prereleases=True), name
        if "LOWEST_VERSIONS" in os.environ:  # make test-lowest: what is tested is what is promised
            assert installed_version in SpecifierSet(f"=={bound.version}.*"), name
