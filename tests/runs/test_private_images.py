"""Pictures of a person's images stay with the person, unless everybody may see the images already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.reporting.card import build_card
from hfdetox.reporting.plots import PLOT_FILES
from hfdetox.reporting.report import Report
from hfdetox.runs.integrity import check_card, pull_output
from hfdetox.runs.manifest import write_manifest
from hfdetox.runs.publish import IMAGE_PICTURES, push_output
from hfdetox.runs.result import GALLERY
from hfdetox.runs.signing import check_signature
from tests.output_folder import contents, folder, pushed
from tests.runs.test_signing import keys
from tests.written_report import DATA_COMMIT, SOURCE, written_report

__all__ = ["folder"]

NUMBERS = {"before_after.png", "destinations.png", "training.png", "weight_changes.png", "residual.png"}


def test_every_picture_is_of_images_or_of_numbers() -> None:
    assert {*IMAGE_PICTURES} == {GALLERY, *(f"plots/{name}" for name in PLOT_FILES if name not in NUMBERS)}


@pytest.fixture
def pictured(folder: Path) -> Path:
    """The output folder, with a picture of numbers and two of images."""
    plots = ["plots/before_after.png", "plots/moved.png", "plots/samples.png"]
    for name in plots:
        (folder / name).write_bytes(b"\x89PNG\0\0")
    card = build_card(written_report(), source_card=SOURCE, repo_id=None, labels=("plane", "car", "x"), plots=plots)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def pictures(hub, name: str) -> set[str]:
    """Return the pictures of images in a repository; its card shows just what is there."""
    there = pushed(hub, name)
    shown = {path for path in IMAGE_PICTURES if f"]({path})" in there["README.md"].decode()}
    # no card shows those that moved without the numbers of it
    assert shown == IMAGE_PICTURES & set(there) - {"plots/moved.png"}
    assert "plots/before_after.png" in there
    return IMAGE_PICTURES & set(there)


def test_images_of_no_public_dataset_stay_here(hub, repo_name, hub_token, pictured, capsys):
    name, before = repo_name(), contents(pictured)
    assert cli.run(["push", str(pictured), name]) == 0
    said = capsys.readouterr().err
    assert "pictures of images stay here, for org/pictures is no public dataset of the Hub: " in said
    assert "plots/moved.png, plots/samples.png; --publish-images publishes them" in said
    assert pictures(hub, name) == set()
    # here they all are, and what is here and there still verifies
    assert {path for path in before if path in contents(pictured)} == set(before)
    for place in (str(pictured), name):
        assert str(check_card(pull_output(place), None, None).finding) == "match"
    # a later push may publish them, and one after that takes them back
    assert cli.run(["push", str(pictured), name, "--publish-images"]) == 0
    assert "stay here" not in capsys.readouterr().err
    assert pictures(hub, name) == {"plots/moved.png", "plots/samples.png"}
    push_output(pictured, name)
    assert pictures(hub, name) == set()


def put(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


ADDED = {"page_html": b"<img src=data:image/png;base64,AAAA>", "mine_PNG": b"\x89PNG\0", "print_pdf": b"%PDF-1.4",
         "logs__run_tfevents": b"\x18\0\0\0", "plots__extra_png": b"\x89PNG\0", "look_ipynb": b"{}",
         "inner__plots__samples_png": b"\x89PNG\0", "inner__train_parquet": b"PAR1\0"}  # fmt: skip
SAFE = {"NOTES_md": b"# mine", "onnx__model_onnx": b"\x08\0", "data_csv": b"a,b\n"}


@pytest.mark.parametrize("recorded", [True, False], ids=["with a manifest", "without"])
def test_what_somebody_put_there_stays_if_it_may_show_images(
    hub, repo_name, hub_token, pictured, capsys, recorded, tmp_path
) -> None:
    name, known = repo_name(), set(contents(pictured))
    if recorded:
        write_manifest(pictured)
    put(pictured, **ADDED, **SAFE)
    (pictured / "config.json").write_text('{"changed": true}')  # a file of ours that was changed is ours
    assert cli.run(["report", str(pictured), "--html", str(pictured / "report.html")]) == 0
    capsys.readouterr()
    push_output(pictured, name)
    said = capsys.readouterr().err
    assert {*pushed(hub, name)} == known - IMAGE_PICTURES | {"NOTES.md", "onnx/model.onnx", "data.csv"}
    [line] = [one for one in said.splitlines() if "hfdetox did not put them into the folder" in one]
    assert "inner/plots/samples.png" in line
    assert "logs/run.tfevents" in line
    assert "and 1 more; --publish-images publishes them" in line
    assert "manifest" not in said
    push_output(pictured, name, publish_images=True)
    assert "report.html" in pushed(hub, name)
    said = capsys.readouterr().err
    assert "pictures of images are published, as --publish-images says: plots/moved.png, plots/samples.png, " in said
    # they are taken back as the pictures are
    push_output(pictured, name)
    assert pictures(hub, name) == set()


def test_of_a_public_dataset_other_pictures_stay(hub, repo_name, hub_token, folder, capsys) -> None:
    images, name = repo_name("dataset"), repo_name()
    hub.create_repo(images, "dataset")
    save(folder, replace_dataset(images, hub.commit(images, {"README.md": "# images"}, repo_type="dataset")))
    put(folder, my_gallery_jpg=b"\xff\xd8\xff\xe0")
    push_output(folder, name)
    said = capsys.readouterr().err
    assert f"pictures of images are published, for {images} is public: plots/samples.png\n" in said
    assert "stay here, for hfdetox did not put them into the folder: my.gallery.jpg; " in said
    assert {"plots/samples.png", "my.gallery.jpg"} & {*pushed(hub, name)} == {"plots/samples.png"}


@pytest.mark.parametrize(
    ("access", "public"), [({}, True), ({"private": True}, False), ({"gated": True}, False)], ids=str
)
def test_a_public_dataset_of_the_hub_may_be_shown(hub, repo_name, hub_token, folder, monkeypatch, access, public):
    images, name = repo_name("dataset"), repo_name()
    hub.create_repo(images, "dataset")
    commit = hub.commit(images, {"README.md": "# images"}, repo_type="dataset")
    hub.set_access(images, repo_type="dataset", **access)
    report = replace_dataset(images, commit)
    save(folder, report)
    push_output(folder, name)
    assert (pictures(hub, name) == {"plots/samples.png"}) is public


@pytest.mark.parametrize("change", ["folder", "no commit", "another commit"])
def test_a_name_alone_does_not_make_images_public(hub, repo_name, hub_token, folder, change):
    images, name = repo_name("dataset"), repo_name()
    hub.create_repo(images, "dataset")
    commit = hub.commit(images, {"README.md": "# images"}, repo_type="dataset")
    found = {"folder": (commit, "folder"), "no commit": (None, "hub"), "another commit": (DATA_COMMIT, "hub")}[change]
    save(folder, replace_dataset(images, *found))
    push_output(folder, name)
    assert pictures(hub, name) == set()


def replace_dataset(name: str, revision: str | None, source: str = "hub") -> Report:
    made = written_report()
    return replace(made, dataset=replace(made.dataset, id=name, revision=revision, source=source))


def save(folder: Path, report: Report) -> None:
    plots = ["plots/before_after.png", "plots/samples.png"]
    (folder / plots[1]).write_bytes(b"\x89PNG\0\0")
    card = build_card(report, source_card=None, repo_id=None, labels=("plane", "car", "x"), plots=plots)
    (folder / "README.md").write_text(card, encoding="utf-8")
    report.save(folder)


def test_a_signature_covers_what_is_published(hub, repo_name, hub_token, pictured, tmp_path):
    name, (private, public) = repo_name(), keys(tmp_path, "mine")
    push_output(pictured, name, sign=private)
    there = tmp_path / "there"
    for path, data in pushed(hub, name).items():
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        (there / path).write_bytes(data)
    for place in (pictured, there):
        assert str(check_signature(place, public, unpublished=IMAGE_PICTURES).finding) == "match"
    (pictured / "plots" / "other.png").write_bytes(b"added")
    assert str(check_signature(pictured, public, unpublished=IMAGE_PICTURES).finding) == "mismatch"
