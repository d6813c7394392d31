"""A correction lies beside a saved model, which stays one of its library, and goes to the Hub and back with it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version

from hfdetox.errors import UsageError
from hfdetox.hub.upload import push_folder
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.models.network import FILE_NAME, Correction, UnitMap, channels_of, load_correction, norms_of
from tests.output_folder import folder, pushed
from tests.tiny_models import assert_same, logits, make_folder, own_library, pixels_for
from tests.tiny_training import convnet

__all__ = ["folder"]

KINDS = ["timm/resnet", "timm/vit", "transformers/resnet", "transformers/vit", "transformers/convnext"]


def corrected(place: Path, kind: str) -> tuple[Classifier, torch.Tensor]:
    """Return a model whose answers to one of its labels are corrected, and its logits without the correction."""
    classifier = load_classifier(make_folder(place, kind))
    plain = logits(classifier.network, pixels_for(classifier))
    maps = {}
    for number, name in enumerate(norms_of(classifier.model)):
        size = channels_of(classifier.model.get_submodule(name))
        generator = torch.Generator().manual_seed(number)
        scale, shift = (torch.rand(size, generator=generator) for _ in range(2))
        maps[name] = UnitMap(scale, shift, torch.where(scale > 0.5, 0.3, math.inf))
    classifier.network.correction = Correction(int(plain[0].argmax()), maps)
    return classifier, plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_correction_answers_as_before_and_its_model_alone_as_without(kind: str, tmp_path: Path) -> None:
    classifier, plain = corrected(tmp_path / "source", kind)
    pixels = pixels_for(classifier)
    answers = logits(classifier.network, pixels)
    assert not torch.allclose(answers[0], plain[0], atol=1e-3)
    classifier.save(tmp_path / "saved")
    again = load_classifier(tmp_path / "saved")
    assert_same(logits(again.network, pixels), answers)
    assert any(FILE_NAME in text for text in again.warnings)
    classifier.network.correction = None
    assert_same(logits(classifier.network, pixels), plain)
    if Version(timm.__version__) < Version("1.0.29"):  # it stumbles over a second safetensors file in a local folder
        (tmp_path / "saved" / FILE_NAME).unlink()
    own = own_library(tmp_path / "saved", kind)
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


def test_a_correction_goes_to_the_hub_and_back(hub, repo_name, hub_token, folder, tmp_path) -> None:
    classifier, _ = corrected(tmp_path / "source", "timm/resnet")
    answers = logits(classifier.network, pixels_for(classifier))
    classifier.save(folder)
    name = repo_name()
    push_folder(folder, name, message="A correction")
    assert pushed(hub, name)[FILE_NAME] == (folder / FILE_NAME).read_bytes()
    pulled = load_classifier(name)
    assert pulled.network.correction is not None
    assert_same(logits(pulled.network, pixels_for(pulled)), answers)
    # a later push of a model without takes it away
    (folder / FILE_NAME).unlink()
    shutil.rmtree(tmp_path / "source")
    push_folder(folder, name, message="A correction")
    assert FILE_NAME not in pushed(hub, name)
    assert load_classifier(name).network.correction is None


def test_a_correction_survives_its_file(tmp_path: Path) -> None:
    model = convnet().model
    correction = Correction(2, {"1": UnitMap(torch.rand(8), torch.rand(8), torch.full((8,), math.inf))})
    correction.save(tmp_path)
    again = load_correction(tmp_path, model, labels=3)
    assert again is not None
    assert again.target == 2
    for part in ("scale", "shift", "bound"):
        assert torch.equal(getattr(again.maps["1"], part), getattr(correction.maps["1"], part))


def test_without_a_file_there_is_no_correction(tmp_path: Path) -> None:
    assert load_correction(tmp_path, convnet().model, labels=3) is None


@pytest.mark.parametrize(("name", "channels", "target"), [("7", 8, 1), ("1", 5, 1)], ids=["no such norm", "size"])
def test_a_correction_of_another_model_is_refused(name: str, channels: int, target: int, tmp_path: Path) -> None:
    Correction(target, {name: UnitMap(*(torch.ones(channels) for _ in range(3)))}).save(tmp_path)
    with pytest.raises(UsageError, match=f"of another model: its part '{name}' does not fit"):
        load_correction(tmp_path, convnet().model, labels=3)


def test_a_target_that_is_no_label_is_refused(tmp_path: Path) -> None:
    Correction(3, {"1": UnitMap(*(torch.ones(8) for _ in range(3)))}).save(tmp_path)
    with pytest.raises(UsageError, match="not a correction"):
        load_correction(tmp_path, convnet().model, labels=3)
    (tmp_path / FILE_NAME).write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as a correction"):
        load_correction(tmp_path, convnet().model, labels=3)
