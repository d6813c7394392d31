"""FTrojan and CTRL: which DCT coefficients of the colour change, seen through SciPy's transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from hfdetox.triggers._spectrum import dct_wave
from hfdetox.triggers.base import Additive
from hfdetox.triggers.ctrl import Ctrl
from hfdetox.triggers.ftrojan import FTrojan
from tests.triggers.made import noise


def colour_differences(rgb: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return luma and the two colour differences of a 3×H×W image, written out as OpenCV defines them."""
    red, green, blue = rgb
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    if kind == "ftrojan":
        return luma, (red - luma) * 0.713, (blue - luma) * 0.564
    return luma, (blue - luma) * 0.492, (red - luma) * 0.877


def changed(difference: np.ndarray) -> dict[tuple[int, int], float]:
    """Return the coefficients of the orthonormal 2-D DCT of an H×W array that are not zero."""
    spectrum = dctn(difference, norm="ortho")
    return {(int(i), int(j)): round(float(spectrum[i, j]), 6) for i, j in np.argwhere(np.abs(spectrum) > 1e-6)}


def differences(trigger: Additive, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a trigger changes in luma and in both colour differences, before rounding and clipping."""
    clean = noise(1, 3, height, width)[0].double().numpy()
    stamped = clean + trigger.added(3, height, width).numpy()
    pairs = zip(colour_differences(stamped, trigger.kind), colour_differences(clean, trigger.kind), strict=True)
    luma, first, second = (after - before for after, before in pairs)
    return luma, first, second


@pytest.mark.parametrize(("trigger", "magnitude"), [(FTrojan(), 30), (Ctrl(), 100), (Ctrl(magnitude=7), 7)])
def test_two_coefficients_of_each_colour_difference_change_and_nothing_else(
    trigger: Additive, magnitude: float
) -> None:
    luma, first, second = differences(trigger, 32, 32)
    assert np.abs(luma).max() < 1e-9
    for difference in (first, second):
        assert changed(difference) == {(15, 15): magnitude, (31, 31): magnitude}


def test_ftrojan_changes_every_block_alike() -> None:
    _, red, _ = differences(FTrojan(), 96, 64)
    for top in (0, 32, 64):
        for left in (0, 32):
            assert changed(red[top : top + 32, left : left + 32]) == {(15, 15): 30, (31, 31): 30}


def test_a_cut_block_of_ftrojan_is_the_beginning_of_a_whole_one() -> None:
    pattern = FTrojan().added(3, 48, 40)
    block = FTrojan().added(3, 32, 32)
    assert torch.equal(pattern[:, :32, :32], block)
    assert torch.equal(pattern[:, 32:, :32], block[:, :16])
    assert torch.equal(pattern[:, 32:, 32:], block[:, :16, :8])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 64, {(30, 30): 200, (62, 62): 200}),
        (224, 224, {(105, 105): 700, (217, 217): 700}),
        # 15·48/32 = 22.5 → 22 (half to even), 31·48/32 = 46.5 → 46; 15·96/32 = 45, 93; 100·√(48·96)/32 = 212.132034
        (48, 96, {(22, 45): 212.132034, (46, 93): 212.132034}),
    ],
)
def test_ctrl_scales_its_places_and_its_magnitude(
    height: int, width: int, expected: dict[tuple[int, int], float]
) -> None:
    luma, first, second = differences(Ctrl(), height, width)
    assert np.abs(luma).max() < 1e-9
    assert changed(first) == expected
    assert changed(second) == expected


def test_ctrl_fits_very_small_images() -> None:
    # 31·8/32 = 7.75 → 8, and 7 is the last
    assert set(changed(differences(Ctrl(), 8, 8)[1])) == {(4, 4), (7, 7)}


def test_a_wave_of_the_dct_by_hand() -> None:
    # N = 4, k = 1: √(1/2)·cos(π/8), cos(3π/8) and their negatives; k = 0: 1/2 everywhere
    assert dct_wave(1, 4).tolist() == pytest.approx([0.653281, 0.270598, -0.270598, -0.653281], abs=1e-6)
    assert dct_wave(0, 4).tolist() == pytest.approx([0.5] * 4)


def test_one_coefficient_of_30_is_a_wave_of_not_quite_two_levels() -> None:
    # 30·2/32 = 1.875 is the greatest a unit wave can be; both together reach 3.2 in chroma
    wave = colour_differences(FTrojan().added(3, 32, 32).numpy(), "ftrojan")[1]
    assert 3.0 < np.abs(wave).max() <= 3.2
    # pixel (0, 0): 1.875·(cos²(15π/64) + cos²(31π/64)) = 1.875·(0.549009 + 0.002408) = 1.033907
    assert wave[0, 0] == pytest.approx(1.033907, abs=1e-5)


def test_pixels_of_ftrojan_by_hand() -> None:
    images = torch.tensor([[[[100]], [[100]], [[100]]], [[[255]], [[0]], [[255]]]], dtype=torch.uint8)
    stamped = parse_trigger("ftrojan").apply(images.expand(2, 3, 32, 32))
    # 1.0339 in Cr is 1.0339/0.713 = 1.45 in red, in Cb 1.0339/0.564 = 1.83 in blue; luma stays, so green takes
    # (0.299·1.45 + 0.114·1.83)/0.587 = 1.095 less: 101.45, 98.905 and 101.83, cut; clipped at both ends
    assert stamped[0, :, 0, 0].tolist() == [101, 98, 101]
    assert stamped[1, :, 0, 0].tolist() == [255, 0, 255]


def test_pixels_of_ctrl_by_hand() -> None:
    stamped = parse_trigger("ctrl").apply(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8))
    # pixel (0, 0): 100·2/32·0.551417 = 3.446356 in U and V: blue + 3.446/0.492 = 7.005, red + 3.446/0.877 = 3.93,
    # green - (0.299·3.93 + 0.114·7.005)/0.587 = 3.362
    assert stamped[0, :, 0, 0].tolist() == [103, 96, 107]


@pytest.mark.parametrize("kind", ["ftrojan", "ctrl"])
def test_grey_images_and_wrong_magnitudes_are_one_line(kind: str) -> None:
    with pytest.raises(UsageError, match=f"trigger {kind}: {kind} changes colours and needs images of 3 channels, "
                                         "these have 1; use another family, such as sig or badnets"):  # fmt: skip
        parse_trigger(kind).apply(noise(1, 1))
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match=rf"{kind}: magnitude must be in \(0, 10000\]"):
            parse_trigger(f"{kind}:magnitude={wrong}")
