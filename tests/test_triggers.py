"""Triggers: what they do to pixels, how they are written down, and what is said about a wrong one."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hfdetox import triggers
from hfdetox.errors import UsageError
from hfdetox.triggers import KINDS, BadNets, Blended, Trigger, available, load_trigger, parse_trigger, parse_triggers

NEW_FAMILY = """
from dataclasses import dataclass
from typing import ClassVar
from hfdetox.triggers.base import Trigger

@dataclass(frozen=True, kw_only=True, eq=False)
class Invert(Trigger):
    kind: ClassVar[str] = "invert"
    summary: ClassVar[str] = "the negative"

    def apply(self, images):
        return 255 - images
"""


def test_a_new_family_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invert.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(triggers, "__path__", [*triggers.__path__, str(tmp_path)])
    found = triggers._discover()
    monkeypatch.delitem(sys.modules, "hfdetox.triggers.invert")
    assert set(found) == {*KINDS, "invert"}
    monkeypatch.setattr(triggers, "KINDS", found)
    assert parse_trigger("invert:target=2").apply(torch.full((1, 3, 2, 2), 250, dtype=torch.uint8)).max() == 5


def noise(count: int = 4, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Return uint8 images N×C×H×W of noise without 255, so that a white pixel is always a stamped one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, channels, height, width), generator=generator).to(torch.uint8)


PICTURE = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(3)).to(torch.uint8)

# every family in several shapes; a new one is one row
TRIGGERS: dict[str, Trigger] = {
    "badnets": BadNets(),
    "badnets-placed": BadNets(size=5, value=7, right=3, bottom=9),
    "badnets-picture": BadNets(size=6, image=PICTURE),
    "blended": Blended(),
    "blended-seed": Blended(alpha=0.05, seed=9),
    "blended-picture": Blended(alpha=1.0, image=PICTURE),
}

# patches: the rows and columns that they own in a 32×32 and in a 64×64 image
PATCHES = {
    "badnets": ((slice(29, 32), slice(29, 32)), (slice(58, 64), slice(58, 64))),
    "badnets-placed": ((slice(18, 23), slice(24, 29)), (slice(36, 46), slice(48, 58))),
    "badnets-picture": ((slice(26, 32), slice(26, 32)), (slice(52, 64), slice(52, 64))),
}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 64, 64), (3, 40, 56), (3, 224, 224)])
@pytest.mark.parametrize("name", TRIGGERS)
def test_every_trigger_keeps_shape_and_dtype_changes_pixels_and_leaves_its_input(
    name: str, shape: tuple[int, ...]
) -> None:
    images = noise(3, *shape)
    before = images.clone()
    stamped = TRIGGERS[name].apply(images)
    assert torch.equal(images, before)
    assert stamped.shape == images.shape
    assert stamped.dtype == torch.uint8
    assert (stamped != images).flatten(1).any(1).all()
    assert stamped.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", TRIGGERS)
def test_every_trigger_is_deterministic_and_treats_each_image_alone(name: str) -> None:
    images = noise(5)
    stamped = TRIGGERS[name].apply(images)
    torch.manual_seed(77)
    assert torch.equal(TRIGGERS[name].apply(images), stamped)
    assert torch.equal(TRIGGERS[name].apply(images[2:3])[0], stamped[2])
    # a view that is not contiguous, as a permuted array gives
    assert torch.equal(TRIGGERS[name].apply(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), stamped)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_changes_exactly_its_own_pixels(name: str, side: int) -> None:
    images = noise(6, 3, side, side)
    stamped = TRIGGERS[name].apply(images)
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


# --- files ---


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_file_round_trip_stamps_the_same_bytes(name: str, tmp_path: Path) -> None:
    trigger = replace(TRIGGERS[name], name="other-name", target=3, mode="input")
    file = tmp_path / "trigger.safetensors"
    trigger.save(file)
    for again in (load_trigger(file), parse_trigger(str(file))):
        assert type(again) is type(trigger)
        assert again.parameters() == trigger.parameters()
        assert torch.equal(again.apply(noise()), trigger.apply(noise()))
        assert again.file_bytes() == trigger.file_bytes() == file.read_bytes()


def test_the_files_json_is_the_metadata_key_trigger(tmp_path: Path) -> None:
    content = BadNets(size=4, target="cat").file_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["trigger"]) == {
        "kind": "badnets", "name": "badnets", "target": "cat", "mode": "native", "size": 4, "value": 255, "right": 0,
        "bottom": 0,
    }  # fmt: skip


def trigger_file(folder: Path, header: object, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a file whose metadata key `trigger` is `header` as JSON."""
    file = folder / "t.safetensors"
    save_file(tensors or {}, file, metadata={"trigger": json.dumps(header)})
    return file


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, {}, "not a trigger file: its metadata has no `trigger` of a known kind"),
        ([1], {}, "not a trigger file"),
        ({"kind": "wonnet"}, {}, r"of a known kind \(badnets, blended, "),
        ({"kind": ["badnets"]}, {}, "of a known kind"),
        ({"kind": "badnets", "colour": 1}, {}, "unknown fields colour for a badnets trigger"),
        ({"kind": "badnets"}, {"mask": torch.zeros(1)}, "unknown fields mask"),
        ({"kind": "badnets", "image": 5}, {}, "unknown fields image"),
        ({"kind": "badnets"}, {"size": torch.zeros(1)}, "unknown fields size"),
        ({"kind": "badnets", "size": "3"}, {}, "size cannot be '3' for a badnets trigger"),
        ({"kind": "badnets", "size": 2.5}, {}, "size cannot be 2.5"),
        ({"kind": "badnets", "size": True}, {}, "size cannot be True"),
        ({"kind": "badnets", "name": 7}, {}, "name cannot be 7"),
        ({"kind": "badnets", "mode": "both"}, {}, "mode cannot be 'both'"),
        ({"kind": "badnets", "target": [1]}, {}, r"target cannot be \[1\]"),
        ({"kind": "blended", "alpha": None}, {}, "alpha cannot be None"),
        ({"kind": "blended"}, {"image": torch.rand(3, 4, 4)}, "image must be a uint8 picture C×h×w, got torch.float32"),
        (
            {"kind": "blended"},
            {"image": torch.zeros(4, 4).byte()},
            r"uint8 picture C×h×w, got torch.uint8 of shape \(4, 4\)",
        ),
        ({"kind": "badnets", "size": 0}, {}, "size must be at least 1"),
        ({"kind": "badnets", "name": "../x"}, {}, "trigger name '../x'"),
    ],
)
def test_a_wrong_trigger_file_is_one_line(
    header: object, tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_trigger(trigger_file(tmp_path, header, tensors))
    assert "\n" not in str(caught.value)


def test_numbers_of_a_file_may_be_whole_where_fractions_are_meant(tmp_path: Path) -> None:
    trigger = load_trigger(trigger_file(tmp_path, {"kind": "blended", "alpha": 1, "target": None}))
    assert isinstance(trigger, Blended)
    assert trigger.alpha == 1


def test_an_unreadable_trigger_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "folder.safetensors").mkdir()
    no_json = tmp_path / "no_json.safetensors"
    save_file({}, no_json, metadata={"trigger": "{"})
    for file in (
        tmp_path / "missing.safetensors",
        tmp_path / "text.safetensors",
        tmp_path / "folder.safetensors",
        no_json,
    ):
        with pytest.raises(UsageError, match="cannot be read as a trigger file"):
            parse_trigger(str(file))


