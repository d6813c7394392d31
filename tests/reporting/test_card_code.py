"""The code that a card gives to load the model runs, and gives what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hfdetox.reporting.card import build_card
from tests.written_report import card_of, written_report


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_code_for_timm_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    local = build_card(written_report(), source_card=None, repo_id=None)
    names: dict[str, object] = {}
    exec(snippets(local)[0], names)  # noqa: S102 - our own words, which a reader is told to run
    assert tuple(names["probabilities"].shape) == (1, 3)  # type: ignore[attr-defined]
    assert 'timm.create_model("hf_hub:me/net-detoxed"' in card_of(written_report())


def test_the_code_for_transformers_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    card = build_card(written_report(library="transformers"), source_card=None, repo_id=None)
    names: dict[str, object] = {}
    for snippet in snippets(card):
        exec(snippet, names)  # noqa: S102 - our own words, which a reader is told to run
    assert tuple(names["probabilities"].shape) == (1, 3)  # type: ignore[attr-defined]
    assert "LABEL_" in capsys.readouterr().out
    assert ModelCard(card).data.library_name == "transformers"


def test_the_code_for_a_plain_module_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    model = torch.nn.Linear(2, 3)
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    expected = model.bias.detach() + 1
    monkeypatch.chdir(tmp_path)
    card = build_card(written_report(library="torch"), source_card=None, repo_id=None)
    exec(snippets(card)[0], {"model": model})  # noqa: S102 - our own words, which a reader is told to run
    assert torch.equal(model.bias.detach(), expected)
    assert ModelCard(card).data.library_name is None
    assert 'hf_hub_download("me/net-detoxed", "model.safetensors")' in card_of(written_report(library="torch"))
