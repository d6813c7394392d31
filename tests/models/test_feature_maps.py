"""Stages of each family of both libraries, their layouts, and that the model is left as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from hfdetox.errors import UsageError
from hfdetox.models.feature_maps import Stage, captured, last_stages
from tests.tiny_models import timm_model, transformers_model

# "vit.encoder.layer.0" in the first releases of transformers 5
VIT_BLOCKS = [
    name for name, _ in transformers_model("vit").named_modules() if re.fullmatch(r"vit\.(encoder\.)?layers?\.\d", name)
]
# model, names of the last three stages (None: only how many), layout, tokens in front
CASES: dict[str, tuple[Any, list[str] | int, str, int]] = {
    "timm resnet": (lambda: timm_model("test_resnet"), ["layer2", "layer3", "layer4"], "NCHW", 0),
    "timm vit": (lambda: timm_model("test_vit"), ["blocks.3", "blocks.4", "blocks.5"], "NTC", 1),
    "timm convnext": (lambda: timm_model("test_convnext"), ["stages.1", "stages.2", "stages.3"], "NCHW", 0),
    "timm efficientnet": (lambda: timm_model("test_efficientnet"), 3, "NCHW", 0),
    "timm swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 2)),
        ["layers.0", "layers.1"], "NHWC", 0,
    ),
    "timm deit, distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1),
        ["blocks.0"], "NTC", 2,
    ),
    "transformers vit": (lambda: transformers_model("vit"), VIT_BLOCKS, "NTC", 1),
    "transformers deit, distilled": (lambda: transformers_model("deit-teacher"), 2, "NTC", 2),
    "transformers beit": (lambda: transformers_model("beit"), 2, "NTC", 1),
    "transformers swin": (lambda: transformers_model("swin"), 2, "NTC", 0),
    "transformers convnext": (lambda: transformers_model("convnext"), 3, "NCHW", 0),
    "transformers resnet": (
        lambda: transformers_model("resnet"), ["resnet.encoder.stages.0", "resnet.encoder.stages.1"], "NCHW", 0,
    ),
    "transformers mobilevit": (lambda: transformers_model("mobilevit"), 3, "NCHW", 0),
    "torchvision resnet": (
        lambda: torchvision.models.resnet18(num_classes=5), ["layer2", "layer3", "layer4"], "NCHW", 0,
    ),
    "torchvision mobilenet": (
        # a row of 19 blocks: the last of the sizes 8, 4 and 2 of a 64-pixel image
        lambda: torchvision.models.mobilenet_v2(num_classes=5), ["features.6", "features.13", "features.18"], "NCHW", 0,
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(40, 8, 1, 2, 16, 16, num_classes=5),
        ["encoder.layers.encoder_layer_0"], "NTC", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_stages_of_each_family(case: str) -> None:
    torch.manual_seed(0)
    make, names, layout, prefix = CASES[case]
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    stages = last_stages(model, 3)
    found = [stage.name for stage in stages]
    assert (found if isinstance(names, list) else len(found)) == names
    assert {(stage.layout, stage.prefix) for stage in stages} == {(layout, prefix)}
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in found)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_features_of_each_layout() -> None:
    numbers = torch.arange(24.0)
    # two channels at 3×4 positions
    first = Stage("x", "NCHW").features(numbers.view(1, 2, 3, 4))
    assert first.shape == (1, 12, 2)
    assert first[0, 5].tolist() == [5, 17]
    last = Stage("x", "NHWC").features(numbers.view(1, 3, 4, 2))
    assert last[0, 5].tolist() == [10, 11]
    tokens = Stage("x", "NTC", prefix=1).features(numbers.view(1, 12, 2))
    assert tokens.shape == (1, 11, 2)
    assert tokens[0, 0].tolist() == [2, 3]


def test_captured_keeps_first_tensors_and_removes_its_hooks() -> None:
    class Pair(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
            return images * 2, 7

    model = nn.Sequential(nn.Identity(), Pair())
    with captured(model, ["0", "1"]) as outputs:
        model(torch.ones(2))
    assert {name: tensor.tolist() for name, tensor in outputs.items()} == {"0": [1, 1], "1": [2, 2]}
    assert not any(module._forward_hooks for module in model.modules())


def test_plain_numbered_layers_are_found() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2)
            self.fc1, self.fc2 = nn.Linear(8, 500), nn.Linear(500, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.conv2(self.conv1(images).relu()).relu().mean((2, 3))
            return self.fc2(self.fc1(hidden).relu())

    assert [stage.name for stage in last_stages(Plain(), 3)] == ["conv1", "conv2"]


def test_a_model_without_positions_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    for size in (None, (3, 8, 8)):
        with pytest.raises(UsageError, match="Sequential has no stages or blocks that give feature maps"):
            last_stages(model, 3, size)
