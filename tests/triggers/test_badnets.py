"""BadNets: which pixels a patch owns and what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfdetox.errors import UsageError
from hfdetox.triggers import BadNets, parse_trigger
from tests.triggers.made import every_trigger, noise

# the rows and columns that a patch owns in a 32×32 and in a 64×64 image
PATCHES = {
    "badnets": ((slice(29, 32), slice(29, 32)), (slice(58, 64), slice(58, 64))),
    "badnets-placed": ((slice(18, 23), slice(24, 29)), (slice(36, 46), slice(48, 58))),
    "badnets-grid": ((slice(27, 31), slice(28, 32)), (slice(54, 62), slice(56, 64))),
    "badnets-picture": ((slice(26, 32), slice(26, 32)), (slice(52, 64), slice(52, 64))),
}


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_changes_exactly_its_own_pixels(name: str, side: int) -> None:
    images = noise(6, 3, side, side)
    stamped = every_trigger()[name].apply(images)
    rows, columns = PATCHES[name][side == 64]
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[rows, columns] = True
    assert torch.equal(stamped[..., ~inside], images[..., ~inside])
    # within the patch nothing of the image is left: all images are equal there
    assert (stamped[..., inside] == stamped[:1, ..., inside]).all()
    assert (stamped != images).any(0).any(0)[inside].float().mean() > 0.99


def test_badnets_at_32_is_nine_white_pixels_in_the_corner() -> None:
    images = noise()
    stamped = BadNets().apply(images)
    assert (stamped == 255).sum() == 4 * 3 * 9
    assert (stamped[..., 29:, 29:] == 255).all()


@pytest.mark.parametrize(
    ("height", "width", "size", "rows", "columns"),
    [
        # side max(1, round(3 s)) of the image's height, also where it is not square
        (224, 224, 3, (203, 224), (203, 224)),
        (48, 100, 3, (44, 48), (96, 100)),
        (8, 8, 1, (7, 8), (7, 8)),
        (96, 96, 3, (87, 96), (87, 96)),
    ],
)
def test_patch_scales_with_the_height(height: int, width: int, size: int, rows: Any, columns: Any) -> None:
    stamped = BadNets(size=size).apply(noise(1, 3, height, width))
    where = (stamped[0, 0] == 255).nonzero()
    assert (int(where[:, 0].min()), int(where[:, 0].max()) + 1) == rows
    assert (int(where[:, 1].min()), int(where[:, 1].max()) + 1) == columns
    assert len(where) == (rows[1] - rows[0]) * (columns[1] - columns[0])


def test_distances_scale_with_the_height_too() -> None:
    stamped = BadNets(right=4, bottom=2).apply(noise(1, 3, 48, 100))
    where = (stamped[0, 0] == 255).nonzero()
    # one and a half times 32 pixels high: 6 and 3 pixels from the edges
    assert (int(where[:, 0].max()) + 1, int(where[:, 1].max()) + 1) == (45, 94)


def test_a_picture_of_the_patchs_size_is_stamped_as_it_is() -> None:
    picture = torch.arange(27).view(3, 3, 3).to(torch.uint8)
    stamped = BadNets(size=3, image=picture).apply(noise())
    assert (stamped[..., 29:, 29:] == picture).all()


def test_grey_images_get_the_luma_of_a_picture_and_colour_images_a_grey_picture_in_every_channel() -> None:
    red = torch.zeros(3, 2, 2, dtype=torch.uint8)
    red[0] = 200
    stamped = BadNets(size=2, image=red).apply(noise(1, 1))
    # 0.299 · 200 = 59.8
    assert (stamped[0, 0, 30:, 30:] == 60).all()
    stamped = BadNets(size=2, image=torch.full((1, 2, 2), 9, dtype=torch.uint8)).apply(noise(1, 3))
    assert (stamped[0, :, 30:, 30:] == 9).all()


def test_a_patch_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(UsageError, match="a patch of 33 pixels at this place does not fit an image of 32×32"):
        BadNets(size=33).apply(noise())
    with pytest.raises(UsageError, match="a patch of 3 pixels at this place does not fit an image of 20×32"):
        BadNets(right=18).apply(noise(1, 3, 32, 20))
    BadNets(size=32).apply(noise())


def test_a_picture_with_two_channels_does_not_fit() -> None:
    with pytest.raises(UsageError, match="picture has 2 channels, the images have 3"):
        BadNets(image=torch.zeros(2, 3, 3, dtype=torch.uint8)).apply(noise())


def test_the_grid_is_a_checkerboard_of_white_and_one() -> None:
    stamped = parse_trigger("badnets:grid").apply(noise(2))
    three = torch.tensor([[255, 1, 255], [1, 255, 1], [255, 1, 255]], dtype=torch.uint8)
    assert (stamped[..., 29:, 29:] == three).all()
    # even sides keep white at the lower right
    stamped = parse_trigger("badnets:pattern=grid,size=2,right=1").apply(noise(2))
    assert (stamped[..., 30:, 29:31] == torch.tensor([[255, 1], [1, 255]], dtype=torch.uint8)).all()


def test_the_fields_of_a_grid_grow_crisply() -> None:
    stamped = parse_trigger("badnets:grid").apply(noise(1, 1, 64, 64))[0, 0]
    fields = torch.tensor([[255, 1, 255], [1, 255, 1], [255, 1, 255]], dtype=torch.uint8)
    assert torch.equal(stamped[58:, 58:], fields.repeat_interleave(2, 0).repeat_interleave(2, 1))
    # 4 pixels for 3 fields: the pixels' centres, 0.375, 1.125, 1.875 and 2.625 fields from the edge, lie in 0, 1, 1, 2
    stamped = parse_trigger("badnets:grid").apply(noise(1, 1, 48, 48))[0, 0]
    assert stamped[44:, 44:].tolist() == [[255, 1, 1, 255], [1, 255, 255, 1], [1, 255, 255, 1], [255, 1, 1, 255]]
    assert set(stamped[44:, 44:].unique().tolist()) == {1, 255}


def test_a_grid_and_a_picture_are_an_error() -> None:
    with pytest.raises(UsageError, match="badnets: a patch is a grid or a picture; leave out"):
        BadNets(pattern="grid", image=torch.zeros(3, 3, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("badnets:size=0", "size must be at least 1"),
        ("badnets:value=256", r"value must be in \[0, 255\]"),
        ("badnets:right=-1", "right must be at least 0"),
        ("badnets:pattern=dots", "trigger badnets: pattern must be one of square, grid, got 'dots'"),
        ("badnets:grid,pattern=square", "pattern is given twice"),
    ],
)
def test_wrong_settings_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)


@pytest.mark.parametrize("kind", ["badnets", "blended"])
def test_a_file_with_a_picture_of_other_channels_is_one_line(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"image": torch.zeros(4, 3, 3).byte()}, file, metadata={"trigger": json.dumps({"kind": kind})})
    trigger = parse_trigger(str(file))
    for channels in (1, 3):
        message = f"the trigger's picture has 4 channels, the images have {channels}; give it one of 1 or 3 channels"
        with pytest.raises(UsageError, match=message) as caught:
            trigger.apply(noise(1, channels))
        assert "\n" not in str(caught.value)
