"""The bundle: what it takes along, what it says is missing, and what is installed from it on arrival."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from tests.gpu.arrive import choose, install, installed
from tests.gpu.bundle import MACHINE_FILE, pack_images, read_machine
from tests.gpu.needs import key, needs_of, own_needs, satisfies, wheel_metadata


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """Write a wheel that holds one module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = '{version}'\n")
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


def pictures(folder: Path, train: int) -> Path:
    """Write a dataset of two splits, the training one in two files, with the metadata that names its classes."""
    folder.mkdir(parents=True)
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
                       metadata={"huggingface": "classes"})  # fmt: skip
    for name, count in (("test-0", 3), ("train-0", train // 2), ("train-1", train - train // 2)):
        rows = [{"image": {"bytes": f"{name} {i}".encode(), "path": None}, "label": i} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")
    return folder


def test_own_needs_are_those_of_the_package_and_of_its_tests() -> None:
    names = {str(key(need)) for need in own_needs()}
    assert {"torch", "datasets", "pytest", "pytest-xdist"} <= names
    assert "ruff" not in names


def test_needs_follow_the_machine_and_the_extras(tmp_path: Path) -> None:
    metadata = wheel_metadata(wheel(tmp_path, "one", "1.0", "always>=2", "windows; sys_platform == 'win32'",
                                    "old; python_version < '3.12'", "net; extra == 'http'"))  # fmt: skip
    assert [str(key(need)) for need in needs_of(metadata, [])] == ["always"]
    assert [str(key(need)) for need in needs_of(metadata, ["http"])] == ["always", "net"]


def test_what_is_here_is_kept_and_what_is_missing_or_too_old_comes_from_the_bundle(tmp_path: Path) -> None:
    here = {"torch": "2.11.0", "lock": "3.0", "net": "5.0"}
    wheel(tmp_path, "sets", "5.0", "lock>=4", "dill[fast]", "net")
    wheel(tmp_path, "lock", "4.3")
    wheel(tmp_path, "dill", "0.4", "speed; extra == 'fast'")
    wheel(tmp_path, "speed", "1.0")
    wheel(tmp_path, "torch", "2.15")
    wheel(tmp_path, "unused", "1.0")
    needs = [Requirement("torch>=2.9"), Requirement("sets>=4"), Requirement("absent"), Requirement("net>=9")]
    chosen, unmet = choose(needs, tmp_path, here.get)
    assert set(chosen) == {"sets", "lock", "dill", "speed"}
    assert unmet == ["absent (here: none, in the bundle: none)", "net>=9 (here: 5.0, in the bundle: none)"]


def test_nothing_is_installed_where_everything_is_there(tmp_path: Path) -> None:
    assert install(tmp_path / "none", tmp_path / "site") == ([], [])
    assert list((tmp_path / "site").iterdir()) == []


def test_a_wheel_of_the_bundle_is_found_before_what_is_installed(tmp_path: Path) -> None:
    made = wheel(tmp_path, "tqdm", "99.0")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(made)], check=True)
    code = "import tqdm; print(tqdm.VERSION)"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "99.0"


def test_images_are_a_seeded_part_with_the_names_of_their_classes(tmp_path: Path) -> None:
    source = pictures(tmp_path / "source", 40)
    assert pack_images(source, tmp_path / "a", 10) == {"test": 3, "train": 10}
    pack_images(source, tmp_path / "b", 10)
    tables = [pq.read_table(tmp_path / name / "train-00000-of-00001.parquet") for name in ("a", "b")]
    assert tables[0].equals(tables[1])
    assert tables[0].schema.metadata == {b"huggingface": b"classes"}
    rows = [row["image"]["bytes"] for row in tables[0].to_pylist()]
    assert len(set(rows)) == 10
    # of both files, in their order
    assert rows == sorted(rows, key=lambda text: (text.split()[0], int(text.split()[1])))
    assert pack_images(source, tmp_path / "all", 1000) == {"test": 3, "train": 40}


@pytest.mark.parametrize("images", [True, False])
def test_the_command_says_what_is_missing(images: bool, tmp_path: Path) -> None:
    machine = tmp_path / "machine.txt"
    machine.write_text("".join(f"{key(need)}=={installed(need.name)}\n" for need in own_needs()), encoding="utf-8")
    if images:
        pictures(tmp_path / "cifar", 10)
    command = [sys.executable, "-m", "tests.gpu.bundle", "--cifar", tmp_path / "cifar"]
    command += ["--output", tmp_path / "bundle", "--machine", machine]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if images else 1), done.stderr
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["wheels"] == {}
    assert manifest["images"] == ({"test": 3, "train": 10} if images else {})
    assert ("no images" in done.stderr) == (not images)
    assert "CIFAR10=DIR" in done.stderr or images


def test_the_machines_versions_that_are_known_are_not_too_old() -> None:
    known = {name: version for name, version in read_machine(MACHINE_FILE).items() if version is not None}
    wanted = {key(need): need for need in own_needs()}
    assert set(known) & set(wanted)
    assert [name for name, version in known.items() if name in wanted and not satisfies(version, wanted[name])] == []
