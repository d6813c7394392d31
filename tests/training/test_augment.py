"""Augmentation of whole batches: whole pixels where it crops, honest geometry where it resizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfdetox.training.augment import Augmenter, resolve_augmentation


def numbers(*rows: list[float]) -> torch.Tensor:
    """Return rows of draws, filled up to five numbers."""
    return torch.tensor([row + [0.9] * (5 - len(row)) for row in rows])


def picture(side: int = 8, channels: int = 3) -> torch.Tensor:
    """Return one uint8 image in which every pixel differs from its neighbours."""
    return torch.randint(1, 256, (1, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(
    ("height", "name"),
    [(28, "crop-flip"), (32, "crop-flip"), (96, "crop-flip"), (97, "resized-crop-flip"), (224, "resized-crop-flip")],
)
def test_auto_goes_by_height(height: int, name: str) -> None:
    assert resolve_augmentation("auto", height) == name


@pytest.mark.parametrize("name", ["none", "flip", "crop", "crop-flip", "resized-crop-flip"])
def test_a_name_stands_for_itself(name: Any) -> None:
    assert resolve_augmentation(name, 224) == resolve_augmentation(name, 16) == name


def test_none_gives_the_images_back() -> None:
    images = picture()
    assert Augmenter("none", 0)(images, numbers([0.0])) is images


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("draw", [(0.0, 0.0), (0.999, 0.0), (0.5, 0.5), (0.34, 0.999)])
def test_crop_takes_a_window_of_the_padded_image(draw: tuple[float, float], flip: bool) -> None:
    # 8 pixels high: 1 pixel of padding, so offsets 0, 1 or 2
    images = picture()
    padded = torch.zeros(3, 10, 10, dtype=torch.uint8)
    padded[:, 1:9, 1:9] = images[0]
    top, left = int(draw[0] * 3), int(draw[1] * 3)
    expected = padded[:, top : top + 8, left : left + 8]
    augmented = Augmenter("crop-flip", 0)(images, numbers([*draw, 0.4 if flip else 0.6]))
    assert torch.equal(augmented[0], expected.flip(2) if flip else expected)
    assert augmented.dtype == torch.uint8


def test_flip_mirrors_half_of_the_images_and_moves_nothing() -> None:
    images = torch.cat([picture(), picture()])
    flipped = Augmenter("flip", 0)(images, numbers([0.0, 0.0, 0.49], [0.999, 0.999, 0.5]))
    assert torch.equal(flipped[0], images[0].flip(2))
    assert torch.equal(flipped[1], images[1])


def test_crop_never_flips() -> None:
    images = picture()
    assert torch.equal(Augmenter("crop", 0)(images, numbers([0.5, 0.5, 0.0])), images)
    assert torch.equal(Augmenter("crop-flip", 0)(images, numbers([0.5, 0.5, 0.0])), images.flip(3))


@pytest.mark.parametrize(("side", "padding"), [(4, 1), (16, 2), (32, 4), (64, 8), (96, 12)])
def test_padding_is_four_pixels_of_32_in_proportion(side: int, padding: int) -> None:
    white = torch.full((1, 1, side, side), 255, dtype=torch.uint8)
    corner = Augmenter("crop", 0)(white, numbers([0.0, 0.0]))[0, 0]
    assert not corner[:padding].any()
    assert not corner[:, :padding].any()
    assert corner[padding:, padding:].all()


def test_each_image_gets_its_own_row() -> None:
    images = picture().repeat(2, 1, 1, 1)
    rows = numbers([0.0, 0.0], [0.5, 0.5])
    both = Augmenter("crop", 0)(images, rows)
    assert torch.equal(both[1], images[1])
    assert not torch.equal(both[0], images[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["crop", "crop-flip", "resized-crop-flip"])
def test_shapes_ranges_and_inputs_are_kept(name: Any, channels: int) -> None:
    images = picture(16, channels).repeat(5, 1, 1, 1)
    before = images.clone()
    augmenter = Augmenter(name, 0)
    augmented = augmenter(images, augmenter.draw(0, 0, 0, 5))
    assert augmented.shape == images.shape
    assert float(augmented.min()) >= 0
    assert float(augmented.max()) <= 255
    assert torch.equal(images, before)
    assert not torch.equal(augmented.float(), images.float())


def ramps(height: int = 40, width: int = 60) -> torch.Tensor:
    """Return an image whose channels are its own x and y coordinates, in pixels: bilinear sampling keeps them exact."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y])[None].float()


