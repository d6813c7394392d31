"""Masks on channels and units: what they multiply, that folding is exact, and how a threshold is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses._perturbed import OwnState
from hfdetox.errors import UsageError
from hfdetox.models.layers import probing
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.masks import ChannelMasks, MaskedNetwork, ThresholdSearch, norm_layers
from tests.defenses.handmade import TRIGGER_CHANNEL, accuracy, attack_success, convnet_logits, handmade, varied
from tests.tiny_models import timm_model, transformers_model
from tests.tiny_training import (
    Scaled,
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    mlp,
    weights_of,
)  # fmt: skip

__all__ = ["_quick_garbage", "accelerator"]


class Logits(nn.Module):
    """A library's model as a network: images in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: Any = self.model(images)
        return output if isinstance(output, torch.Tensor) else output.logits


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm resnet": (lambda: timm_model("test_resnet"), "norm"),
    "timm efficientnet": (lambda: timm_model("test_efficientnet"), "norm"),
    "timm vit": (lambda: timm_model("test_vit"), "units"),
    "timm convnext": (lambda: timm_model("test_convnext"), "units"),
    "transformers resnet": (lambda: transformers_model("resnet"), "norm"),
    "transformers vit": (lambda: transformers_model("vit"), "units"),
    "transformers swin": (lambda: transformers_model("swin"), "units"),
    "transformers convnext": (lambda: transformers_model("convnext"), "units"),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=5), "units"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_exact_and_changes_only_what_is_masked(family: str) -> None:
    make, kind = FAMILIES[family]
    network = Logits(make()).eval()
    masks = ChannelMasks(network, "anp")
    assert bool(norm_layers(network)) == (kind == "norm")
    generator = torch.Generator().manual_seed(1)
    # most stay 1: their parameters must keep every bit
    mask = torch.where(torch.rand(masks.count, generator=generator) < 0.3, 0.4, 1.0)
    mask[: masks.layers[0].units] = 1
    before = weights_of(network)
    with probing(network.model) as (images, _):
        assert images is not None
        masked = masks.logits(network, images, mask)
        assert equal_weights(weights_of(network), before)
        masks.fold(network, mask)
        assert torch.equal(network(images), masked)
    touched = {layer.weight for layer in masks.layers[1:]}
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert changed <= touched


def test_units_of_a_transformer_are_its_hidden_units_and_heads() -> None:
    network = Logits(transformers_model("vit"))
    masks = ChannelMasks(network, "rnp")
    # two layers of 32 hidden units and 2 heads of 16 / 2 columns
    assert masks.count == 2 * (32 + 2)
    assert {layer.width for layer in masks.layers} == {1, 8}
    heads = next(layer for layer in masks.layers if layer.width == 8)
    # the second is its name in the first releases of transformers 5
    assert heads.weight in (
        "model.vit.layers.0.attention.o_proj.weight",
        "model.vit.encoder.layer.0.attention.output.dense.weight",
    )
    mask = torch.ones(masks.count)
    offset = sum(layer.units for layer in masks.layers[: masks.layers.index(heads)])
    mask[offset + 1] = 0
    old = network.get_parameter(heads.weight).detach().clone()
    masks.fold(network, mask)
    new = network.get_parameter(heads.weight)
    assert torch.equal(new[:, :8], old[:, :8])
    assert not new[:, 8:].any()


def test_masks_and_shifts_of_batchnorm_by_hand() -> None:
    network = varied(convnet())
    masked = MaskedNetwork(network, ChannelMasks(network, "anp"))
    images, before = ToyImages(6).images, weights_of(network)
    assert images is not None
    generator = torch.Generator().manual_seed(2)
    delta, xi = torch.randn(2, 8, generator=generator) * 0.2
    masked.train()
    with torch.no_grad():
        masked.mask.mul_(0.5)
        plain, noisy = masked(images, None, (delta, xi))
        norm = network.model[1]
        torch.testing.assert_close(
            plain, convnet_logits(network, images, norm.weight * 0.5, norm.bias), rtol=1e-4, atol=1e-5
        )
        expected = convnet_logits(network, images, norm.weight * (0.5 + delta), norm.bias * (1 + xi))
        torch.testing.assert_close(noisy, expected, rtol=1e-4, atol=1e-5)
    # the running statistics did not move either, and the norm still keeps them
    assert equal_weights(weights_of(network), before)
    assert norm.track_running_stats


def test_a_plain_mlp_is_masked_where_its_head_reads() -> None:
    layers = ChannelMasks(mlp(), "anp").layers
    assert [(layer.weight, layer.shift, layer.units) for layer in layers] == [("model.4.weight", None, 16)]


