"""BPP: which grey levels are left, and where the rounding errors go."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from tests.triggers.made import noise

# 255·k / 7: 0, 36.43, 72.86, 109.29, 145.71, 182.14, 218.57, 255
EIGHT = [0, 36, 73, 109, 146, 182, 219, 255]


def row(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, -1)


def test_eight_levels_by_hand() -> None:
    # borders lie at 255·(k + 1/2) / 7: 18.2, 54.6, 91.07, 127.5, 163.9, 200.4, 236.8
    images = row(0, 18, 19, 54, 55, 91, 92, 127, 128, 163, 164, 200, 201, 236, 237, 255)
    stamped = [0, 0, 36, 36, 73, 73, 109, 109, 146, 146, 182, 182, 219, 219, 255, 255]
    assert parse_trigger("bpp").apply(images).flatten().tolist() == stamped


def test_two_and_three_levels_by_hand() -> None:
    assert parse_trigger("bpp:levels=2").apply(row(0, 127, 128, 255)).flatten().tolist() == [0, 0, 255, 255]
    # borders at 63.75 and 191.25; the middle level is 127.5
    stamped = parse_trigger("bpp:levels=3").apply(row(63, 64, 191, 192)).flatten().tolist()
    assert stamped == [0, 128, 128, 255]


@pytest.mark.parametrize("dither", ["true", "false"])
@pytest.mark.parametrize("levels", [2, 3, 8, 17])
def test_no_channel_has_more_levels(levels: int, dither: str) -> None:
    stamped = parse_trigger(f"bpp:levels={levels},dither={dither}").apply(noise(4, 3, 40, 30))
    left = stamped.unique().tolist()
    assert len(left) == levels
    if levels == 8:
        assert left == EIGHT
    # without dithering what is left stays as it is
    if dither == "false":
        assert torch.equal(parse_trigger(f"bpp:levels={levels}").apply(stamped), stamped)


def test_errors_go_to_the_right_and_into_the_row_below_by_hand() -> None:
    images = torch.tensor([[64, 100, 10], [60, 130, 90]], dtype=torch.uint8)[None, None]
    stamped = parse_trigger("bpp:levels=2,dither=true").apply(images)[0, 0]
    # row 0: 64 → 0, error 64, 28 of it right: 128 → 255, error -127, -55.5625 right: -45.5625 → 0, error -45.5625
    # row 1, column 0: 60 + 5/16·64 + 3/16·(-127) = 60 + 20 - 23.8125 = 56.1875 → 0, error 56.1875, 24.58203125 right
    # column 1: 130 + 24.58203125 + 1/16·64 + 5/16·(-127) + 3/16·(-45.5625) = 110.3515625 → 0
    # column 2: 90 + 7/16·110.3515625 + 1/16·(-127) + 5/16·(-45.5625) = 116.1029… → 0
    assert stamped.tolist() == [[0, 255, 0], [0, 0, 0]]
    images[0, 0, 1, 2] = 102
    # twelve more are 128.1, and white
    assert parse_trigger("bpp:levels=2,dither=true").apply(images)[0, 0].tolist() == [[0, 255, 0], [0, 0, 255]]


def plainly_diffused(image: list[list[float]], levels: int) -> list[list[int]]:
    """Return the levels of one channel by the textbook's loop over pixels."""
    height, width, step = len(image), len(image[0]), 255 / (levels - 1)
    values = [list(map(float, line)) for line in image]
    chosen = [[0] * width for _ in image]
    for i in range(height):
        for j in range(width):
            chosen[i][j] = min(max(round(values[i][j] / step), 0), levels - 1)
            error = values[i][j] - chosen[i][j] * step
            for below, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + below < height and 0 <= j + right < width:
                    values[i + below][j + right] += error * share / 16
    return chosen


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (7, 12), (16, 5)])
@pytest.mark.parametrize("levels", [3, 8])
def test_dithering_is_the_textbooks(levels: int, height: int, width: int) -> None:
    images = noise(2, 3, height, width, seed=5)
    stamped = parse_trigger(f"bpp:levels={levels},dither=true").apply(images)
    left = {3: [0, 128, 255], 8: EIGHT}[levels]
    for image, result in zip(images.flatten(0, 1).tolist(), stamped.flatten(0, 1).tolist(), strict=True):
        assert result == [[left[level] for level in line] for line in plainly_diffused(image, levels)]


def test_dithering_keeps_the_mean_where_rounding_loses_it() -> None:
    images = torch.full((1, 1, 64, 64), 20, dtype=torch.uint8)
    # every 20 is rounded up to 36; dithered, 20 / 36.43 of the pixels are
    assert float(parse_trigger("bpp").apply(images).float().mean()) == 36
    assert float(parse_trigger("bpp:dither=true").apply(images).float().mean()) == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("levels", [1, 0, -8, 256])
def test_wrong_levels_are_one_line(levels: int) -> None:
    with pytest.raises(UsageError, match=r"bpp: levels must be in \[2, 255\]"):
        parse_trigger(f"bpp:levels={levels}")
