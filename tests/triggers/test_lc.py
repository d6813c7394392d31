"""LC: the signs of the corners, how they grow, and what they add."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from tests.triggers.made import noise

LEFT = ["+--", "-+-", "+-+"]
RIGHT = ["--+", "-+-", "+-+"]


def signs(change: torch.Tensor) -> list[str]:
    """Return a change (h×w) as rows of + and -, with . where there is none."""
    return ["".join("+" if value > 0 else "-" if value < 0 else "." for value in line) for line in change.tolist()]


def change(spec: str, height: int = 32, width: int = 32, grey: int = 100) -> torch.Tensor:
    """Return what a trigger changes in an even grey image, int32 H×W."""
    stamped = parse_trigger(spec).apply(torch.full((1, 3, height, width), grey, dtype=torch.uint8)).int() - grey
    assert (stamped[0] == stamped[0, 0]).all()
    return stamped[0, 0]


def test_the_signs_of_the_four_corners() -> None:
    changed = change("lc")
    assert signs(changed[:3, :3]) == LEFT
    assert signs(changed[:3, 29:]) == RIGHT
    assert signs(changed[29:, :3]) == LEFT
    assert signs(changed[29:, 29:]) == RIGHT
    # four corners of nine pixels, and no other
    assert int((changed != 0).sum()) == 36


def test_at_full_amplitude_they_are_black_and_white() -> None:
    stamped = parse_trigger("lc").apply(noise(3))
    assert stamped[..., :3, :3].unique().tolist() == [0, 255]
    assert (stamped[..., 0, 0] == 255).all()
    assert (stamped[..., 0, 1] == 0).all()


def test_a_faint_corner_by_hand() -> None:
    # 0.25·255 = 63.75: 163.75 is cut to 163, 36.25 to 36; 240 ends at white and 30 at black
    assert change("lc:amplitude=0.25")[0, :3].tolist() == [63, -64, -64]
    assert change("lc:amplitude=0.25", grey=240)[0, :3].tolist() == [15, -64, -64]
    assert change("lc:amplitude=0.25", grey=30)[0, :3].tolist() == [63, -30, -30]


def test_corners_grow_with_the_image() -> None:
    changed = change("lc", 64, 64)
    assert signs(changed[:6, :6]) == ["++----"] * 2 + ["--++--"] * 2 + ["++--++"] * 2
    assert signs(changed[58:, 58:]) == ["----++"] * 2 + ["--++--"] * 2 + ["++--++"] * 2
    assert int((changed != 0).sum()) == 4 * 36
    # 48 rows: the centres of rows 0 to 4 lie at 0.33, 1, 1.67, 2.33 and 3 of 32: fields 0, 1, 1, 2 and none;
    # 32 columns stay
    assert signs(change("lc", 48, 32)[:5, :3]) == ["+--", "-+-", "-+-", "+-+", "..."]


def test_small_images_and_wrong_amplitudes_are_one_line() -> None:
    with pytest.raises(UsageError, match="lc: the corners do not fit an image of 32×7; it needs 8×8 pixels"):
        parse_trigger("lc").apply(noise(1, 3, 7, 32))
    # each corner keeps a pixel at 8×8
    changed = change("lc", 8, 8)
    assert all(changed[row, column] != 0 for row in (0, 7) for column in (0, 7))
    for wrong in ("0", "1.1", "nan"):
        with pytest.raises(UsageError, match=r"lc: amplitude must be in \(0, 1\]"):
            parse_trigger(f"lc:amplitude={wrong}")
