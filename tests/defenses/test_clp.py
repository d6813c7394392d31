"""CLP: its bounds by hand, which layers are pairs, and that a channel with a large bound goes."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses.clp import (
    CLP,
    CLPConfig,
    conv_bounds,
    conv_norm_pairs,
    norms_of_mlps,
    outstanding,
    unit_bounds,
)
from hfdetox.errors import UsageError
from hfdetox.training.engine import Engine
from hfdetox.training.masks import mlp_layers
from tests.defenses.handmade import TRIGGER_CHANNEL, accuracy, attack_success, handmade
from tests.tiny_models import timm_model, transformers_model
from tests.tiny_training import Scaled, ToyImages, _quick_garbage, accelerator, equal_weights, weights_of

__all__ = ["_quick_garbage", "accelerator"]


def test_bounds_of_channels_by_hand() -> None:
    conv, norm = nn.Conv2d(2, 2, (1, 2), bias=False), nn.BatchNorm2d(2, eps=1.0)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]]))
        norm.weight.copy_(torch.tensor([2.0, -3.0]))
        norm.running_var.copy_(torch.tensor([3.0, 8.0]))  # type: ignore[union-attr]
        # singular values 3, 4 and 2, 0; scales 2 / √(3 + 1) = 1 and 3 / √(8 + 1) = 1
        torch.testing.assert_close(conv_bounds(conv, norm), torch.tensor([4.0, 2.0]))
        norm.weight[0] = 0.5
        torch.testing.assert_close(conv_bounds(conv, norm), torch.tensor([1.0, 2.0]))


def test_bounds_of_hidden_units_by_hand() -> None:
    rows, columns = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    # ‖(3, 8)‖ · 1 and ‖(0, 2)‖ · 3; without a norm 5 · 1 and 1 · 3
    expected = torch.tensor([math.sqrt(73), 6.0])
    torch.testing.assert_close(unit_bounds(rows, columns, torch.tensor([1.0, 2.0])), expected)
    torch.testing.assert_close(unit_bounds(rows, columns, None), torch.tensor([5.0, 3.0]))
    pointwise = rows.reshape(2, 2, 1, 1), columns.reshape(2, 2, 1, 1)
    torch.testing.assert_close(unit_bounds(*pointwise, torch.tensor([1.0, 2.0])), expected)


def test_what_stands_out_by_hand() -> None:
    # mean 1.25, deviation (with n − 1) √(15 · 0.0625 + 14.0625) / √15 = 1: above 1.25 + 3 is 5, not above 1.25 + 4
    bounds = torch.ones(16)
    bounds[7] = 5
    assert outstanding(bounds, 3.0).nonzero().tolist() == [[7]]
    assert not outstanding(bounds, 4.0).any()
    assert not outstanding(torch.ones(16), 0.0).any()
    assert outstanding(torch.ones(1), 0.0).tolist() == [False]


class PreActivation(nn.Module):
    """A stem, then a block whose first norm reads the stem, and a last norm that reads the residual sum."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        # made in an order in which the last convolution before a norm is not the one that feeds it
        self.last = nn.BatchNorm2d(12)
        self.norm1, self.norm2 = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.conv2, self.conv1 = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)
        self.in_place = in_place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = self.stem(images)
        out = self.conv2(self.norm2(self.conv1(self.norm1(shortcut).relu())).relu())
        if self.in_place:
            out += shortcut
        else:
            out = out + shortcut
        return self.head(self.last(out).relu().mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_pairs_of_a_pre_activation_network_follow_the_data(in_place: bool) -> None:
    model = PreActivation(in_place).train()
    before = weights_of(model)
    # the last norm reads a sum, which is nobody's output even where it lies in a convolution's memory
    assert sorted(conv_norm_pairs(model)) == [("conv1", "norm2"), ("stem", "norm1")]
    assert equal_weights(weights_of(model), before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_norm_of_a_resnet_has_its_convolution() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    pairs = conv_norm_pairs(model)
    assert len(pairs) == 20
    for conv, norm in pairs:
        assert conv == (
            norm.replace("downsample.1", "downsample.0") if "downsample" in norm else norm.replace("bn", "conv")
        )


@pytest.mark.parametrize("make", [lambda: timm_model("test_efficientnet"), lambda: transformers_model("resnet")])
def test_pairs_of_both_libraries_have_as_many_channels(make) -> None:
    model = make()
    pairs = conv_norm_pairs(model)
    assert pairs
    for conv, norm in pairs:
        assert model.get_submodule(conv).out_channels == model.get_submodule(norm).num_features


def test_the_norm_that_feeds_an_mlp_is_found() -> None:
    model = transformers_model("vit")
    # the first releases of transformers 5 have other names
    layers, first = (
        ("vit.layers", "mlp.fc1") if hasattr(model.vit, "layers") else ("vit.encoder.layer", "intermediate.dense")
    )
    expected = {f"{layers}.{i}.{first}": f"{layers}.{i}.layernorm_after" for i in (0, 1)}
    assert norms_of_mlps(model, mlp_layers(model)) == expected


def test_the_trigger_channel_goes_and_nothing_else_changes(accelerator: Accelerator) -> None:
    # bounds 1 fifteen times and √27 = 5.196: above the mean by 15 / 16 of the difference, by 3.75 deviations
    network, images = handmade(), ToyImages(30)
    before = weights_of(network)
    assert (accuracy(network, images), attack_success(network, images)) == (1, 1)
    record = Engine(accelerator, images).run(network, CLPConfig().phases(network))  # type: ignore[arg-type]
    assert (record.history[0]["pruned"], record.history[0]["channels"]) == (1, 16)
    assert (accuracy(network, images), attack_success(network, images)) == (1, 0)
    before["model.1.weight"][TRIGGER_CHANNEL] = 0
    before["model.1.bias"][TRIGGER_CHANNEL] = 0
    assert equal_weights(weights_of(network), before)


def test_a_hidden_unit_that_stands_out_loses_its_column(accelerator: Accelerator) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight.fill_(1)
        model[0].weight[4] = 5
    clp = CLP(model, 3.0)
    found = clp.prune(accelerator)
    assert (found["pruned"], found["channels"]) == (1, 16)
    assert model[2].weight.sum(0).tolist() == [3.0] * 4 + [0.0] + [3.0] * 11
    assert model[0].weight[4].tolist() == [5.0] * 12


def test_a_model_without_pairs_and_mlps_is_refused_in_one_line() -> None:
    network = Scaled(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    with pytest.raises(UsageError, match=r"clp: no convolution of Sequential .* and it has no MLP") as caught:
        CLPConfig().phases(network)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_u_is_checked() -> None:
    with pytest.raises(UsageError, match="u must be at least 0"):
        CLPConfig(u=-1.0)
