"""The Space's work without its page: what it refuses, what it leaves behind, whose token it uses."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from datasets import load_dataset

from hfdetox import HfdetoxError, RunError, UsageError
from hfdetox.reporting.report import Report
from tests import backdoored
from tests.conftest import REPOSITORY
from tests.hub_server.server import HubServer
from tests.image_data import png
from tests.space.conftest import SECRET

Put = Callable[..., tuple[str, str]]


@pytest.fixture
def on_hub(hub: HubServer, repo_name: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Put:
    """`on_hub(card="…", private=False)` puts a small backdoored model and its images on the Hub, and returns both ids.

    They are of the account that the Space's own token belongs to.
    """

    def put(card: str = "", *, private: bool = False) -> tuple[str, str]:
        made, (model, dataset) = backdoored.made(tmp_path_factory), (repo_name("model", "space"), repo_name("digits"))
        hub.create_repo(model, private=private)
        hub.commit_folder(model, made.timm)
        hub.commit(model, {"README.md": card})
        hub.create_repo(dataset, "dataset")
        hub.commit_folder(dataset, made.digits, repo_type="dataset")
        return model, dataset

    return put


def chosen(work: ModuleType, model: str, dataset: str = "", archive: str | None = None) -> list[str]:
    """Return the words of a visitor's job."""
    with work.job() as folder:
        return work.hub_words(folder, model, dataset, archive, 200, 300)


def left(work: ModuleType) -> list[Path]:
    """Return what the Space has on its disk."""
    return [path for path in work.ROOT.rglob("*") if path.is_file()]


def refusal(job: Callable[[], object]) -> str:
    """Return the one line that refuses a job."""
    with pytest.raises(HfdetoxError) as caught:
        job()
    assert "\n" not in str(caught.value)
    return str(caught.value)


PATHS = ["../model", "/etc", "/etc/passwd", "~", "~/model", "./model", "model", "a/b/c", "a/..", "../b", "--help",
         "-x/y", "hf_hub:a/b", "a/b@main", "a/b\nc", "a\\b", "ａ/ｂ", "", "file:///etc"]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_only_ids_of_the_hub_are_models_and_images(work: ModuleType, hub: HubServer, name: str) -> None:
    assert "must be an id of the Hub" in refusal(lambda: chosen(work, name, "org/images"))
    if name:
        assert "must be an id of the Hub" in refusal(lambda: work.images_of(name))
    assert hub.log == []


