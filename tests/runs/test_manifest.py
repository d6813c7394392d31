"""--overwrite removes what hfdetox wrote, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hfdetox.errors import UsageError
from hfdetox.files import MANIFEST
from hfdetox.runs.folder import check_output, publish_folder
from hfdetox.runs.manifest import foreign_files, remove_own, write_manifest
from hfdetox.runs.publish import push_output
from tests.output_folder import contents, folder, pushed

__all__ = ["folder"]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", [".git/config", ".gitattributes", "thesis.txt", "plots/mine.svg", "data/0.png",
                                  "src/mine.py", "model-zoo/best.safetensors", "LICENSES/mine"])  # fmt: skip
def test_what_hfdetox_did_not_write_is_refused_and_named(folder: Path, name: str, manifest: bool) -> None:
    if manifest:
        write_manifest(folder)
    check_output(folder, overwrite=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(UsageError, match=rf"holds {name}, which is not as hfdetox wrote it"):
        check_output(folder, overwrite=True)
    fresh = folder.with_name("fresh")
    fresh.mkdir()
    with pytest.raises(UsageError, match="removes only what hfdetox wrote"):
        publish_folder(fresh, folder)
    assert contents(folder) == before


def test_a_file_that_was_changed_since_is_somebody_elses(folder: Path) -> None:
    write_manifest(folder)
    assert foreign_files(folder) == []
    (folder / "README.md").write_text("my own card")
    (folder / "plots" / "before_after.png").unlink()
    (folder / "plots" / "before_after.png").symlink_to(folder / "config.json")
    assert foreign_files(folder) == ["README.md", "plots/before_after.png"]
    remove_own(folder)
    assert sorted(contents(folder)) == ["README.md"]
    assert os.listdir(folder / "plots") == ["before_after.png"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"files": 3}', "\xff"])
def test_a_manifest_that_cannot_be_read_gives_nothing_away(folder: Path, damage: str) -> None:
    (folder / MANIFEST).write_text(damage, encoding="latin-1")
    with pytest.raises(UsageError, match="which is not as hfdetox wrote it"):
        check_output(folder, overwrite=True)


def test_empty_folders_of_somebody_are_in_nobodys_way(folder: Path) -> None:
    (folder / "mine" / "later").mkdir(parents=True)
    for _ in range(2):
        write_manifest(folder)
        fresh = folder.with_name("fresh")
        shutil.copytree(folder, fresh)
        publish_folder(fresh, folder)
        assert os.listdir(folder.parent) == [folder.name]


def test_a_link_is_not_replaced_and_what_it_leads_to_stays(folder: Path) -> None:
    write_manifest(folder)
    before = contents(folder)
    link, broken = folder.with_name("link"), folder.with_name("broken")
    link.symlink_to(folder)
    broken.symlink_to(folder.with_name("nothing"))
    for place in (link, broken):
        with pytest.raises(UsageError, match="is a link, which the result would replace"):
            check_output(place, overwrite=True)
    assert contents(folder) == before


def test_an_earlier_result_is_replaced_whole(folder: Path) -> None:
    fresh = folder.with_name("fresh")
    shutil.copytree(folder, fresh)
    (fresh / "plots" / "before_after.png").unlink()
    write_manifest(folder)
    write_manifest(fresh)
    publish_folder(fresh, folder)
    assert "plots/before_after.png" not in contents(folder)
    assert os.listdir(folder.parent) == ["out"]


def test_a_push_changes_card_and_report_and_they_stay_ours_and_the_manifest_stays_here(
    hub, repo_name, hub_token, folder: Path
) -> None:  # type: ignore[no-untyped-def]
    write_manifest(folder)
    name = repo_name()
    push_output(folder, name)
    assert foreign_files(folder) == []
    assert MANIFEST in contents(folder)
    assert MANIFEST not in pushed(hub, name)
