"""Blended: the arithmetic of the blend, and the picture that is blended in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hfdetox.errors import UsageError
from hfdetox.triggers import Blended, parse_trigger
from tests.triggers.made import noise


def test_blend_by_hand() -> None:
    picture = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    images = torch.tensor([0, 1, 100, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    stamped = Blended(alpha=0.2, image=picture).apply(images)
    # 0.8 x + 40, truncated: 40, 40.8, 120, 244
    assert stamped[:, 0, 0, 0].tolist() == [40, 40, 120, 244]
    assert (stamped == stamped[:, :1, :1, :1]).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_blending_with_a_picture_of_the_same_grey_changes_nothing(alpha: float) -> None:
    """Rounding before the truncation must not lose a grey level."""
    for grey in range(256):
        same = torch.full((1, 3, 2, 2), grey, dtype=torch.uint8)
        assert torch.equal(Blended(alpha=alpha, image=same[0]).apply(same), same), grey


def test_the_default_picture_is_seeded_uniform_noise() -> None:
    pictures = [Blended(seed=seed).picture() for seed in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])
    assert pictures[0].shape == (3, 32, 32)
    # a uniform grey level has mean 127.5 and standard deviation 73.9
    assert float(pictures[0].float().mean()) == pytest.approx(127.5, abs=5)
    assert float(pictures[0].float().std()) == pytest.approx(73.9, abs=3)
    assert torch.equal(Blended(alpha=1.0).apply(noise(1))[0], pictures[0])


def test_a_picture_is_resized_bilinearly_as_pil_does() -> None:
    picture = noise(1, 3, 20, 30)[0]
    stamped = Blended(alpha=1.0, image=picture).apply(noise(1, 3, 48, 64))[0]
    resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((64, 48), Image.Resampling.BILINEAR)
    difference = np.asarray(resized).astype(int) - stamped.permute(1, 2, 0).numpy().astype(int)
    assert np.abs(difference).max() <= 1


def test_what_is_kept_for_one_shape_is_not_put_on_another() -> None:
    picture = torch.tensor([100, 200, 50], dtype=torch.uint8).view(3, 1, 1)
    trigger, black = Blended(alpha=0.5, image=picture), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    # half of the picture; of its luma 0.299·100 + 0.587·200 + 0.114·50 = 153 on grey images
    for _ in range(2):
        assert trigger.apply(black)[0, :, 0, 0].tolist() == [50, 100, 25]
        assert trigger.apply(black[:, :1])[0, :, 0, 0].tolist() == [76]
        assert trigger.apply(black[..., :5]).shape == (1, 3, 8, 5)


@pytest.mark.parametrize("alpha", ["0", "-0.1", "1.01", "nan"])
def test_alpha_is_a_share(alpha: str) -> None:
    with pytest.raises(UsageError, match=r"blended: alpha must be in \(0, 1\]"):
        parse_trigger(f"blended:alpha={alpha}")
