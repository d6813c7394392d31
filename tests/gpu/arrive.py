"""On the GPU machine: install from the bundle what is missing there or too old, into a folder beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.gpu.needs import Name, key, needs_of, own_needs, satisfies, wheel_metadata, wheels_in


def installed(name: str) -> str | None:
    """Return the version that is installed here, None where none is."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def choose(needs: Iterable[Requirement], folder: Path,
           version_of: Callable[[str], str | None] = installed) -> tuple[dict[Name, Path], list[str]]:  # fmt: skip
    """Return which wheels of a folder are to be installed for `needs`, and which needs neither they nor what is here
    satisfies."""
    wheels, chosen, unmet = wheels_in(folder), {}, []
    needs, seen = list(needs), set()
    while needs:
        need = needs.pop()
        name, extras = key(need), frozenset(need.extras)
        there = name not in chosen and satisfies(version_of(name), need)
        if there or (name, extras, str(need.specifier)) in seen:
            continue
        seen.add((name, extras, str(need.specifier)))
        version, wheel = wheels.get(name, (None, None))
        if wheel is None or not satisfies(version, need):
            unmet.append(f"{need} (here: {version_of(name) or 'none'}, in the bundle: {version or 'none'})")
            continue
        chosen[name] = wheel
        needs += needs_of(wheel_metadata(wheel), extras)
    return chosen, sorted(unmet)


def install(bundle: Path, site: Path) -> tuple[list[str], list[str]]:
    """Put what is missing into `site`, made anew; returns the wheels that are there now, and the needs that are not."""
    chosen, unmet = choose(own_needs(), bundle / "wheels")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                   "--no-cache-dir", "--target", str(site), *map(str, chosen.values())]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            unmet.append(f"pip: {done.stderr[-500:]}")
    return sorted(wheel.name for wheel in chosen.values()), unmet
