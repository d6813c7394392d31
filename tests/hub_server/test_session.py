"""The test Hub under the libraries above the client, and in the processes of a test session."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from hfdetox.hub.client import http

# The libraries above the client


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_load_dataset_parquet_and_streaming(hub, repo_name, hub_token):
    import datasets

    name = repo_name("data")
    images = [{"bytes": png(n), "path": None} for n in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    made.push_to_hub(name)
    loaded = datasets.load_dataset(name, split="train")
    assert loaded["label"] == [0, 1] * 3
    assert loaded.features["label"].names == ["no", "yes"]
    assert loaded[5]["image"].getpixel((0, 0)) == (5, 5, 5)
    stream = datasets.load_dataset(name, split="train", streaming=True)
    assert [row["image"].getpixel((0, 0))[0] for row in stream] == list(range(6))
    assert any(entry.range and entry.status == 206 for entry in hub.log)


def test_load_dataset_imagefolder(hub, repo_name):
    import datasets

    name = repo_name("folder")
    hub.create_repo(name, "dataset")
    files = {
        f"{split}/{kind}/{n}.png": png(n) for split in ("train", "test") for kind in ("cat", "dog") for n in (1, 2)
    }
    hub.commit(name, files, repo_type="dataset")
    loaded = datasets.load_dataset(name)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "test": 4}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    stream = datasets.load_dataset(name, split="test", streaming=True)
    assert [(row["label"], row["image"].getpixel((0, 0))[0]) for row in stream] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_transformers_round_trip(hub, repo_name, hub_token):
    import torch
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    name = repo_name("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    made = ResNetForImageClassification(config).eval()
    made.push_to_hub(name)
    loaded = AutoModelForImageClassification.from_pretrained(name).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(made(images).logits, loaded(images).logits)
    parameters = sum(tensor.numel() for tensor in made.state_dict().values() if tensor.is_floating_point())
    assert HfApi().model_info(name).safetensors.parameters["F32"] == parameters


def test_timm_round_trip(hub, repo_name, hub_token):
    import timm
    import torch

    name = repo_name("timm")
    torch.manual_seed(0)
    made = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.push_to_hf_hub(made, name, model_config={"num_classes": 3}, safe_serialization=True)
    loaded = timm.create_model(f"hf_hub:{name}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(made(images), loaded(images))


# The fixtures


def test_cli_runs_in_an_environment_of_its_own(hub, run_cli, fresh_env):
    done = run_cli(["--version"])
    assert done.returncode == 0, done.stderr
    assert "HF_TOKEN" not in fresh_env
    assert fresh_env["HF_HOME"] != os.environ["HF_HOME"]
    code = "from huggingface_hub import constants as c; print(c.ENDPOINT, c.HF_HOME)"
    shown = subprocess.run([sys.executable, "-c", code], env=fresh_env, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [hub.url, fresh_env["HF_HOME"]]


def test_session_refuses_to_start_after_the_client_was_imported():
    command = [sys.executable, "-c", "import huggingface_hub, tests.conftest"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "was imported before tests/conftest.py" in done.stderr


def test_server_runs_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.hub_server.server", "--root", str(tmp_path), "--port", "0"]
    folder = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().split()[1].removeprefix("HF_ENDPOINT=")
            assert http.get(f"{endpoint}/api/whoami-v2").status_code == 401
        finally:
            process.terminate()
