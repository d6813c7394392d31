"""NPD: folding is exact, the search and the terms by hand, and one layer's weight alone changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses import parse_defense
from hfdetox.defenses.npd import NPDConfig, Polarized, folded, polarized_layer
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from tests.defenses.pixels import linear, pixel_convnet, pixels
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, run
from tests.tiny_models import timm_model, transformers_model
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = NPDConfig(epochs=1, warmup=1, batch_size=24, layer="3", learning_rate=0.1)


def test_folding_by_hand() -> None:
    # (1 2) (1 1; 0 3) = (1, 1 + 6)
    polarizer = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    assert folded(torch.tensor([[1.0, 2.0]]), polarizer).tolist() == [[1, 7]]
    kernel = torch.tensor([[[[1.0, 5.0]], [[2.0, 0.0]]]])
    # at the second place of the kernel (5 0): (5, 5)
    assert folded(kernel, polarizer).tolist() == [[[[1, 5]], [[7, 5]]]]


def test_a_folded_polarizer_is_the_polarizer_before_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    polarizer = torch.randn(4, 4, generator=generator)
    torch.manual_seed(0)
    conv, dense = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Linear(4, 5)
    images, tokens = torch.randn(2, 4, 7, 7, generator=generator), torch.randn(2, 3, 4, generator=generator)
    with torch.no_grad():
        before = conv(nn.functional.conv2d(images, polarizer[:, :, None, None])), dense(tokens @ polarizer.T)
        for layer in (conv, dense):
            layer.weight.copy_(folded(layer.weight, polarizer))
        for expected, found in zip(before, (conv(images), dense(tokens)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_identity_changes_no_bit() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(folded(weight, torch.eye(4)), weight)


def test_the_search_by_hand() -> None:
    """logits = pixels: of class 0, target 1, and a step is (−0.1, +0.1). x + δ stays in [0, 1].

    (0.6, 0.5) becomes (0.5, 0.6); (1, 0.95) becomes (0.9, 1): both at their targets, so there is no second step.
    """
    network = linear([[1, 0], [0, 1]])
    polarized = Polarized(network, NPDConfig(layer="1", radius=10.0, steps=3))
    labels = torch.tensor([0, 0])
    delta, targets = polarized.perturbation(pixels((0.6, 0.5), (1.0, 0.95)), labels, polarized.original)
    assert targets.tolist() == [1, 1]
    torch.testing.assert_close(delta.flatten(1), torch.tensor([[-0.1, 0.1], [-0.1, 0.05]]), rtol=0, atol=1e-6)


def test_it_goes_on_below_six_in_ten() -> None:
    polarized = Polarized(linear([[1, 0], [0, 1]]), NPDConfig(layer="1", radius=10.0))
    images = pixels((0.6, 0.5), (0.9, 0.5))
    delta, _ = polarized.perturbation(images, torch.tensor([0, 0]), polarized.original)
    # after one step the first alone is at its target: a second for both
    torch.testing.assert_close(delta.flatten(1), torch.tensor([[-0.2, 0.2], [-0.2, 0.2]]), rtol=0, atol=1e-6)


def test_the_ball() -> None:
    delta = torch.tensor([6.0, 8.0]).view(1, 1, 1, 2)
    assert NPDConfig(radius=5.0).project(delta).flatten().tolist() == pytest.approx([3, 4])
    # 3 at a height of 32: 3/32 at 1
    assert float(NPDConfig().project(delta).norm()) == pytest.approx(3 / 32)


def test_the_terms_by_hand() -> None:
    polarized = Polarized(linear([[1, 0], [0, 1], [1, 1]]), NPDConfig(layer="1"))
    clean, moved = torch.tensor([[math.log(3), 0.0, 0.0]]), torch.tensor([[0.0, math.log(2), 0.0]])
    batch = Batch(torch.empty(0), torch.tensor([0]), torch.ones(1))
    terms = polarized.terms(batch, clean, moved, torch.tensor([2]))
    # p(x) = (.6, .2, .2) and p(x+δ) = (.25, .5, .25): −ln .6; −ln .25 of class 0; −ln .5 of y' = 1; −ln .75 of t = 2
    expected = {"clean_loss": 0.510826, "consistency": 1.386294, "untargeted": 0.693147, "targeted": 0.287682}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    assert terms["loss"].item() == pytest.approx(0.510826 + 0.4 * (1.386294 + 0.693147 + 0.287682), rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 1])
def test_one_weight_changes_and_holds_the_trained_polarizer(warmup: int, accelerator: Accelerator) -> None:
    network, old = pixel_convnet(), pixel_convnet()
    before = weights_of(network)
    phases = NPDConfig(epochs=1, warmup=warmup, batch_size=24, layer="3", learning_rate=0.1).phases(network)
    record = Engine(accelerator, ToyImages(), seed=3).run(network, phases)
    assert [row["phase"] for row in record.history] == ["npd-warmup"] * warmup + ["npd"]
    after = weights_of(network)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"model.3.weight"}
    polarized = phases[-1].network  # type: ignore[union-attr]
    assert isinstance(polarized, Polarized)
    assert float((polarized.polarizer.detach() - torch.eye(8)).abs().max()) > 1e-3
    # the old network with g standing before its second convolution
    g = nn.Conv2d(8, 8, 1, bias=False)
    with torch.no_grad():
        g.weight.copy_(polarized.polarizer[:, :, None, None])
    old.model[3] = nn.Sequential(g, old.model[3])  # type: ignore[index,operator]
    images = ToyImages().images
    assert images is not None
    with torch.no_grad():
        torch.testing.assert_close(network(images), old(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3)), "0"),
        # the last block, in front of the head
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3)), "1.0"),
        # no block of two to four layers: the last but one before the head
        (nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 3)), "4"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4), nn.Linear(4, 3)), "1"),
    ],
)
def test_the_layer_it_chooses(model: nn.Module, expected: str) -> None:
    assert polarized_layer(model, "auto") == expected
    assert NPDConfig().selected_layers(model) == [expected]


@pytest.mark.parametrize(("layer", "message"), [("*", "selects 0, 1, 2"), ("0", "one Linear or Conv2d of one group")])
def test_a_layer_it_cannot_stand_before(layer: str, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(UsageError, match=message):
        polarized_layer(model, layer)


def test_a_shortcut_that_is_registered_first_is_not_the_layer() -> None:
    """In the last block of either library here: its first convolution, not the projection beside it."""
    small = timm_model("resnetv2_18", layers=(1, 1), channels=(8, 16), stem_chs=8)
    assert polarized_layer(small, "auto") == "stages.1.blocks.0.conv1"
    assert isinstance(small.get_submodule("stages.1.blocks.0.downsample.conv"), nn.Conv2d)
    # of one basic layer with a projection (8 to 16 channels), as Hugging Face builds it
    model = transformers_model("resnet")
    found = polarized_layer(model, "auto")
    assert found == "resnet.encoder.stages.1.layers.0.layer.0.convolution"


def test_a_head_alone_has_no_place_for_it() -> None:
    with pytest.raises(UsageError, match="has no Linear or Conv2d of one group before its head"):
        polarized_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), "auto")


def test_class_weights_can_be_used(accelerator: Accelerator) -> None:
    config = NPDConfig(epochs=1, warmup=0, batch_size=16, layer="3", reweight="class")
    assert "worst_class_drop" in run(config, pixel_convnet(), accelerator).history[0]  # type: ignore[arg-type]


def test_seeds_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_repeatable_and_tidy(SMALL, pixel_convnet, accelerator)  # type: ignore[arg-type]
    assert_resumes(SMALL, pixel_convnet, accelerator, tmp_path, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "0"}, r"npd: stop must be in \(0, 1\]"),
        ({"radius": "0"}, "npd: radius must be positive and finite, or none"),
        ({"targeted": "-1"}, "npd: targeted must be at least 0 and finite"),
    ],
)
def test_wrong_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_defense("npd", settings)
