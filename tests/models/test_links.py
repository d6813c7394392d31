"""Folders of strangers with links: nothing outside a model's folder is read or published."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from hfdetox.detox import plan
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.models.loaded import copy_companions
from tests.hub_server.server import HubServer
from tests.output_folder import contents
from tests.tiny_models import timm_folder, transformers_folder

READ = ["LICENSE", "LICENSE.txt", "NOTICE", "README.md", "config.json", "preprocessor_config.json", "model.safetensors",
        "correction.safetensors", "modeling.py"]  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("how", ["absolute", "relative", "through another link", "to nothing yet"])
def test_a_model_that_links_to_a_file_outside_is_refused(name: str, how: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "clone", "vit")
    secret = tmp_path / "secret"
    if how != "to nothing yet":
        secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"my password")
    (folder / name).unlink(missing_ok=True)
    target = secret if how == "absolute" else Path("../secret")
    if how == "through another link":
        (folder / "inner").symlink_to(target)
        target = Path("inner")
    (folder / name).symlink_to(target)
    for call in (lambda: load_classifier(folder), lambda: plan(str(folder), dataset=str(tmp_path))):
        with pytest.raises(UsageError, match=rf"{name} is a link to something outside the model's folder"):
            call()


def test_a_link_that_appears_after_the_model_was_loaded_is_not_followed(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "clone", "vit")
    (folder / "LICENSE").write_text("MIT")
    classifier = load_classifier(folder)
    (tmp_path / "secret").write_text("my password")
    for name in ("LICENSE", "NOTICE", "README.md"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
    assert classifier.card_source() is None
    (tmp_path / "out").mkdir()
    classifier.save(tmp_path / "out")
    assert not any(b"password" in content for content in contents(tmp_path / "out").values())


def test_links_inside_the_folder_and_the_folders_own_link_are_followed(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "real", "vit")
    (folder / "legal").mkdir()
    (folder / "legal" / "mit.txt").write_text("MIT")
    (folder / "LICENSE").symlink_to("legal/mit.txt")
    (folder / "LICENSES").mkdir()
    (tmp_path / "link").symlink_to(folder)
    classifier = load_classifier(tmp_path / "link")
    classifier.save(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_a_model_folder_like_any(hub: HubServer, repo_name, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name, folder = repo_name(), timm_folder(tmp_path / "made")
    (folder / "LICENSE").write_text("MIT")
    hub.create_repo(name)
    hub.commit(name, contents(folder))
    snapshot = Path(snapshot_download(name, cache_dir=tmp_path / "cache"))
    assert (snapshot / "LICENSE").is_symlink()
    load_classifier(snapshot).save(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"


@pytest.mark.parametrize("blobs", ["a link", "a folder with a link"])
def test_a_clone_in_the_shape_of_the_cache_leads_nowhere_else(blobs: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("my password")
    repo = tmp_path / "models--me--x"
    folder = repo / "snapshots" / "abc"
    folder.mkdir(parents=True)
    if blobs == "a link":
        (repo / "blobs").symlink_to(tmp_path / "home")
    else:
        (repo / "blobs").mkdir()
        (repo / "blobs" / "secret").symlink_to(tmp_path / "home" / "secret")
    (folder / "LICENSE").symlink_to("../../blobs/secret")
    copy_companions(folder, tmp_path)
    assert not (tmp_path / "LICENSE").exists()
