"""LIRA: a hand-set autoencoder, what rounding leaves of it, other sizes, and states that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers._networks import load_network, network_state
from hfdetox.triggers.lira import LIRA, Autoencoder, change
from tests.triggers.made import autoencoder_state, noise

STATE = autoencoder_state()
MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])


def flat(*values: float) -> dict[str, torch.Tensor]:
    """Return the state of an autoencoder whose last layer only has a bias: these values, one a channel, everywhere."""
    network = Autoencoder(len(values))
    last = network.layers[-1]
    assert isinstance(last, torch.nn.ConvTranspose2d)
    assert last.bias is not None
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([math.atanh(value) for value in values]))
    return network_state(network)


def test_the_autoencoder_has_the_layers_of_the_paper() -> None:
    network = Autoencoder(3)
    # kernels and biases down: 784 + 8 224 + 32 832 + 131 200, up: 131 136 + 32 800 + 8 208 + 771;
    # batch norms twice their widths: 2·(16 + 32 + 64 + 128 + 64 + 32 + 16)
    assert sum(parameter.numel() for parameter in network.parameters()) == 346_659
    assert network(torch.zeros(2, 3, 48, 32)).shape == (2, 3, 48, 32)


@pytest.mark.parametrize("side", [32, 48])
def test_a_hand_set_autoencoder_adds_its_values_times_epsilon_and_std(side: int) -> None:
    std = torch.tensor([0.2, 0.4, 1.0])
    trigger = LIRA(epsilon=0.1, autoencoder=flat(0.5, -0.5, 0.9), mean=torch.zeros(3), std=std)
    images = torch.full((2, 3, side, side), 100, dtype=torch.uint8)
    # 255 · 0.1 · std · A: 2.55, −5.1 and 22.95, rounded
    for channel, expected in enumerate((103, 95, 123)):
        assert (trigger.apply(images)[:, channel] == expected).all()


def test_white_stays_white_and_black_black() -> None:
    grey = LIRA(epsilon=0.5, autoencoder=flat(0.9))
    assert (grey.apply(torch.full((1, 1, 32, 32), 200, dtype=torch.uint8)) == 255).all()
    grey = LIRA(epsilon=0.5, autoencoder=flat(-0.9))
    assert (grey.apply(torch.full((1, 1, 32, 32), 100, dtype=torch.uint8)) == 0).all()


@pytest.mark.parametrize(("value", "expected"), [(0.77, 100), (0.8, 101), (-0.8, 99), (0.999, 101)])
def test_at_the_papers_epsilon_rounding_leaves_one_grey_level_or_nothing(value: float, expected: int) -> None:
    # 255 · 0.25 · 0.01 = 0.6375 grey levels, half a level is 0.784 of them
    trigger = LIRA(autoencoder=flat(value), std=torch.tensor([0.25]))
    assert (trigger.apply(torch.full((1, 1, 32, 32), 100, dtype=torch.uint8)) == expected).all()


def test_mean_and_std_normalise_what_the_autoencoder_sees() -> None:
    images = noise()
    network = load_network(lambda: Autoencoder(3), STATE, "test")
    mean, std = MEAN.view(3, 1, 1), STD.view(3, 1, 1)
    expected = images + 255 * std * 0.1 * network((images.float() / 255 - mean) / std)
    stamped = LIRA(epsilon=0.1, autoencoder=STATE, mean=MEAN, std=STD).apply(images)
    assert float((stamped - expected.clamp(0, 255)).abs().max()) <= 0.501
    assert not torch.equal(stamped, LIRA(epsilon=0.1, autoencoder=STATE).apply(images))


def test_other_sizes_run_at_the_trained_one() -> None:
    images = noise(2, 3, 64, 96)
    network = load_network(lambda: Autoencoder(3), STATE, "test")
    drawn = network(interpolate(images.float() / 255, size=(32, 32), mode="bilinear", antialias=True))
    expected = images + 25.5 * interpolate(drawn, size=(64, 96), mode="bilinear")
    stamped = LIRA(epsilon=0.1, autoencoder=STATE).apply(images)
    assert float((stamped - expected.clamp(0, 255)).abs().max()) <= 0.501


def test_the_change_can_be_learnt_through() -> None:
    torch.manual_seed(0)
    network, zero, one = Autoencoder(3), torch.zeros(()), torch.ones(())
    change(network, noise().float(), zero, one, 0.01, 32).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert float(network.layers[-1].bias.grad.abs().sum()) > 0  # type: ignore[union-attr, operator, arg-type]


def test_the_file_keeps_the_statistics_and_the_normalisation(tmp_path: Path) -> None:
    made = LIRA(epsilon=0.05, autoencoder=STATE, mean=MEAN, std=STD)
    made.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert torch.equal(again.apply(noise()), made.apply(noise()))
    names = set(again.tensors())
    assert {"mean", "std", "autoencoder.layers.1.running_var"} <= names
    assert not [name for name in names if name.endswith("num_batches_tracked")]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UsageError, match=r"lira: autoencoder .*: layers.0.weight is nothing"):
        LIRA(autoencoder={"other": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"layers.0.weight is \(0, 10000000000000000, 4, 4\) where \(16, 3, 4, 4\)"):
        LIRA(autoencoder={"layers.0.weight": torch.zeros(0, 10**16, 4, 4)})
    with pytest.raises(UsageError, match=r"lira: mean must be of shape \(3,\), got \(1,\)"):
        LIRA(autoencoder=STATE, mean=torch.zeros(1))
    with pytest.raises(UsageError, match="std must be above 0"):
        LIRA(autoencoder=STATE, std=torch.zeros(3))
    with pytest.raises(UsageError, match="autoencoder was trained on images of 1 channels, these have 3"):
        LIRA(autoencoder=autoencoder_state(1)).apply(noise())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lira:size=24", "size must be a multiple of 16"),
        ("lira:size=0", "size must be a multiple of 16"),
        ("lira:size=1040", "size must be a multiple of 16, at most 1024"),
        ("lira:epsilon=1001", r"epsilon must be in \(0, 1000\], got 1001"),
        ("lira:epsilon=0", r"epsilon must be in \(0, 1000\]"),
        ("lira:epsilon=inf", r"epsilon must be in \(0, 1000\]"),
        ("lira:autoencoder=1", "autoencoder is kept in trigger files"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)
