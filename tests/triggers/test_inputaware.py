"""Input-aware: hand-set masks and patterns, crossed triggers, other sizes, and states that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers._networks import load_network, network_state
from hfdetox.triggers.inputaware import Generator, InputAware, draw_mask, draw_pattern, hard_mask
from tests.triggers.made import generator_states, noise

GENERATOR, MASK = generator_states()


def flat(out: int, before_tanh: float) -> dict[str, torch.Tensor]:
    """Return the state of a generator whose last batch norm only shifts: tanh(before_tanh) / 2 + 1/2 everywhere."""
    network = Generator(3, out)
    last = network.layers[-1]
    assert isinstance(last, torch.nn.BatchNorm2d)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, before_tanh)
    return network_state(network)


# atanh(0.2) / 2 + 1/2 gives 0.6, which is 153 of 255
SIXTY = math.atanh(0.2)


def test_the_generator_has_the_layers_of_the_paper() -> None:
    network = Generator(3, 3)
    # convolution and batch norm: 960 + 9 312 + 18 624 + 37 056 + 74 112 + 147 840; the middle 147 840;
    # 147 840 + 73 920 + 37 056 + 18 528 + 9 312 + 873
    assert sum(parameter.numel() for parameter in network.parameters()) == 723_273
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(norms) == 13
    assert {norm.momentum for norm in norms} == {0.05}
    assert network.eval()(torch.rand(2, 3, 40, 24)).shape == (2, 3, 40, 24)
    # the last convolution has no ReLU
    assert isinstance(network.layers[-1], torch.nn.BatchNorm2d)


def test_hard_mask_by_hand() -> None:
    # tanh(−10), tanh(0), tanh(1), tanh(10)
    expected = [0.0, 0.5, (math.tanh(1) + 1) / 2, 1.0]
    assert hard_mask(torch.tensor([0.0, 0.5, 0.55, 1.0])).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize(("shift", "share"), [(-20.0, 0.0), (20.0, 1.0), (0.0, 0.5)])
def test_a_hand_set_mask_leaves_pixels_or_puts_the_pattern_there(shift: float, share: float, side: int) -> None:
    images = noise(4, 3, side, side)
    stamped = InputAware(generator=flat(3, SIXTY), mask=flat(1, shift)).apply(images)
    expected = images.double() * (1 - share) + 153 * share
    # half a grey level may be rounded either way
    assert float((stamped - expected).abs().max()) <= (0.51 if share == 0.5 else 0)


def trigger(**fields: torch.Tensor) -> InputAware:
    return InputAware(generator=GENERATOR, mask=MASK, **fields)


MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])


def test_mean_and_std_normalise_what_the_networks_see() -> None:
    images = noise()
    normalised = (images.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    generator = load_network(lambda: Generator(3, 3), GENERATOR, "test")
    mask = load_network(lambda: Generator(3, 1), MASK, "test")
    pattern, places = trigger(mean=MEAN, std=STD).patterns(images)
    assert torch.equal(pattern, generator(normalised))
    assert torch.equal(places, torch.tanh(20 * mask(normalised) - 10) / 2 + 0.5)
    assert not torch.allclose(trigger().patterns(images)[0], pattern, atol=0.01)


def test_a_crossed_image_carries_the_pattern_of_the_other() -> None:
    images, others = noise(), noise(seed=1)
    made = trigger(mean=MEAN, std=STD)
    pattern, places = made.patterns(others)
    expected = (images + (255 * pattern - images) * places).round().clamp(0, 255).to(torch.uint8)
    crossed = made.cross(images, others)
    assert torch.equal(crossed, expected)
    assert torch.equal(made.apply(images), made.cross(images, images))
    assert not torch.equal(crossed, made.apply(images))
    with pytest.raises(UsageError, match=r"cannot carry the patterns of \(3, 3, 32, 32\); give as many"):
        made.cross(images, others[:3])


def test_other_sizes_run_at_the_trained_one_and_the_mask_takes_the_nearest_pixel() -> None:
    images = noise(2, 3, 64, 96)
    pattern, places = trigger().patterns(images)
    small = interpolate(images.float() / 255, size=(32, 32), mode="bilinear", antialias=True)
    generator = load_network(lambda: Generator(3, 3), GENERATOR, "test")
    mask = load_network(lambda: Generator(3, 1), MASK, "test")
    assert torch.allclose(pattern, interpolate(generator(small), size=(64, 96), mode="bilinear"), atol=1e-6)
    # every mask pixel becomes 2×3 equal ones
    expected = hard_mask(mask(small)).repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert torch.equal(places, expected)


def test_patterns_can_be_learnt_through() -> None:
    torch.manual_seed(0)
    generator, mask = Generator(3, 3), Generator(3, 1)
    images = torch.rand(4, 3, 48, 48)
    (draw_pattern(generator, images, 32).sum() + draw_mask(mask, images, 32).sum()).backward()
    for network in (generator, mask):
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert float(network.layers[-1].bias.grad.abs().sum()) > 0  # type: ignore[union-attr, operator, arg-type]


def test_patterns_can_be_learnt_through_at_another_size_in_bfloat16() -> None:
    generator = Generator(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw_pattern(generator, torch.randn(2, 3, 24, 24), 16)
        drawn.sum().backward()
    assert drawn.shape == (2, 3, 24, 24)
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_batch_norm_keeps_its_statistics_in_the_file(tmp_path: Path) -> None:
    made = trigger(mean=MEAN, std=STD)
    made.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert again.file_bytes() == made.file_bytes()
    assert torch.equal(again.apply(noise()), made.apply(noise()))
    names = set(made.tensors())
    assert {"mean", "std", "generator.layers.1.running_var", "mask.layers.1.running_mean"} <= names
    assert not [name for name in names if name.endswith("num_batches_tracked")]


def test_an_image_alone_gets_what_it_gets_in_a_batch() -> None:
    images, made = noise(6), trigger()
    together = made.apply(images)
    alone = torch.cat([made.apply(image[None]) for image in images])
    # other batch sizes add up in another order: now and then a value is rounded the other way
    apart = (alone.int() - together.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 1e-3


def test_the_networks_channels_are_the_images() -> None:
    grey = InputAware(generator=generator_states(1)[0], mask=generator_states(1)[1])
    assert grey.apply(noise(2, 1)).shape == (2, 1, 32, 32)
    with pytest.raises(UsageError, match="generator was trained on images of 1 channels, these have 3"):
        grey.apply(noise())


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UsageError, match=r"inputaware: mask .*: layers.0.weight is \(32, 1, 3, 3\) where \(32, 3, 3,"):
        InputAware(generator=GENERATOR, mask=generator_states(1)[1])
    with pytest.raises(UsageError, match=r"inputaware: mask .* where \(1, 32, 3, 3\) is expected"):
        InputAware(generator=GENERATOR, mask=GENERATOR)
    with pytest.raises(UsageError, match=r"inputaware: generator .*: layers.0.weight is nothing"):
        InputAware(generator={"other": torch.zeros(1)}, mask=MASK)
    with pytest.raises(UsageError, match=r"inputaware: mean must be of shape \(3,\), got \(1,\)"):
        InputAware(generator=GENERATOR, mask=MASK, mean=torch.zeros(1))
    with pytest.raises(UsageError, match="std must be above 0"):
        InputAware(generator=GENERATOR, mask=MASK, std=torch.zeros(3))


def test_both_networks_are_needed() -> None:
    for made in (parse_trigger("inputaware"), InputAware(generator=GENERATOR), InputAware(mask=MASK)):
        assert not made.fitted
        with pytest.raises(UsageError, match="inputaware is made during an attack"):
            made.apply(noise())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputaware:size=20", "size must be a multiple of 8"),
        ("inputaware:size=1032", "size must be a multiple of 8, at most 1024"),
        ("inputaware:size=0", "size must be a multiple of 8"),
        ("inputaware:noise=1", "'noise=1' is not one of"),
        ("inputaware:mask=1", "mask is kept in trigger files"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)
