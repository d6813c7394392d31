"""What is found out before the training: the dataset, the model's own files, and that the result can be saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hfdetox
from hfdetox.cli import app as cli
from hfdetox.data.labels import LabelMismatchError
from hfdetox.detox import plan
from hfdetox.errors import HubError, UsageError
from tests import backdoored
from tests.backdoored import NAMES, Made
from tests.hub_server.server import HubServer
from tests.tiny_models import transformers_folder

QUICK = {"defense": "ft", "settings": {"epochs": "1"}, "clean_samples": 20, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def own_head(made: Made, library: str) -> tuple[nn.Module, object]:
    """A trained model into whose head a layer was put by hand, and its processor."""
    if library == "timm":
        module = timm.create_model(f"local-dir:{made.timm}", pretrained=True)
        module.fc = nn.Sequential(nn.Dropout(0.2), module.fc)
        return module, None
    module = AutoModelForImageClassification.from_pretrained(made.transformers)
    module.classifier = nn.Sequential(nn.Dropout(0.1), module.classifier)
    return module, AutoImageProcessor.from_pretrained(made.transformers)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_head_put_in_by_hand_is_said_before_the_training_and_saved_as_weights(
    library: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, processor = own_head(made, library)
    result = hfdetox.detoxify(module, processor=processor, labels=NAMES, dataset=made.digits, output=tmp_path / "out",
                              **QUICK)  # fmt: skip
    assert f"{library} cannot load this model again from what it saves" in capsys.readouterr().err
    assert any("cannot load this model again" in text for text in result.report.warnings)
    assert result.report.model.library == "torch"
    # what was trained is what is there
    saved, trained = load_file(tmp_path / "out" / "model.safetensors"), module.state_dict()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    own_head(made, library)[0].load_state_dict(saved)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list(NAMES)
    assert "load_state_dict" in ModelCard.load(tmp_path / "out" / "README.md").text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_its_library_can_save_is_saved_by_it(made: Made, tmp_path: Path) -> None:
    module = timm.create_model(f"local-dir:{made.timm}", pretrained=True)
    result = hfdetox.detoxify(module, labels=NAMES, dataset=made.digits, output=tmp_path / "out", **QUICK)
    assert result.report.model.library == "timm"
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def subset(made: Made, folder: Path, **rows: list[int]) -> Path:
    """Write some rows of the digits' splits as a dataset of its own; None for a picture that is none."""
    for split, chosen in rows.items():
        table = Dataset.from_parquet(str(made.digits / f"{'test' if split == 'test' else 'train'}.parquet"))
        folder.mkdir(exist_ok=True)
        table.select(chosen).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def renamed(made: Made, folder: Path) -> Path:
    """The digits under other classes' names."""
    table = Dataset.from_parquet(str(made.digits / "train.parquet"))
    names = [f"whale{i}" for i in range(9)]
    table = table.filter(lambda label: label < 9, input_columns="label")
    features = Features({"image": table.features["image"], "label": ClassLabel(names=names)})
    folder.mkdir()
    for split in ("train", "test"):
        table.cast(features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_what_is_wrong_with_a_dataset_is_said_before_the_weights_are_pulled(
    hub: HubServer, repo_name: Callable[..., str], made: Made, tmp_path: Path
) -> None:
    name = repo_name("model")
    hub.create_repo(name)
    hub.commit_folder(name, made.timm)
    other = renamed(made, tmp_path / "other")
    for dataset, said in (
        (other, "whale0"),
        (tmp_path / "nowhere", "nowhere: no such folder"),
        ("me/none", "is not on the Hub"),
    ):
        del hub.log[:]
        with pytest.raises((UsageError, HubError), match=said):
            hfdetox.detoxify(name, dataset=dataset, **QUICK)
        assert not any("model.safetensors" in request.path for request in hub.log)


def test_a_dry_run_reads_the_header_of_the_dataset_and_compares_the_classes(made: Made, tmp_path: Path) -> None:
    assert plan(str(made.timm), dataset=str(made.digits))["dataset"]["id"] == str(made.digits)
    for options, said in (({"split": "nope"}, "--split nope: the dataset has no such split"),
                          ({"label_column": "none"}, "none"), ({"image_column": "label"}, "label")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            plan(str(made.transformers), dataset=str(made.digits), **options)
    for model in (made.timm, made.transformers):
        with pytest.raises(LabelMismatchError, match="whale0"):
            plan(str(model), dataset=str(renamed(made, tmp_path / model.name)))


# ---- evaluate


def test_evaluate_measures_a_whole_split_and_needs_no_other(made: Made, tmp_path: Path) -> None:
    """Nothing is set aside: a few training images are enough, and so is one split."""
    few = subset(made, tmp_path / "few", train=list(range(5)), test=list(range(60)))
    alone = subset(made, tmp_path / "alone", test=list(range(60)))
    # a training image that no decoder reads
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    pictures = [{"bytes": b"none", "path": None}] * 5
    broken = Dataset.from_dict({"image": pictures, "label": list(range(5))}, features=features)
    broken.to_parquet(str(few / "train.parquet"))
    for model in (made.timm, made.transformers):
        first, second = (
            hfdetox.evaluate(model, dataset=folder, device="cpu", progress=False) for folder in (few, alone)
        )
        assert first.accuracy == second.accuracy
        assert first.accuracy.samples == 60
    with pytest.raises(UsageError, match="--samples 20: split train has 5 labelled images; ask for fewer"):
        hfdetox.detoxify(made.timm, dataset=few, **QUICK)


def test_evaluate_needs_no_image_of_every_class_and_says_which_split_it_wants(made: Made, tmp_path: Path) -> None:
    labels = Dataset.from_parquet(str(made.digits / "test.parquet"))["label"]
    part = subset(made, tmp_path / "part", test=[i for i, label in enumerate(labels) if label < 4][:40])
    measured = hfdetox.evaluate(made.timm, dataset=part, device="cpu", progress=False, eval_samples=30)
    assert measured.accuracy.samples == 30
    table = Dataset.from_parquet(str(made.digits / "train.parquet"))
    two = DatasetDict({"first": table.select([0, 1]), "second": table.select(range(50))})
    with pytest.raises(UsageError, match=r"choose one with --eval-split \(first, second\)"):
        hfdetox.evaluate(made.timm, dataset=two, device="cpu", progress=False)
    measured = hfdetox.evaluate(made.timm, dataset=two, eval_split="second", device="cpu", progress=False)
    assert measured.accuracy.samples == 50


# ---- places


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["evaluate", "x" * 311], 2, "no file and no repository can be called that"),
        (["detox", "x" * 311], 2, "no file and no repository can be called that"),
        (["evaluate", "./modle"], 2, "model ./modle: no such folder"),
        (["evaluate", "/no/modle"], 2, "modle: no such folder"),
        (["m", "--dataset", "./iamges"], 2, "dataset ./iamges: no such folder"),
        (["m", "--dataset", "d", "--seed", "9" * 30], 2, "--seed must be at least 0 and below 2^63"),
        (["m", "--output", "o" * 250, "--dataset", "d"], 2, "no file and no repository can be called that"),
        (["evaluate", "m", "--dataset", "d\x00"], 2, "can be called that"),
        (["evaluate", "m", "--dataset", "d\udcff"], 2, "can be called that"),
    ],
)  # fmt: skip
def test_places_that_are_none_are_one_line(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_folder_is_named_beside_the_hub(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", "models/mymodle"]) == 3
    assert "check the spelling (there is no folder of that name either)" in capsys.readouterr().err


# ---- whole models


def subfolder(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    for file in list(folder.iterdir()):
        if file.is_file():
            file.rename(folder / "checkpoint-500" / file.name)


def adapter(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "adapter_model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/vit"}')


def variant(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapter, "is an adapter on org/vit; merge it and save the whole model"),
        (subfolder, "its weights lie in checkpoint-500/"),
        (variant, "has model.fp16.safetensors and no model.safetensors; rename the right one to model.safetensors"),
    ],
)
def test_what_is_no_whole_model_is_called_so_in_a_folder_and_on_the_hub(
    change: Callable[[Path], None], said: str, hub: HubServer, repo_name: Callable[..., str], tmp_path: Path, made: Made
) -> None:
    folder = transformers_folder(tmp_path / "model", "vit")
    change(folder)
    name = repo_name("model")
    hub.create_repo(name)
    hub.commit_folder(name, folder)
    for model in (str(folder), name):
        with pytest.raises(UsageError) as caught:
            hfdetox.evaluate(model, dataset=made.digits, progress=False)
        assert said in str(caught.value)
