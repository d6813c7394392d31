"""TrojanNN: a saturating sum, and the logo that it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers.trojannn import TrojanNN, logo


def test_the_pattern_is_added_and_saturates() -> None:
    q = torch.zeros(3, 32, 32)
    q[0, 3, 4], q[1, 3, 4], q[2, 3, 4] = 1.0, 0.5, 0.2
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    stamped = TrojanNN(pattern=q).apply(images)
    # 255, 127.5 truncated and 51 on 0, 100 and 200; modulo 256 would give 99 in the second image
    assert stamped[:, :, 3, 4].tolist() == [[255, 127, 51], [255, 227, 151], [255, 255, 251]]
    stamped[:, :, 3, 4] = images[:, :, 3, 4]
    assert torch.equal(stamped, images)


@pytest.mark.parametrize("seed", range(4))
def test_the_logo_is_a_thing_on_an_empty_ground(seed: int) -> None:
    drawn = logo(32, seed)
    assert drawn.shape == (3, 32, 32)
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) == 0
    assert 0.5 < float(drawn.max()) <= 1
    inside = (drawn > 0).all(0)
    # a disc of radius 0.55 to 0.65 in a square of side 2 covers 24 to 33 % of it
    assert 0.2 < float(inside.float().mean()) < 0.4
    # wholly in the picture, and nothing lies between all and no channels
    assert not torch.cat([inside[0], inside[-1], inside[:, 0], inside[:, -1]]).any()
    assert torch.equal(inside, (drawn > 0).any(0))


def test_the_logo_is_seeded_and_of_the_same_share_at_any_size() -> None:
    assert torch.equal(logo(32, 1), logo(32, 1))
    assert not torch.equal(logo(32, 1), logo(32, 2))
    shares = [float((logo(size, 1) > 0).any(0).float().mean()) for size in (32, 64, 224)]
    assert shares == pytest.approx([shares[2]] * 3, abs=0.02)


def test_grey_images_get_the_luma() -> None:
    q = torch.zeros(3, 8, 8)
    q[1] = 1.0
    # 0.587 · 255 = 149.7
    assert (TrojanNN(pattern=q).apply(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)) == 149).all()


def test_a_file_keeps_the_pattern_bit_for_bit(tmp_path: Path) -> None:
    trigger = TrojanNN(pattern=logo(32, 3), target="all-to-all")
    trigger.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert again.file_bytes() == trigger.file_bytes()
    assert torch.equal(again.tensors()["pattern"], logo(32, 3))


def test_a_pattern_in_other_units_is_an_error() -> None:
    for factor, reach in ((255, "from 0 to 2"), (1 / 1000, "from 0 to 0.000"), (0, "from 0 to 0")):
        with pytest.raises(UsageError, match=f"pattern reaches {reach}.*give it in units of"):
            TrojanNN(pattern=logo(32, 0) * factor)
    with pytest.raises(UsageError, match=r"pattern reaches from -0\.1 to"):
        TrojanNN(pattern=logo(32, 0) - 0.1)
    with pytest.raises(UsageError, match=r"pattern must be C×h×w, got shape \(32, 32\)"):
        TrojanNN(pattern=logo(32, 0)[0])
    with pytest.raises(UsageError, match="pattern has 3 channels, the images have 2"):
        TrojanNN(pattern=logo(32, 0)).apply(torch.zeros(1, 2, 32, 32, dtype=torch.uint8))


def test_a_bare_name_has_to_be_made_first() -> None:
    bare = parse_trigger("trojannn:seed=4")
    assert not bare.fitted
    with pytest.raises(UsageError, match="trojannn is made during an attack"):
        bare.apply(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UsageError, match="'logo=1' is not one of"):
        parse_trigger("trojannn:logo=1")