def test_a_folder_of_that_name_is_none_of_the_jobs(work, hub, tmp_path, monkeypatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "the model org/model is not on the Hub" in refusal(lambda: chosen(work, "org/model", "org/images"))
    assert hub.requests("GET", "/api/models/org/model")


def test_a_card_cannot_name_a_folder_of_this_machine(work, on_hub, tmp_path, tmp_path_factory) -> None:
    images = backdoored.made(tmp_path_factory).digits
    model, _ = on_hub(f"---\ndatasets:\n- {images}\n---\n")
    assert refusal(lambda: chosen(work, model))
    assert left(work) == []


def test_a_model_and_its_images_are_taken_at_the_commits_that_were_checked(work, on_hub, hub) -> None:
    model, dataset = on_hub()
    hub.commit(model, {"README.md": f"---\ndatasets:\n- {dataset}\n---\n"})
    words = chosen(work, model)
    assert words[0] == model
    said = dict(zip(words[1::2], words[2::2], strict=True))
    assert said == {
        "--samples": "200", "--eval-samples": "300", "--revision": hub.head(model), "--dataset": dataset,
        "--dataset-revision": hub.head(dataset, repo_type="dataset"),
    }  # fmt: skip
    assert left(work) == []


def test_what_is_too_large_is_refused_before_it_is_pulled(work, on_hub, hub, monkeypatch) -> None:
    model, dataset = on_hub()
    size = len(hub.files(model)["model.safetensors"]) / 1e6
    monkeypatch.setattr(work, "MEGABYTES", size - 0.01)
    assert refusal(lambda: chosen(work, model, dataset)).startswith(f"the model {model} has 2 MB, and this Space takes")
    monkeypatch.setattr(work, "MEGABYTES", size + 0.01)
    hub.commit(dataset, {"notes.bin": b"x" * 2_000_000}, repo_type="dataset")
    assert refusal(lambda: chosen(work, model, dataset)).startswith(f"the dataset {dataset} has ")
    assert not hub.requests("GET", "/resolve/" + hub.head(model) + "/model.safetensors")


def test_a_file_that_is_too_large_ends_the_job(work, on_hub, hub, monkeypatch) -> None:
    model, dataset = on_hub("x" * 5_000_000)
    monkeypatch.setattr(work, "MEGABYTES", 2)
    assert "File too large" in refusal(lambda: chosen(work, model, dataset))


def test_what_only_the_spaces_token_may_read_is_not_there(work, on_hub, hub) -> None:
    hidden, dataset = on_hub(private=True)
    assert "is not on the Hub for everybody" in refusal(lambda: chosen(work, hidden, dataset))
    assert hub.requests("GET", hidden)
    assert [one for one in hub.log if one.had_token] == []


def test_a_job_gets_no_secret_of_the_space(work, tmp_path, monkeypatch) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(f"import os; open({str(seen)!r}, 'w').write(repr(dict(os.environ)))")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    with work.job() as folder:
        work.run("list", "scores", folder=folder)
    assert "HF_HOME" in seen.read_text()
    assert SECRET not in seen.read_text()
    assert "so secret" not in seen.read_text()


def test_a_job_that_takes_too_long_ends_with_what_it_started(work, on_hub, monkeypatch) -> None:
    model, dataset = on_hub()
    monkeypatch.setattr(work, "MINUTES", 0.02)
    with pytest.raises(RunError, match=r"stopped: a job may take 0\.02 minutes here"):
        chosen(work, model, dataset)
    assert [one for one in psutil.Process().children(recursive=True) if "hfdetox" in " ".join(one.cmdline())] == []
    assert left(work) == []


def test_a_result_outlives_its_job_and_is_published_with_the_visitors_token(
    work, on_hub, hub, repo_name, capfd
) -> None:
    model, dataset = on_hub()
    words = [*chosen(work, model, dataset), *backdoored.settings(epochs=1), "--no-scan"]
    with work.job() as folder:
        result, page = work.clean(words, folder)
    assert "<title>hfdetox: result</title>" in page
    assert {path.relative_to(work.ROOT).parts[1] for path in left(work)} == {"result"}
    assert [one for one in hub.log if one.had_token] == []
    name = repo_name("cleaned")
    published, kept = work.publish(result, name.partition("/")[2], private=True, token=hub.token).splitlines()
    assert name in published
    assert kept.startswith(f"pictures of images are published, for {dataset} is public: plots/")
    assert hub.repo(name).private
    assert Report.load(result).output.commit == hub.head(name)
    # the Space's own account may write there: it was not asked
    other = repo_name("cleaned", "space")
    assert "me may not create" in refusal(lambda: work.publish(result, other, private=True, token=hub.token))
    assert not hub.exists(other)
    said = "".join(capfd.readouterr())
    for token in (hub.token, SECRET):
        assert token not in said
        assert not [path for path in left(work) if token.encode() in path.read_bytes()]
    work.remove(result)
    assert list(work.ROOT.iterdir()) == []
    assert "no result any more" in refusal(lambda: work.publish(result, name, private=True, token=hub.token))


@pytest.mark.parametrize("name", ["", "../x", "--private", "a/b/c", "/etc", "a b"])
def test_a_repository_has_a_name_of_the_hub(work, hub, tmp_path, name) -> None:
    assert "cannot be the name of a repository" in refusal(
        lambda: work.publish(tmp_path, name, private=True, token=hub.token)
    )


def archive(path: Path, members: dict[str, bytes]) -> str:
    """Write a zip with these names, whatever they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return str(path)


def test_names_in_a_zip_are_labels_and_never_paths(work, tmp_path) -> None:
    evil = "<script>x"
    members = {
        "../../../cat/1.png": png(1), "/etc/cat/2.png": png(2), f"a/{evil}/../{evil}/3.PNG": png(3),
        "top.png": png(4), "__MACOSX/cat/._1.png": b"no picture", "cat/notes.txt": b"no picture", "cat/": b"",
        "images/C:\\dog/5.jpg": png(5),
    }  # fmt: skip
    place = tmp_path / "job" / "images"
    place.parent.mkdir()
    work.write_images(archive(tmp_path / "x.zip", members), place)
    assert [path.name for path in place.iterdir()] == ["train.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "x.zip"]
    images = load_dataset("parquet", data_files=str(place / "train.parquet"), split="train", cache_dir=str(tmp_path))
    names = images.features["label"].names
    assert {"cat", evil} <= set(names)
    assert len(images) == 4
    assert images[0]["image"].size == (8, 8)


def test_a_zip_that_is_none_or_too_large_is_refused(work, tmp_path, monkeypatch) -> None:
    (tmp_path / "none.zip").write_bytes(b"PK not a zip")
    cut = Path(archive(tmp_path / "cut.zip", {"cat/1.png": png(1, side=64)}))
    cut.write_bytes(cut.read_bytes().replace(png(1, side=64)[100:120], b"\0" * 20))
    empty = archive(tmp_path / "empty.zip", {"1.png": png(1), "readme/x.txt": b"x"})
    bomb = archive(tmp_path / "bomb.zip", {f"cat/{i}.png": bytes(10**6) for i in range(3)})
    monkeypatch.setattr(work, "MEGABYTES", 2)
    lines = {
        str(tmp_path / "none.zip"): "no zip that can be read", empty: "give one folder a class",
        bomb: "the images have 3 MB, and this Space takes 2 MB",
    }  # fmt: skip
    for path, line in lines.items():
        with pytest.raises(UsageError, match=line):
            work.write_images(path, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_images_of_a_zip_are_measured(work, on_hub, tmp_path, tmp_path_factory) -> None:
    model, _ = on_hub()
    digits = load_dataset("parquet", data_files=str(backdoored.made(tmp_path_factory).digits / "test.parquet"),
                          split="train", cache_dir=str(tmp_path)).with_format("arrow")  # fmt: skip
    rows = digits[:].to_pylist()
    members = {f"digits/{backdoored.NAMES[row['label']]}/{i}.png": row["image"]["bytes"] for i, row in enumerate(rows)}
    with work.job() as folder:
        words = work.hub_words(folder, model, "", archive(tmp_path / "x.zip", members), 200, 0)
        found = work.scan(words, folder)
    assert found.scan.samples == 200
    assert found.measurement is not None
    assert found.measurement.accuracy.samples >= 100
    assert found.measurement.accuracy.value > 0.9
    assert left(work) == []
