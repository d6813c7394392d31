"""Weights under names that a wrapper or a training left: taken off, or told with what to do."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from tests.tiny_models import assert_same, edit_weights, make_folder, pixels_for


@pytest.mark.parametrize(
    ("rename", "advice"),
    [
        (lambda name: f"module.{name}", r"DataParallel put module\. before the names"),
        (lambda name: f"_orig_mod.{name}", r"torch\.compile put _orig_mod\. before the names"),
        (lambda name: f"model.{name}", r"a wrapper put model\. before the names"),
    ],
)
@pytest.mark.parametrize("kind", ["transformers/vit", "transformers/resnet"])
def test_names_behind_a_wrapper_are_told(tmp_path, kind, rename, advice):
    source = make_folder(tmp_path / "source", kind)
    edit_weights(source, lambda state: {rename(name): tensor for name, tensor in state.items()})
    with pytest.raises(UsageError, match=advice) as caught:
        load_classifier(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_timm_takes_the_names_of_two_wrappers_off(tmp_path, prefix):
    source = make_folder(tmp_path / "source", "timm/resnet")
    plain = load_classifier(source)
    edit_weights(source, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    pixels = pixels_for(plain)
    with torch.no_grad():
        assert_same(load_classifier(source).network(pixels), plain.network(pixels))


@pytest.mark.parametrize("kind", ["timm/vit", "transformers/vit"])
@pytest.mark.parametrize("name", ["loss_fct.weight", "criterion.weight"])
def test_a_tensor_of_the_loss_is_told(tmp_path, kind, name):
    source = make_folder(tmp_path / "source", kind)
    edit_weights(source, lambda state: state | {name: torch.ones(5)})
    with pytest.raises(UsageError, match=rf"unexpected: {name}\); it holds a tensor of the training's loss"):
        load_classifier(source)
