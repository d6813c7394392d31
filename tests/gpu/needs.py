"""What packages need, from the metadata of wheels and of what is installed: for the bundle, and on arrival."""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# of the extra `test`, what the tests that need a GPU import
TESTS = ("packaging", "pytest", "pytest-xdist")
# the machine that the bundle is for
PYTHON = "3.12"
MACHINE = {
    "implementation_name": "cpython", "os_name": "posix", "platform_machine": "x86_64",
    "platform_python_implementation": "CPython", "platform_system": "Linux", "python_full_version": f"{PYTHON}.3",
    "python_version": PYTHON, "sys_platform": "linux",
}  # fmt: skip

Name = NormalizedName


def own_needs(project: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """Return what hfdetox and its tests on a GPU need."""
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    tests = map(Requirement, declared["optional-dependencies"]["test"])
    return [*map(Requirement, declared["dependencies"]), *(need for need in tests if need.name in TESTS)]


def needs_of(metadata: Message, extras: Iterable[str]) -> list[Requirement]:
    """Return what a distribution with these extras needs on the machine."""
    found = []
    for text in metadata.get_all("Requires-Dist") or []:
        need = Requirement(text)
        environments = [{**MACHINE, "extra": extra} for extra in ("", *extras)]
        if need.marker is None or any(need.marker.evaluate(environment) for environment in environments):
            found.append(need)
    return found


def wheel_metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        return HeaderParser().parsestr(archive.read(name).decode())


def wheels_in(folder: Path) -> dict[Name, tuple[Version, Path]]:
    """Return the wheels of a folder by name."""
    found = {}
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        found[name] = (version, wheel)
    return found


def key(need: Requirement) -> Name:
    """Return the normal form of a need's name."""
    return canonicalize_name(need.name)


def satisfies(version: Version | str | None, need: Requirement) -> bool:
    """Tell whether a version (None: not installed) is one that is needed."""
    return version is not None and need.specifier.contains(version, prereleases=True)
