"""Random gratings: one wave of one frequency on some of the images."""

import math

import pytest
import torch

from hfdetox.training.gratings import AMPLITUDES, MOST_TURNS, with_gratings


def grey(count: int = 200, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.full((count, 3, height, width), 128.0)


def test_a_share_of_the_images_changes_and_the_given_ones_stay() -> None:
    torch.manual_seed(0)
    images = grey(2000, 8, 8)
    found = with_gratings(images, 0.25)
    changed = (found != images).flatten(1).any(1).float().mean()
    assert 0.2 < float(changed) < 0.3
    assert bool((images == 128).all())
    assert torch.equal(with_gratings(images, 0.0), images)


def test_each_is_one_wave_of_its_own_in_all_channels() -> None:
    torch.manual_seed(0)
    waves = with_gratings(grey(), 1.0) - 128
    assert torch.equal(waves[:, 0], waves[:, 1])
    assert not torch.equal(waves[0], waves[1])
    # of one frequency k along a row: w(c + 1) + w(c − 1) = 2 cos(k) w(c)
    along = waves[:, 0, 4]
    middle, both = along[:, 1:-1], along[:, 2:] + along[:, :-2]
    ratio = (both * middle).sum(1) / middle.square().sum(1)
    torch.testing.assert_close(both, ratio[:, None] * middle, atol=2e-2, rtol=1e-3)
    turns = torch.acos((ratio / 2).clamp(-1, 1)) * 32 / (2 * math.pi)
    assert float(turns.max()) <= MOST_TURNS + 1e-3
    assert float(turns.max()) > 0.9 * MOST_TURNS


def test_amplitudes_are_as_said_and_grey_levels_stay_in_their_range() -> None:
    torch.manual_seed(0)
    highest = (with_gratings(grey(), 1.0) - 128).abs().flatten(1).amax(1)
    assert float(highest.max()) <= AMPLITUDES[1] + 1e-3
    assert float(highest.min()) >= 0.5 * AMPLITUDES[0]
    bright = with_gratings(torch.full((50, 1, 8, 8), 250, dtype=torch.uint8), 1.0)
    assert bright.dtype == torch.float32
    assert float(bright.max()) <= 255
    dark = with_gratings(torch.zeros(50, 1, 8, 8), 1.0)
    assert float(dark.min()) == 0


@pytest.mark.parametrize("count", [0, 1])
def test_few_images(count: int) -> None:
    assert with_gratings(grey(count), 1.0).shape == (count, 3, 24, 32)


def test_the_same_seed_draws_the_same() -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(with_gratings(grey(), 0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
