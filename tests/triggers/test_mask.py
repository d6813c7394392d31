"""Mask: the arithmetic of a share for each pixel, sizes, and what its arrays may be."""

from __future__ import annotations

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import Blended
from hfdetox.triggers.mask import Mask
from tests.triggers.made import noise


def test_a_share_for_each_pixel_by_hand() -> None:
    mask = torch.tensor([[[0.0, 0.5], [1.0, 0.25]]])
    pattern = torch.tensor([[[1.0, 1.0], [0.2, 0.0]]]).expand(3, 2, 2)
    stamped = Mask(mask=mask, pattern=pattern).apply(torch.full((1, 3, 2, 2), 101, dtype=torch.uint8))
    # 101; 50.5 + 127.5; 51; 75.75 truncated
    assert stamped[0, 1].tolist() == [[101, 178], [51, 75]]


@pytest.mark.parametrize("alpha", [0.04, 0.08, 0.2, 1.0])
@pytest.mark.parametrize("size", [32, 40, 224])
def test_one_share_everywhere_is_a_blend(alpha: float, size: int) -> None:
    picture = noise(1, 3, 20, 20, seed=3)[0]
    images = noise(2, 3, size, size)
    blend = Mask(mask=torch.full((1, 1, 1), alpha), pattern=picture.float() / 255).apply(images)
    # Blended rounds the resized picture to whole grey levels
    assert (blend.int() - Blended(alpha=alpha, image=picture).apply(images).int()).abs().max() <= 1


def test_nothing_is_lost_to_rounding() -> None:
    for grey in range(256):
        same = torch.full((1, 3, 2, 2), grey, dtype=torch.uint8)
        trigger = Mask(mask=torch.full((1, 1, 1), 0.3), pattern=torch.full((3, 1, 1), grey / 255))
        assert torch.equal(trigger.apply(same), same), grey


def test_it_acts_on_what_the_model_sees() -> None:
    assert Mask().mode == "input"


@pytest.mark.parametrize(
    ("mask", "pattern", "message"),
    [
        (torch.zeros(1, 2, 2), None, "mask and pattern are given together"),
        (None, torch.zeros(3, 2, 2), "mask and pattern are given together"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), "mask must be 1×h×w"),
        (torch.zeros(2, 2), torch.zeros(3, 2, 2), "mask must be 1×h×w"),
        (torch.zeros(1, 2, 2), torch.zeros(2, 2), "pattern must be C×h×w"),
        (torch.zeros(1, 0, 2), torch.zeros(3, 2, 2), "mask must be 1×h×w"),
        (
            torch.full((1, 2, 2), 1.5),
            torch.zeros(3, 2, 2),
            r"mask reaches from 1.5 to 1.5; give it in",
        ),
        (torch.zeros(1, 2, 2), torch.full((3, 2, 2), -0.5), "pattern reaches from -0.5"),
        (torch.zeros(1, 2, 2), torch.full((3, 2, 2), torch.nan), "pattern must be finite float32"),
        (torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(3, 2, 2), "mask must be finite float32"),
    ],
)
def test_arrays_that_make_no_trigger_are_one_line(
    mask: torch.Tensor | None, pattern: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as said:
        Mask(mask=mask, pattern=pattern)
    assert "\n" not in str(said.value)


def test_other_channels_are_one_line() -> None:
    with pytest.raises(UsageError, match="pattern has 3 channels, the images have 2"):
        Mask(mask=torch.ones(1, 1, 1), pattern=torch.ones(3, 2, 2)).apply(noise(1, 2))