def test_weights_are_not_a_trigger(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is not a trigger file"):
        parse_trigger(str(tmp_path / "model.safetensors"))


# --- specifications ---


@pytest.mark.parametrize("text", ["badnets", "badnets:"])
def test_a_bare_name_is_the_default(text: str) -> None:
    trigger = parse_trigger(text)
    assert isinstance(trigger, BadNets)
    assert trigger.parameters() == BadNets().parameters()
    assert (trigger.name, trigger.target, trigger.mode) == ("badnets", None, "native")


def test_every_key_of_a_specification() -> None:
    patch = parse_trigger("badnets:size=5,value=0,right=1,bottom=2,mode=input,target=dog,name=corner")
    assert isinstance(patch, BadNets)
    assert patch.parameters() == {
        "name": "corner", "target": "dog", "mode": "input", "size": 5, "value": 0, "right": 1, "bottom": 2,
    }  # fmt: skip
    blend = parse_trigger("blended:alpha=0.15,seed=4")
    assert isinstance(blend, Blended)
    assert (blend.alpha, blend.seed) == (0.15, 4)


@pytest.mark.parametrize("trigger", [t for t in TRIGGERS.values() if not t.tensors()] + [
    BadNets(name="a.b-c_d", target="7", mode="input"), Blended(alpha=1 / 3, target="cat"),
])  # fmt: skip
def test_the_specification_of_a_trigger_makes_it_again(trigger: Trigger) -> None:
    again = parse_trigger(trigger.spec())
    assert type(again) is type(trigger)
    assert again.parameters() == trigger.parameters()
    assert again.spec() == trigger.spec()


def test_a_specification_leaves_defaults_out() -> None:
    assert BadNets().spec() == "badnets"
    assert BadNets(name="badnets", size=4, target=0).spec() == "badnets:target=0,size=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wonnet", f"unknown trigger 'wonnet'; known: {', '.join(sorted(KINDS))}, or a .safetensors trigger file"),
        ("", "unknown trigger ''"),
        ("badnets:sise=3", "trigger badnets: 'sise=3' is not one of name=…, target=…, mode=…, size=…"),
        ("badnets:size", "'size' is not one of"),
        ("badnets:3", "'3' is not one of"),
        ("badnets:size=3,size=4", "size is given twice"),
        ("badnets:size=big", "size='big' is not int"),
        ("badnets:size=2.5", "size='2.5' is not int"),
        ("badnets:size=0", "size must be at least 1"),
        ("badnets:value=256", "value in 0 to 255"),
        ("badnets:right=-1", "right and bottom at least 0"),
        ("blended:alpha=0", r"alpha must be in \(0, 1\]"),
        ("blended:alpha=nan", r"alpha must be in \(0, 1\]"),
        ("blended:alpha=much", "alpha='much' is not float"),
        ("badnets:mode=both", "mode must be native or input, got 'both'"),
        ("badnets:name=a b", "trigger name 'a b': use letters"),
        ("badnets:name=mean", "and not 'mean'"),
        ("badnets:name=.hidden", "trigger name '.hidden'"),
        ("badnets:name=" + "x" * 65, "up to 64"),
        ("badnets:image=/nowhere/f.png", "trigger picture /nowhere/f.png cannot be read"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_trigger(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["badnets", "blended"])
def test_a_picture_is_read_from_a_file_and_kept_in_the_trigger_file(kind: str, mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(PICTURE.permute(1, 2, 0).numpy()).convert(mode)
    picture.save(tmp_path / "p.png")
    trigger = parse_trigger(f"{kind}:image={tmp_path / 'p.png'}")
    read = trigger.tensors()["image"]
    assert torch.equal(read, torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    trigger.save(tmp_path / "t.safetensors")
    (tmp_path / "p.png").unlink()
    assert torch.equal(parse_trigger(str(tmp_path / "t.safetensors")).apply(noise()), trigger.apply(noise()))


def test_a_file_that_is_no_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_text("not a picture")
    with pytest.raises(UsageError, match=r"trigger picture .*p.png cannot be read"):
        parse_trigger(f"badnets:image={tmp_path / 'p.png'}")


def test_several_triggers_need_names_of_their_own() -> None:
    with pytest.raises(UsageError, match="two triggers are named 'badnets'; give one of them another name with name=…"):
        parse_triggers(["badnets", "badnets:size=5"])
    with pytest.raises(UsageError, match="two triggers are named 'x'"):
        parse_triggers(["badnets:name=x", Blended(name="x")])
    assert [t.name for t in parse_triggers(["badnets", BadNets(name="big", size=9), "blended"])] == [
        "badnets",
        "big",
        "blended",
    ]


def test_the_list_names_every_key_with_its_default() -> None:
    entries = available()
    assert set(entries) == set(KINDS)
    assert entries["badnets"].parameters["size"] == 3
    assert entries["blended"].parameters == {
        "name": "", "target": None, "mode": "native", "alpha": 0.2, "seed": 0,
    }  # fmt: skip
    assert entries["blended"].arrays == {"image": "picture"}
    for entry in entries.values():
        assert entry.summary
        assert entry.paper
        assert {f.name for f in fields(KINDS[entry.kind])} == {*entry.parameters, *entry.arrays}
        parse_trigger(entry.kind)
