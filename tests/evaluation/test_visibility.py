"""How visible a trigger is, against values worked out by hand, from a cache and decoded on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from hfdetox.data.cache import Pixels
from hfdetox.data.images import ImageSet
from hfdetox.evaluation.evaluator import changes_pixels, measure_visibility
from hfdetox.evaluation.results import Visibility
from hfdetox.models.preprocessing import CallablePreprocessing
from hfdetox.triggers.base import Trigger
from tests.tiny_training import toy_preprocessing, toy_set

LEVELS = (0, 10, 100, 250)


@dataclass(frozen=True, kw_only=True, eq=False)
class Brighter(Trigger):
    """Add grey levels to every value, up to 255, in images that are brighter than `above`."""

    kind: ClassVar[str] = "brighter"

    levels: int = 1
    above: int = -1

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.float().mean((1, 2, 3), keepdim=True) > self.above
        return (images.int() + self.levels * bright).clamp(0, 255).to(torch.uint8)


def grey(*levels: int, max_bytes: int = 10**9) -> Pixels:
    """Return 8×8 images of one grey level each."""
    pictures = [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]
    images = ImageSet(pictures, [0] * len(levels), list(range(len(levels))))
    return Pixels(images, toy_preprocessing(), max_bytes=max_bytes)


@pytest.mark.parametrize("max_bytes", [10**9, 0], ids=["cached", "on demand"])
@pytest.mark.parametrize("mode", ["native", "input"])
@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        # one grey level everywhere: the MSE is 1, 10·log10(255²) = 48.1308
        ({"levels": 1}, Visibility(48.1308, 1, 1.0)),
        # 10 levels: the MSE of 0, 10 and 100 is 100, 10·log10(650.25) = 28.1308; 250 gets 5: 10·log10(2601) = 34.1514
        ({"levels": 10}, Visibility((3 * 28.1308 + 34.1514) / 4, 10, 1.0)),
        # only the images of 100 and of 250 change: the mean is over these two
        ({"levels": 10, "above": 50}, Visibility((28.1308 + 34.1514) / 2, 10, 0.5)),
        ({"levels": 10, "above": 255}, Visibility(None, 0, 0.0)),
        # black to white, and the others up to white: 255, 245, 155 and 5 levels of change
        (
            {"levels": 255},
            Visibility(sum(20 * math.log10(255 / change) for change in (255, 245, 155, 5)) / 4, 255, 1.0),
        ),
    ],
)
def test_by_hand(max_bytes: int, mode: str, trigger: dict[str, int], expected: Visibility) -> None:
    clean = grey(*LEVELS, max_bytes=max_bytes)
    assert (clean.images is None) == (max_bytes == 0)
    view = clean.view(Brighter(mode=mode, **trigger))  # type: ignore[arg-type]
    found = measure_visibility(clean, view)
    assert found.psnr == (None if expected.psnr is None else pytest.approx(expected.psnr, abs=1e-4))
    assert (found.max_change, found.changed) == (expected.max_change, expected.changed)
    assert type(found.max_change) is int
    assert changes_pixels(clean, view) == (expected.changed > 0)


def test_one_value_of_one_pixel_counts() -> None:
    clean = grey(*LEVELS)
    view = clean.view(Brighter(mode="input", levels=0))
    assert view.images is not None
    view.images = view.images.clone()
    assert not changes_pixels(clean, view)
    view.images[2, 1, 3, 4] += 12
    # one of 8·8·3 = 192 values by 12: the MSE is 144 / 192 = 0.75, 10·log10(65025 / 0.75) = 49.3801
    assert measure_visibility(clean, view) == Visibility(pytest.approx(49.3801, abs=1e-4), 12, 0.25)
    assert changes_pixels(clean, view)


def test_a_view_of_some_images_is_compared_with_these() -> None:
    whole = grey(*LEVELS)
    clean = whole.view(positions=[3, 1, 0])
    view = whole.view(Brighter(mode="input", levels=10), positions=[0, 3])
    # 0 gets 10 levels, 250 gets 5
    assert measure_visibility(clean, view) == Visibility(pytest.approx((28.1308 + 34.1514) / 2, abs=1e-4), 10, 1.0)


def test_a_change_behind_the_first_batch_is_found() -> None:
    levels = [10] * 300 + [200]
    clean = grey(*levels)
    view = clean.view(Brighter(levels=5, above=100))
    assert changes_pixels(clean, view)
    # 20·log10(255 / 5) = 34.1514
    assert measure_visibility(clean, view) == Visibility(pytest.approx(34.1514, abs=1e-4), 5, pytest.approx(1 / 301))


def test_a_callables_own_floats_have_no_grey_levels() -> None:
    images = toy_set(4)
    preprocessing = CallablePreprocessing(lambda image: torch.tensor(np.array(image)[:8, :8]).permute(2, 0, 1) / 255)
    clean = Pixels(images, preprocessing)
    view = clean.view(Brighter(levels=5))
    with pytest.raises(ValueError, match=r"grey levels of uint8 images, got torch\.float32"):
        measure_visibility(clean, view)
    assert changes_pixels(clean, view)
    assert not changes_pixels(clean, clean.view())