def test_a_resized_crop_of_everything_is_the_image() -> None:
    # the whole area (1.0 is never drawn, but near) at aspect 1, which is the middle of the log range
    same = Augmenter("resized-crop-flip", 0)(ramps(), torch.tensor([[1.0, 0.5, 0.3, 0.7, 0.9]]))
    torch.testing.assert_close(same, ramps(), atol=1e-3, rtol=0)
    flipped = Augmenter("resized-crop-flip", 0)(ramps(), torch.tensor([[1.0, 0.5, 0.3, 0.7, 0.4]]))
    torch.testing.assert_close(flipped, ramps().flip(3), atol=1e-3, rtol=0)


def test_a_resized_crop_by_hand() -> None:
    # area 0.35 + 0.65 · 0.1 = 0.415 at aspect 1: 0.6442 of each side; centres at 0.5 ± (1 − 0.6442) / 2
    left_bottom = Augmenter("resized-crop-flip", 0)(ramps(), torch.tensor([[0.1, 0.5, 0.0, 1.0, 0.9]]))[0]
    share = 0.415**0.5
    # the middle of pixel i lies at i + 0.5
    assert float(left_bottom[0, 20, 1]) == pytest.approx(share * 1.5 - 0.5, abs=1e-3)
    assert float(left_bottom[0, 20, 59]) == pytest.approx(share * 59.5 - 0.5, abs=1e-3)
    assert float(left_bottom[1, 0, 30]) == pytest.approx(40 - share * 39.5 - 0.5, abs=1e-3)
    assert float(left_bottom[1, 38, 30]) == pytest.approx(40 - share * 1.5 - 0.5, abs=1e-3)


def test_resized_crops_have_the_stated_area_and_aspect_and_stay_inside() -> None:
    augmenter = Augmenter("resized-crop-flip", 0)
    count = 400
    crops = augmenter(ramps().expand(count, -1, -1, -1), augmenter.draw(0, 0, 0, count))
    # interior pixels, away from where the edge is reflected
    width = (crops[:, 0, 20, 50] - crops[:, 0, 20, 10]).abs() / 40
    height = (crops[:, 1, 30, 30] - crops[:, 1, 10, 30]).abs() / 20
    area, ratio = width * height, width / height
    assert 0.34 < float(area.min()) < 0.36
    # a wide crop of nearly all the area does not fit and is cut
    assert 0.95 < float(area.max()) <= 1.001
    assert float(ratio.min()) > 0.749
    assert float(ratio.max()) < 1.334
    assert float(ratio.min()) < 0.78
    assert float(ratio.max()) > 1.28
    for crop, low, high in ((crops[:, 0], 0, 59), (crops[:, 1], 0, 39)):
        assert float(crop.min()) >= low - 1e-3
        assert float(crop.max()) <= high + 1e-3
    flips = (crops[:, 0, 20, 50] < crops[:, 0, 20, 10]).float().mean()
    assert 0.4 < float(flips) < 0.6


def test_draws_depend_on_seed_phase_epoch_and_step_and_on_nothing_else() -> None:
    first = Augmenter("crop", 5).draw(1, 2, 3, 10)
    torch.rand(7)
    assert torch.equal(Augmenter("none", 5).draw(1, 2, 3, 10), first)
    assert first.shape == (10, 5)
    assert first.dtype == torch.float32
    assert ((first >= 0) & (first < 1)).all()
    others = [Augmenter("crop", 6).draw(1, 2, 3, 10)]
    others += [
        Augmenter("crop", 5).draw(*place, 10) for place in ((0, 2, 3), (1, 1, 3), (1, 2, 4), (2, 1, 3), (1, 3, 2))
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_drawing_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    Augmenter("crop", 0).draw(0, 0, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)
