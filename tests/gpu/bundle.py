"""The folder that goes to the GPU machine: wheels of what it lacks, and images. `make gpu-bundle` calls this.

    python -m tests.gpu.bundle --cifar DIR --output DIR [--train 20000]

Wheels are for CPython 3.12 on Linux x86-64. uv chooses the versions, with those that machine.txt knows as constraints;
whatever hfdetox needs and the machine lacks, or may have in a version too old, is carried with its own needs. Of what
the machine has, in a version that is not known here, a large wheel is left out and the machine's trusted: on arrival
every need is checked. The images are the test split of CIFAR-10 and a seeded part of its training split.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from packaging.requirements import Requirement

from tests.gpu.needs import PYTHON, Name, key, needs_of, own_needs, satisfies, wheel_metadata, wheels_in

MIB = 1024**2
LIMIT = 50 * MIB
# of a wheel that the machine has in an unknown version
LARGEST = 8 * MIB
# glibc of the machine, at least
GLIBC = 35
SEED = 0
MACHINE_FILE = Path(__file__).with_name("machine.txt")


def read_machine(path: Path) -> dict[Name, str | None]:
    """Return what the machine has: versions by name, None where only the name is known."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    needs = [Requirement(line) for line in lines if line]
    return {key(need): str(need.specifier).removeprefix("==") or None for need in needs}


def choose_versions(needs: Sequence[Requirement], known: Mapping[Name, str]) -> dict[Name, str]:
    """Return the version of every package that satisfies all needs beside the known ones; uv finds them."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, constraints = Path(scratch, "asked.txt"), Path(scratch, "constraints.txt")
        asked.write_text("".join(f"{need}\n" for need in needs), encoding="utf-8")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in known.items()), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-build", "--no-header",
                   "--no-annotate", "--python-version", PYTHON, "--python-platform", f"x86_64-manylinux_2_{GLIBC}",
                   "--constraints", str(constraints), str(asked)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv finds no versions for the GPU machine:\n{done.stderr}")
    pairs = (Requirement(line) for line in done.stdout.splitlines() if line.strip())
    return {key(pair): str(pair.specifier).removeprefix("==") for pair in pairs}


def download(chosen: Mapping[Name, str], folder: Path) -> None:
    """Download wheels, of just these versions, for the machine."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder),
               *(word for name in [*platforms, "manylinux2014_x86_64"] for word in ("--platform", name)),
               *(f"{name}=={version}" for name, version in chosen.items())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip cannot download the wheels:\n{done.stderr}")


def collect(needs: Iterable[Requirement], machine: Mapping[Name, str | None], folder: Path) -> list[str]:
    """Download what the machine lacks of `needs`, and of what those need; returns what it is trusted to have."""
    roots = needs = list(needs)
    # a version that is too old is no constraint: a newer one is carried
    old = {key(need) for need in needs if machine.get(key(need)) and not satisfies(machine[key(need)], need)}
    known = {name: version for name, version in machine.items() if version is not None and name not in old}
    versions: dict[Name, str] = {}
    trusted: set[Name] = set()
    seen: set[tuple[Name, frozenset[str]]] = set()
    while needs:
        level = {}
        for need in needs:
            name = key(need)
            enough = name in known or (name in machine and name not in old and not need.specifier)
            if not enough and name not in trusted and (name, frozenset(need.extras)) not in seen:
                seen.add((name, frozenset(need.extras)))
                level.setdefault(name, set()).update(need.extras)
        absent = [name for name in level if name not in wheels_in(folder)]
        versions = versions or (choose_versions(roots, known) if absent else {})
        missing = {name: versions[name] for name in absent}
        if missing:
            download(missing, folder)
        needs = []
        for name, (_, wheel) in wheels_in(folder).items():
            if name in missing and name in machine and name not in old and wheel.stat().st_size > LARGEST:
                trusted.add(name)
                wheel.unlink()
            elif name in level:
                needs += needs_of(wheel_metadata(wheel), level[name])
    return sorted(trusted)


def pack_images(cifar: Path, folder: Path, count: int) -> dict[str, int]:
    """Write the test split and `count` training images, as parquet with the columns and the names of the source."""
    folder.mkdir()
    written = {}
    for split in ("test", "train"):
        table = pa.concat_tables([pq.read_table(path) for path in sorted(cifar.glob(f"{split}-*.parquet"))])
        if split == "train" and count < len(table):
            order = np.random.default_rng(SEED).permutation(len(table))[:count]
            table = table.take(np.sort(order))
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd", row_group_size=1000)
        written[split] = len(table)
    return written


def build(cifar: Path, output: Path, count: int, machine: Mapping[Name, str | None]) -> dict[str, Any]:
    """Make the bundle anew in `output` and return its manifest, which is `bundle.json` in it."""
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "wheels").mkdir(parents=True)
    manifest: dict[str, Any] = {"python": PYTHON, "trusted": collect(own_needs(), machine, fresh / "wheels")}
    manifest["wheels"] = {name: str(version) for name, (version, _) in wheels_in(fresh / "wheels").items()}
    there = all(any(cifar.glob(f"{split}-*.parquet")) for split in ("test", "train"))
    manifest["images"] = pack_images(cifar, fresh / "cifar10", count) if there else {}
    manifest["bytes"] = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    (fresh / "bundle.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return manifest


def main() -> None:
    """Make the bundle, and say what it has and what is missing; exit status 1 where something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--machine", type=Path, default=MACHINE_FILE, help="what the machine has")
    arguments = parser.parse_args()
    made = build(arguments.cifar, arguments.output, arguments.train, read_machine(arguments.machine))
    size = f"{made['bytes'] / MIB:.1f} MiB"
    print(f"{arguments.output}: {len(made['wheels'])} wheels ({', '.join(made['wheels'])}), "
          f"{sum(made['images'].values()):,} images, {size}; the machine's own {', '.join(made['trusted'])} is checked "
          "there")  # fmt: skip
    if made["bytes"] > LIMIT:
        sys.exit(f"the bundle has {size}, more than {LIMIT // MIB} MiB: take fewer training images")
    if not made["images"]:
        sys.exit(f"no images: {arguments.cifar} has no train-*.parquet and test-*.parquet; name a folder with CIFAR-10 "
                 "as parquet: make gpu-bundle CIFAR10=DIR")  # fmt: skip


if __name__ == "__main__":
    main()
