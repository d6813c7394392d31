"""SIG: the values of the sinusoid."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from tests.triggers.made import noise


def test_six_periods_over_32_columns_by_hand() -> None:
    images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    stamped = parse_trigger("sig").apply(images)
    # column j adds 40·sin(3π·j / 8): 0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955, 0, -36.955, …;
    # 136.955 is cut to 136, 84.693 to 84, 63.045 to 63
    row = [100, 136, 128, 84, 60, 84, 128, 136, 100, 63, 71, 115, 140, 115, 71, 63]
    assert stamped[0, 0, 0].tolist() == row * 2
    # rows, channels and images are alike
    assert (stamped == stamped[:1, :1, :1]).all()


def test_a_wave_of_whole_numbers_is_exact() -> None:
    # 12 columns a period: sin is 0, 1/2, 0.866, 1, 0.866, 1/2, 0, and the same below zero
    stamped = parse_trigger("sig:delta=20,frequency=1").apply(torch.full((1, 1, 1, 12), 50, dtype=torch.uint8))
    # 17.32 is added to give 67.32, and taken away to give 32.68
    assert stamped.flatten().tolist() == [50, 60, 67, 70, 67, 60, 50, 40, 32, 30, 32, 40]


def test_the_wave_is_clipped_at_black_and_white() -> None:
    images = torch.tensor([10, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 32)
    stamped = parse_trigger("sig").apply(images)
    # columns 1 and 4 of the wave: 36.955 and -40
    assert stamped[:, 0, 0, [1, 4]].tolist() == [[46, 0], [255, 210]]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 96), (224, 224)])
def test_periods_count_per_width_at_every_size(height: int, width: int) -> None:
    wave = parse_trigger("sig").apply(torch.full((1, 3, height, width), 100, dtype=torch.uint8)).float() - 100
    spectrum = torch.fft.rfft(wave[0, 0, 0]).abs()
    # the mean of a truncated wave is a little below zero; it is no period
    assert int(spectrum[1:].argmax()) + 1 == 6
    assert (int(wave.max()), int(wave.min())) in {(40, -40), (39, -40)}
    assert torch.equal(wave, wave[:, :1, :1].expand_as(wave))


def test_half_the_frequency_on_half_the_image_is_the_same_wave() -> None:
    images = noise(2, 3, 32, 64)
    whole = parse_trigger("sig:frequency=6").apply(images)
    assert torch.equal(whole[..., :32], parse_trigger("sig:frequency=3").apply(images[..., :32]))


@pytest.mark.parametrize("wrong", ["delta=0", "delta=-1", "delta=256", "delta=nan", "frequency=0", "frequency=inf",
                                   "frequency=10001"])  # fmt: skip
def test_wrong_settings_are_one_line(wrong: str) -> None:
    ranges = {"delta": r"sig: delta must be in \(0, 255\]", "frequency": r"sig: frequency must be in \(0, 10000\]"}
    with pytest.raises(UsageError, match=ranges[wrong.partition("=")[0]]):
        parse_trigger(f"sig:{wrong}")
