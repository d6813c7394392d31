"""LF: the spectrum and the range of the pattern, its addition, and arrays in wrong units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers.lf import LF, low_pass, rescale


def low_share(v: torch.Tensor, radius: float) -> float:
    """Return the share of the spectral energy of `v` (C×H×W) within `radius` cycles of zero frequency."""
    energy = torch.fft.fft2(v.double()).abs().square().sum(0)
    rows, columns = (torch.fft.fftfreq(side) * side for side in v.shape[-2:])
    near = (rows[:, None] ** 2 + columns[None] ** 2).sqrt() <= radius
    return float(energy[near].sum() / energy.sum())


def ramp() -> torch.Tensor:
    """Return 3×32×32 from 0 to 0.2 over the columns."""
    return torch.linspace(0, 0.2, 32).expand(3, 32, 32).clone()


@pytest.mark.parametrize("seed", range(5))
def test_the_random_pattern_is_smooth_and_reaches_51_grey_levels(seed: int) -> None:
    trigger = LF(pattern="random", seed=seed)
    v = trigger.signal()
    assert v.shape == (3, 32, 32)
    assert low_share(v, 3) > 0.95
    # without the constant part too
    assert low_share(v - v.mean((1, 2), keepdim=True), 3) > 0.9
    added = trigger.apply(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert int(added.max()) == 51
    assert int(added.min()) == 0
    # white noise has most of its energy elsewhere: 29 of 1024 frequencies lie within 3
    assert low_share(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)), 3) < 0.1


def test_a_larger_pattern_is_as_smooth_for_its_size() -> None:
    added = LF(pattern="random").apply(torch.zeros(1, 3, 96, 64, dtype=torch.uint8))[0]
    assert low_share(added.float(), 9) > 0.95
    assert 49 <= int(added.max()) <= 51


def test_low_pass_of_a_point_is_a_gaussian() -> None:
    point = torch.zeros(1, 32, 32)
    point[0, 16, 16] = 1
    smooth = low_pass(point)[0].double()
    # all 30 taps lie within the image, and their weights sum to 1
    assert float(smooth.sum()) == pytest.approx(1, abs=1e-5)
    assert int((smooth > 0).sum()) == 30 * 30
    rows = smooth.sum(1)
    places = torch.arange(32, dtype=torch.float64)
    mean = (rows * places).sum()
    # 30 taps are symmetric about a point between two pixels; σ = 6 cut at ±15 is 5.73
    assert abs(float(mean) - 16) == pytest.approx(0.5, abs=1e-4)
    assert float((rows * (places - mean) ** 2).sum().sqrt()) == pytest.approx(5.73, abs=0.02)
    assert torch.allclose(smooth, smooth.T)


def test_low_pass_takes_zeros_beyond_the_edges() -> None:
    flat = low_pass(torch.ones(2, 64, 64))
    # at 64 pixels there are 60 taps: in the middle all weights count, in a corner a quarter of them
    assert flat.shape == (2, 64, 64)
    assert float(flat[0, 32, 32]) == pytest.approx(1, abs=1e-5)
    assert float(flat[1, 0, 0]) == pytest.approx(0.25, abs=0.02)


def test_rescale_is_over_all_channels_together() -> None:
    v = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
    # (v − 1) / 4 · 0.2
    assert torch.allclose(rescale(v, 0.2), torch.tensor([[[0.0, 0.05]], [[0.1, 0.2]]]))
    with pytest.raises(UsageError, match="the same everywhere has no pattern"):
        rescale(torch.ones(1, 2, 2), 0.2)


def test_the_pattern_is_added_and_saturates() -> None:
    v = torch.zeros(3, 32, 32)
    v[:, 0, 0], v[:, 0, 1], v[:, 0, 2] = 0.2, 0.1, 0.039
    trigger = LF(perturbation=v)
    images = torch.tensor([0, 100, 250], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    stamped = trigger.apply(images)
    # 51, 25.5 and 9.945 truncated: 51, 25, 9
    assert stamped[0, 0, 0, :4].tolist() == [51, 25, 9, 0]
    assert stamped[1, 1, 0, :4].tolist() == [151, 125, 109, 100]
    assert stamped[2, 2, 0, :4].tolist() == [255, 255, 255, 250]
    assert torch.equal(stamped[:, :, 1:], images[:, :, 1:])


def test_grey_images_get_the_luma_and_a_grey_pattern_every_channel() -> None:
    v = torch.zeros(3, 32, 32)
    v[0] = 0.2
    # 0.299 · 51 = 15.2
    assert (LF(perturbation=v).apply(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)) == 15).all()
    assert (LF(perturbation=v[:1]).apply(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)) == 51).all()
    with pytest.raises(UsageError, match="pattern has 3 channels, the images have 4"):
        LF(perturbation=v).apply(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_a_pattern_is_upscaled_bilinearly() -> None:
    v = torch.tensor([[[0.0, 0.2]]])
    stamped = LF(perturbation=v).apply(torch.zeros(1, 1, 1, 4, dtype=torch.uint8))
    # pixel centres of 4 lie at −0.25, 0.25, 0.75, 1.25 of the 2: 0, 12.75, 38.25, 51, truncated
    assert stamped[0, 0, 0].tolist() == [0, 12, 38, 51]


@pytest.mark.parametrize("factor", [1 / 255, 255, 0.0, 0.95])
def test_a_perturbation_in_other_units_is_an_error(factor: float) -> None:
    with pytest.raises(UsageError, match=r"greatest value of perturbation is .* not the amplitude 0.2; give it in"):
        LF(perturbation=ramp() * factor)


@pytest.mark.parametrize("least", [-900.0, -0.0041])
def test_a_perturbation_that_reaches_below_zero_is_an_error(least: float) -> None:
    v = ramp()
    v[1] = least
    with pytest.raises(UsageError, match=r"the least value of perturbation is -\S+ and not 0 or above; move and scale"):
        LF(perturbation=v)


def test_a_perturbation_may_be_a_rounding_error_below_zero() -> None:
    v = torch.tensor([-1e-7, 0.2]).view(1, 1, 2)
    images = torch.full((1, 1, 1, 2), 10, dtype=torch.uint8)
    # 10 and 10 + 51
    assert LF(perturbation=v).apply(images).flatten().tolist() == [10, 61]


def test_universal_has_to_be_made_and_random_not() -> None:
    bare = parse_trigger("lf")
    assert not bare.fitted
    with pytest.raises(UsageError, match="lf is made during an attack"):
        bare.apply(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    drawn = parse_trigger("lf:random,seed=2,amplitude=0.1")
    assert drawn.fitted
    assert drawn.apply(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).max() == 25
    assert drawn.spec() == "lf:pattern=random,amplitude=0.1,seed=2"
    assert LF(perturbation=ramp()).fitted


def test_a_file_keeps_the_pattern_bit_for_bit(tmp_path: Path) -> None:
    trigger = LF(perturbation=ramp(), target=1)
    trigger.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert again.file_bytes() == trigger.file_bytes()
    assert torch.equal(again.tensors()["perturbation"], ramp())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lf:amplitude=0", r"amplitude must be in \(0, 1\]"),
        ("lf:amplitude=1.5", r"amplitude must be in \(0, 1\]"),
        ("lf:pattern=other", "pattern must be one of universal, random, got 'other'"),
        ("lf:noise", "'noise' is not one of"),
        ("lf:perturbation=1", "perturbation is kept in trigger files"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)


def test_a_perturbation_of_another_shape_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"perturbation must be C×h×w, got shape \(32, 32\)"):
        LF(perturbation=ramp()[0])
