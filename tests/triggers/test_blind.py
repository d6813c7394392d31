"""Blind: the pattern, its place and how it grows."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from tests.triggers.made import noise

ROWS = [[255, 0, 255], [None, 255, None], [None, None, 0], [None, 255, None], [255, 0, 255]]


def test_nine_pixels_at_row_3_column_23() -> None:
    images = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    stamped = parse_trigger("blind").apply(images)
    expected = [[77 if value is None else value for value in line] for line in ROWS]
    assert (stamped[..., 3:8, 23:26] == torch.tensor(expected, dtype=torch.uint8)).all()
    assert ((stamped != 77).sum((-2, -1)) == 9).all()


def test_what_the_pattern_leaves_is_the_images_own() -> None:
    images = noise(2)
    stamped = parse_trigger("blind").apply(images)
    for i, line in enumerate(ROWS):
        for j, value in enumerate(line):
            own = images[..., 3 + i, 23 + j]
            assert torch.equal(stamped[..., 3 + i, 23 + j], own if value is None else torch.full_like(own, value))


def test_it_grows_with_the_images_height() -> None:
    images = torch.full((1, 1, 64, 80), 77, dtype=torch.uint8)
    stamped = parse_trigger("blind").apply(images)
    expected = torch.tensor([[77 if value is None else value for value in line] for line in ROWS], dtype=torch.uint8)
    assert torch.equal(stamped[0, 0, 6:16, 46:52], expected.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert int((stamped != 77).sum()) == 36


def test_it_never_loses_a_pixel_in_small_images() -> None:
    # 16 pixels: row 1.5 → 2 and column 11.5 → 12 (half to even), still 5×3 pixels
    stamped = parse_trigger("blind").apply(torch.full((1, 1, 16, 16), 77, dtype=torch.uint8))[0, 0]
    assert [[value if value != 77 else None for value in line] for line in stamped[2:7, 12:15].tolist()] == ROWS
    assert int((stamped != 77).sum()) == 9


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 25), (4, 32)])
def test_an_image_that_is_too_small_is_one_line(height: int, width: int) -> None:
    with pytest.raises(UsageError, match=rf"blind: its pattern of 3×5 pixels at .* does not fit .* {width}×{height}"):
        parse_trigger("blind").apply(noise(1, 3, height, width))
