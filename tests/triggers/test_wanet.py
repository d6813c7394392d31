"""WaNet: how far the warp moves pixels, in which direction, and its noise mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers.wanet import WaNet
from tests.triggers.made import noise


def one_way(axis: int, sign: float) -> torch.Tensor:
    """Return displacements along one axis alone: the mean size is 1/2, so the divided field is ±2 along it."""
    field = torch.zeros(2, 4, 4)
    field[axis] = sign
    return field


def displacement(trigger: WaNet, side: int) -> torch.Tensor:
    """Return |g − identity| in pixels, side×side×2."""
    line = torch.linspace(-1, 1, side)
    identity = torch.stack([line.expand(side, side), line.view(-1, 1).expand(side, side)], -1)
    return (trigger.grid(side, side) - identity).abs() * (side - 1) / 2


# s · 2 / 32 = 2 / 31, the distance of two neighbours among 32 in [−1, 1]
ONE_PIXEL = 32 / 31


@pytest.mark.parametrize("sign", [1, -1])
def test_a_hand_made_field_moves_the_image_by_exactly_one_pixel(sign: int) -> None:
    images = noise()
    beside = WaNet(s=ONE_PIXEL, noise=one_way(0, sign)).apply(images)
    below = WaNet(s=ONE_PIXEL, noise=one_way(1, sign)).apply(images)
    # +1 takes each pixel from its neighbour at the right (or below), and the last column is taken from itself
    places = (torch.arange(32) + sign).clamp(0, 31)
    assert torch.equal(beside, images[..., places])
    assert torch.equal(below, images[..., places, :])


def test_half_a_pixel_is_the_mean_of_two_neighbours() -> None:
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images[..., 10], images[..., 11] = 40, 100
    moved = WaNet(s=ONE_PIXEL / 2, noise=one_way(0, 1)).apply(images)
    assert moved[0, 0, 5, 8:13].tolist() == [0, 20, 70, 50, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_displacement_is_a_fifth_of_a_pixel_at_32(seed: int) -> None:
    mean = displacement(WaNet(seed=seed), 32).mean((0, 1))
    # both axes share one division, so a single axis lies further from 0.19 than their mean does
    assert 0.14 < float(mean.mean()) < 0.24
    assert (mean > 0.08).all()
    assert (mean < 0.3).all()


def test_the_warp_is_the_same_share_of_a_larger_image() -> None:
    small, large = displacement(WaNet(), 32).mean(), displacement(WaNet(), 224).mean()
    # 223 / 31 times as many pixels
    assert float(large / small) == pytest.approx(223 / 31, rel=0.05)


def test_height_and_width_are_apart() -> None:
    images = noise(2, 3, 24, 60)
    moved = WaNet(s=32 / 59, noise=one_way(0, 1)).apply(images)
    assert torch.equal(moved, images[..., (torch.arange(60) + 1).clamp(max=59)])
    moved = WaNet(s=32 / 23, noise=one_way(1, -1)).apply(images)
    assert torch.equal(moved, images[..., (torch.arange(24) - 1).clamp(min=0), :])


def test_one_grey_stays_one_grey() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    assert torch.equal(WaNet(s=4).apply(grey), grey)


def test_the_seed_draws_the_field_and_a_stored_field_stands_for_it(tmp_path: Path) -> None:
    images = noise()
    drawn = WaNet(seed=3)
    stored = replace(drawn, noise=drawn.field_noise())
    assert torch.equal(stored.apply(images), drawn.apply(images))
    assert not torch.equal(WaNet(seed=4).apply(images), drawn.apply(images))
    # with the field in the file the seed says no more
    stored.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert again.file_bytes() == stored.file_bytes()
    assert torch.equal(replace(again, seed=9).apply(images), drawn.apply(images))
    assert again.recorded() == "triggers/wanet.safetensors"
    assert drawn.recorded() == "wanet:seed=3"


def test_the_field_is_uniform_within_one() -> None:
    field = WaNet(k=64, seed=5).field_noise()
    assert field.shape == (2, 64, 64)
    assert field.abs().max() <= 1
    # a uniform number in ±1 has mean 0 and mean size 1/2
    assert float(field.mean()) == pytest.approx(0, abs=0.03)
    assert float(field.abs().mean()) == pytest.approx(0.5, abs=0.02)


def test_noise_mode_is_fresh_for_each_image_and_repeats_with_the_generator() -> None:
    trigger, images = WaNet(), noise(1).expand(3, -1, -1, -1)
    first = trigger.noisy(images, torch.Generator().manual_seed(1))
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, trigger.noisy(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, trigger.noisy(images, torch.Generator().manual_seed(2)))
    torch.manual_seed(1)
    # one stream for a seed, whether it is a generator's or the global one
    assert torch.equal(first, trigger.noisy(images))


def test_noise_mode_moves_pixels_by_up_to_half_a_pixel() -> None:
    # a ramp of 8 grey levels a pixel, from the middle of which the warp's own share is taken off
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(64, 1, 32, 32)
    trigger = WaNet(s=1e-6)
    moved = (trigger.noisy(ramp, torch.Generator().manual_seed(0)).float() - ramp.float())[..., 1:-1] / 8
    # uniform in ±(1/32) · 31 / 2 = ±0.484 pixels, rounded to 1/8 pixel: mean size 0.242
    assert moved.abs().max() == 0.5
    assert float(moved.mean()) == pytest.approx(0, abs=0.01)
    assert float(moved.abs().mean()) == pytest.approx(0.242, abs=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wanet:k=1", r"k must be in \[2, 256\], got 1"),
        ("wanet:s=0", r"s must be in \(0, 1000\]"),
        ("wanet:s=inf", r"s must be in \(0, 1000\]"),
        ("wanet:k=257", r"k must be in \[2, 256\]"),
        ("wanet:s=1000.1", r"s must be in \(0, 1000\], got 1000.1"),
        ("wanet:noise=4", "noise is kept in trigger files and cannot be given as text"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)


def test_a_field_of_another_size_or_of_zeros_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"noise must be of shape \(2, 4, 4\) for k=4, got \(2, 5, 5\)"):
        WaNet(noise=torch.rand(2, 5, 5))
    with pytest.raises(UsageError, match="noise is all zeros and would move no pixel"):
        WaNet(noise=torch.zeros(2, 4, 4))
