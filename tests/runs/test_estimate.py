"""What a run will take, said before its weights are pulled and before any image is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hfdetox.cli import app as cli
from hfdetox.config import DetoxOptions
from hfdetox.data.opened import open_dataset
from hfdetox.detox import plan
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.models.initial import draw_like
from hfdetox.runs.estimate import UncountedError, count_images
from tests import backdoored
from tests.backdoored import Made
from tests.hub_server.server import HubServer

SPEED = 100.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def chosen(dataset: Any, **options: Any) -> tuple[int, int]:
    given = DetoxOptions("model", dataset=str(dataset), **options)
    opened = open_dataset(dataset, given, warn=pytest.fail)
    return count_images(opened, given)


def test_the_header_says_how_many_images_there_are(made: Made, tmp_path: Path) -> None:
    rows = [len(Dataset.from_parquet(str(made.digits / f"{split}.parquet"))) for split in ("train", "test")]
    assert chosen(made.digits, clean_samples=100) == (100, rows[1])
    assert chosen(made.digits, clean_samples=0.1, eval_samples=50) == (round(0.1 * rows[0]), 50)
    assert chosen(made.digits, split="test", eval_split="train", eval_samples=10**6) == (round(0.05 * rows[1]), rows[0])
    # one split alone: a fifth of it is set apart to measure
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train.parquet").symlink_to(made.digits / "train.parquet")
    table = Dataset.from_parquet(str(made.digits / "train.parquet"))
    assert chosen(table, clean_samples=1.0) == (rows[0], int(0.2 * rows[0]))
    assert chosen(table, eval_samples=7) == (round(0.05 * rows[0]), 7)


def test_a_stream_that_does_not_say_how_many_needs_counts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [json.dumps({"image": {"bytes": None, "path": "x.png"}, "label": 0})] * 3
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    options = {"image_column": "image", "label_column": "label"}
    with pytest.raises(UncountedError, match="give --samples and --eval-samples as counts"):
        chosen(tmp_path, **options)
    with pytest.raises(UncountedError):
        chosen(tmp_path, clean_samples=20, **options)
    assert chosen(tmp_path, clean_samples=20, eval_samples=30, **options) == (20, 30)


def test_the_network_of_an_estimate_is_like_the_model(
    hub: HubServer, repo_name: Callable[..., str], made: Made
) -> None:
    for folder in (made.timm, made.transformers):
        name, real = repo_name("model"), load_classifier(folder)
        hub.create_repo(name)
        hub.commit_folder(name, folder)
        hub.log.clear()
        state = torch.random.get_rng_state()
        drawn = draw_like(name, revision=None, trust_remote_code=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not any(request.path.endswith(".safetensors") for request in hub.log)
        shapes = [{key: tensor.shape for key, tensor in one.model.state_dict().items()} for one in (real, drawn)]
        assert shapes[0] == shapes[1]
        assert (drawn.labels, drawn.network.input_size) == (real.labels, real.network.input_size)


def test_a_configuration_far_larger_than_its_weights_is_not_built(
    hub: HubServer, repo_name: Callable[..., str], tmp_path: Path, made: Made
) -> None:
    name, folder = repo_name("model"), shutil.copytree(made.transformers, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    large = {"num_hidden_layers": 50_000, "depths": [50_000] * len(config.get("depths", ()))}
    (folder / "config.json").write_text(json.dumps(config | {key: large[key] for key in large.keys() & config.keys()}))
    hub.create_repo(name)
    hub.commit_folder(name, folder)
    planned = plan(name, dataset=str(made.digits))
    assert "describes a network of more than" in planned["time"]
    assert "minutes" not in planned


def test_a_dry_run_says_what_the_run_takes(
    hub: HubServer, repo_name: Callable[..., str], made: Made, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfdetox.runs.estimate.speed_of", lambda *_: SPEED)
    name = repo_name("model")
    hub.create_repo(name)
    hub.commit_folder(name, made.timm)
    images = ["--dataset", str(made.digits), "--samples", "100", "--eval-samples", "300", "--device", "cpu"]
    words = [*images, "--defense", "ft", "--epochs", "600", "--no-scan", "--dry-run"]
    for model in (name, str(made.timm)):
        assert cli.run([model, *words, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        # 60,000 there and back, and a third of 300 twice
        assert planned["minutes"] == [round(60_200 / SPEED / 60, 2)] * 2
        assert planned["time"] == "about 10 minutes on this CPU"
    assert cli.run([name, *words]) == 0
    assert "time: about 10 minutes on this CPU" in capsys.readouterr().out
    assert cli.run([name, *words, "--max-minutes", "11"]) == 0
    assert cli.run([name, *words, "--max-minutes", "9"]) == 2
    assert "the run takes about 10 minutes on this CPU, more than --max-minutes 9" in capsys.readouterr().err
    assert cli.run([name, *images, "--dry-run", "--defense", "clp"]) == 0
    assert "time: about 1 minute on this CPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_has_no_estimate(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> float:
        raise UsageError("no such network")

    monkeypatch.setattr("hfdetox.runs.estimate.time_like", never)
    assert plan(str(made.timm), dataset=str(made.digits))["time"] == "not known: no such network"