def test_a_network_with_nothing_to_mask_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"anp: prunes channels of BatchNorm.*Sequential has none") as caught:
        ChannelMasks(Scaled(nn.Sequential(nn.Flatten(), nn.Linear(192, 3))), "anp")
    assert "\n" not in str(caught.value)


def test_masks_go_back_into_their_interval() -> None:
    masked = MaskedNetwork(mlp(), ChannelMasks(mlp(), "anp"))
    with torch.no_grad():
        masked.mask[:3] = torch.tensor([-0.5, 0.5, 1.5])
    masked.project()
    assert masked.mask[:4].tolist() == [0, 0.5, 1, 1]


def test_masks_of_another_network_are_refused() -> None:
    masked = MaskedNetwork(mlp(), ChannelMasks(mlp(), "anp"))
    with pytest.raises(UsageError, match="saved state of the defense is of another model"):
        OwnState(masked).load_state_dict({"mask": torch.ones(8)})


@pytest.mark.parametrize(
    ("budget", "threshold", "pruned"),
    [
        # right of 10: whole 10; candidates 10, 9, 10. A drop of 1 in 10 ends the search unless the budget is 0.1
        (0.0, 0.1, 1),
        (0.09, 0.1, 1),
        (0.1, 0.4, 3),
    ],
)
def test_the_threshold_rises_until_the_budget_is_spent(
    budget: float, threshold: float, pruned: int, accelerator: Accelerator
) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    old = network[2].weight.detach().clone()
    values = torch.tensor([0.05, 0.15, 0.25, 1.0])
    # 0.0 prunes nothing, 0.3 and 0.4 the same three
    search = ThresholdSearch(network, ChannelMasks(network, "anp"), lambda: values, (0.0, 0.1, 0.2, 0.3, 0.4), budget)
    search.start()
    assert [(candidate, kept.tolist()) for candidate, kept in search.candidates] == [
        (-1.0, [1, 1, 1, 1]), (0.1, [0, 1, 1, 1]), (0.2, [0, 0, 1, 1]), (0.4, [0, 0, 0, 1]),
    ]  # fmt: skip
    search.counts = torch.tensor([10.0, 10.0, 9.0, 10.0, 10.0])
    found = search.finish(accelerator)
    assert (found["threshold"], found["pruned"], found["units"]) == (threshold, pruned, 4)
    assert (found["held_out_accuracy_before"], found["held_out_accuracy"]) == (1.0, 1.0)
    assert not network[2].weight[:, :pruned].any()
    assert torch.equal(network[2].weight[:, pruned:], old[:, pruned:])


def test_where_every_candidate_costs_too_much_nothing_is_pruned(accelerator: Accelerator) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = weights_of(network)
    search = ThresholdSearch(network, ChannelMasks(network, "anp"), lambda: torch.zeros(4), (0.0,), 0.02)
    search.start()
    search.counts = torch.tensor([10.0, 5.0, 10.0])
    assert search.finish(accelerator)["threshold"] == -1
    assert equal_weights(weights_of(network), before)


def test_the_candidates_are_counted_over_all_batches() -> None:
    network, images = handmade(), ToyImages(30)
    assert images.images is not None
    values = torch.ones(16)
    values[0::3] = 0.5
    search = ThresholdSearch(network, ChannelMasks(network, "anp"), lambda: values, (0.5,), 0.02)
    search.start()
    with torch.no_grad():
        for rows in (slice(0, 12), slice(12, 30)):
            labels = images.labels[rows]
            search.on_batch(network, Batch(images.images[rows], labels, torch.full((len(labels),), 1 / len(labels))))
    # channels 0, 3, 6, 9, 12 (and 15) are class 0's: its third of the images is lost
    assert search.counts.tolist() == [30, 20, 30]


def test_the_channel_of_a_backdoor_goes_and_no_more(accelerator: Accelerator) -> None:
    network, images = handmade(), ToyImages(60)
    before = weights_of(network)
    assert (accuracy(network, images), attack_success(network, images)) == (1, 1)
    values = torch.ones(16)
    values[0::3] = 0.5
    values[TRIGGER_CHANNEL] = 0.1
    search = ThresholdSearch(network, ChannelMasks(network, "anp"), lambda: values, (0.0, 0.1, 0.2, 0.5, 0.6), 0.02)
    record = Engine(accelerator, images).run(network, [search.as_pass("prune", Nothing())])
    assert record.history[0]["threshold"] == 0.2
    assert (accuracy(network, images), attack_success(network, images)) == (1, 0)
    before["model.1.weight"][TRIGGER_CHANNEL] = 0
    assert equal_weights(weights_of(network), before)


class Nothing:
    """The state of a method that has none."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Take nothing."""
