"""Models and images that `scan`, `verify`, `gate` and `push` cannot judge: one clear line each, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from timm.models import save_for_hf
from torch import nn

from hfdetox import scan
from hfdetox.cli import app as cli
from hfdetox.evidence.results import Finding
from tests.runs.test_signing import keys
from tests.written_report import written_report

SIDE = 32


def pictures(folder: Path, classes: int, each: int) -> Path:
    """Write a dataset of noise with a train and a test split, `each` images a class."""
    numbers, features = np.random.default_rng(0), Features({"image": Image(), "label": ClassLabel(classes)})
    for split in ("train", "test"):
        labels = [place % classes for place in range(classes * each)]
        images = [Pictures.fromarray(numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in labels]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def network(folder: Path, classes: int) -> Path:
    """Write an untrained timm model."""
    torch.manual_seed(0)
    model = timm.create_model(
        "test_resnet", num_classes=classes, pretrained_cfg_overlay={"input_size": (3, SIDE, SIDE)}
    )
    config = {"label_names": [str(label) for label in range(classes)]}
    save_for_hf(model, folder, model_config=config, model_args={"num_classes": classes}, safe_serialization=True)
    return folder


def said(words: list[Any], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that ends with `status` and return the line of its error, or else its last line."""
    capsys.readouterr()
    assert cli.run([*map(str, words)]) == status
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "warning: " not in line]
    assert len(errors) == (not out.strip()), err
    return errors[0] if errors else out.splitlines()[-1]


@pytest.mark.parametrize("images", [True, False])
def test_two_classes_are_unknown_with_images_and_without(
    images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(tmp_path / "model", 2)
    given = ["--dataset", pictures(tmp_path / "images", 2, 30), "--samples", "50"] if images else []
    line = said(["scan", model, *given, "--device", "cpu"], 0, capsys)
    assert line.startswith("scan: unknown: 2 classes are too few to tell one that stands out")
    capsys.readouterr()
    assert cli.run(["gate", str(model), *map(str, given), "--device", "cpu"]) == 30
    shown = capsys.readouterr().out
    assert f"model at the gate, {'images of images' if images else 'without images'}" in shown
    assert shown.splitlines()[-1] == "verdict: UNKNOWN (exit status 30)"
    assert "2 classes are too few" in shown.splitlines()[-2]


def test_a_thousand_classes_with_an_image_each_are_refused_or_scanned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = network(tmp_path / "model", 1000), pictures(tmp_path / "images", 1000, 1)
    words = [model, "--dataset", images, "--device", "cpu"]
    line = said(["scan", *words], 2, capsys)
    assert "--samples 0.05 gives 50 images, fewer than the 1000 classes; give --samples 1000 or more" in line
    assert "--samples 1001: split train has 1000 labelled images" in said(
        ["scan", *words, "--samples", 1001], 2, capsys
    )
    assert said(["gate", *words], 30, capsys) == "verdict: UNKNOWN (exit status 30)"
    (images / "test.parquet").unlink()
    assert "fewer than the 800 classes" in said(["scan", *words], 2, capsys)


def test_a_head_that_is_no_linear_layer_leaves_scores_out_and_says_so(tmp_path: Path) -> None:
    class Distances(nn.Module):
        """Gives distances to prototypes as logits."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3, stride=4)
            self.prototypes = nn.Parameter(torch.randn(5, 8))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return -torch.cdist(self.body(pixels).mean((2, 3)), self.prototypes)

    def prepared(image: Pictures.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1) / 255

    torch.manual_seed(0)
    images = pictures(tmp_path / "images", 5, 20)
    found = scan(Distances(), preprocessing=prepared, labels=[str(label) for label in range(5)], dataset=str(images),
                 clean_samples=80, device="cpu", progress=False)  # fmt: skip
    assert found.scan.finding == Finding.UNKNOWN
    for name in ("latent-shift", "head-probe"):
        assert found.scan.scores[name].statistic is None
        assert "is neither a Linear nor a plain 1×1 Conv2d layer" in found.scan.scores[name].note
    # a callable's own floats are no grey levels
    assert found.scan.scores["odd-images"].note.startswith("needs images in ")


@pytest.mark.parametrize("command", ["verify", "push", "report"])
def test_a_model_without_a_report_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command, network(tmp_path / "model", 3), *(["me/x"] if command == "push" else [])]
    assert "model has no detox_report.json" in said(words, 2, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["private", "text", "missing", "folder"])
def test_what_is_no_public_key_is_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(tmp_path / "model", 3)
    private, _ = keys(tmp_path, "mine")
    (tmp_path / "text.pub").write_text("ssh-ed25519 AAAA me\n")
    key = {"private": private, "text": tmp_path / "text.pub", "missing": tmp_path / "none.pub", "folder": model}[kind]
    # a report that can be read, so that nothing but the key is wrong
    (model / "detox_report.json").write_text(json.dumps(written_report().to_dict()))
    line = said(["verify", model, "--public-key", key, "--device", "cpu"], 2, capsys)
    assert str(key.name) in line
