"""What every trigger must do, whatever its family: one battery over all that there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.triggers import TRIGGERS, Trigger, load_trigger, parse_trigger
from tests.triggers.made import VARIANTS, every_trigger, made, noise

NAMES = (*sorted(TRIGGERS), *VARIANTS)
SIZES = [(32, 32), (64, 64), (48, 40), (224, 224)]
# families that change colours, or whose networks were made for the channels of their training images
COLOUR_ONLY = {"ctrl", "ftrojan", "inputaware", "lira", "ssba"}
CASES = [
    (name, (channels, *size))
    for name, trigger in every_trigger().items()
    for channels in (3, 1)
    for size in SIZES
    if channels == 3 or trigger.kind not in COLOUR_ONLY
]


def trigger(name: str) -> Trigger:
    """Return the trigger of the battery with this name, a new object."""
    return VARIANTS[name] if name in VARIANTS else made(name)


def test_every_family_is_here_ready_to_be_put_on_images() -> None:
    assert {trigger(name).kind for name in NAMES} == set(TRIGGERS)
    assert [name for name in NAMES if not trigger(name).fitted] == []


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_shape_dtype_and_input_are_kept_and_pixels_change(name: str, shape: tuple[int, int, int]) -> None:
    images = noise(3, *shape)
    before = images.clone()
    stamped = trigger(name).apply(images)
    assert stamped.shape == images.shape
    assert stamped.dtype == torch.uint8
    assert stamped.device == images.device
    assert torch.equal(images, before)
    assert stamped.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    assert (stamped != images).flatten(1).any(1).all()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_each_image_is_triggered_alone_and_every_time_the_same(name: str, shape: tuple[int, int, int]) -> None:
    images = noise(3, *shape)
    first = trigger(name)
    stamped = first.apply(images)
    # the same object, whatever was drawn since, and a new one that has seen another size in between
    torch.manual_seed(77)
    assert torch.equal(first.apply(images), stamped)
    again = trigger(name)
    again.apply(noise(1, shape[0], 40, 48))
    assert torch.equal(again.apply(images), stamped)
    # one image at a time, and in another memory order
    alone = torch.cat([first.apply(image[None]) for image in images])
    assert close(alone, stamped, name)
    assert close(first.apply(images.to(memory_format=torch.channels_last)), stamped, name)


def close(one: torch.Tensor, other: torch.Tensor, name: str) -> bool:
    """Tell whether two results are equal; convolutions of other batches may differ by one grey level."""
    allowed = int(trigger(name).kind in {"inputaware", "lira", "ssba"})
    return int((one.int() - other.int()).abs().max()) <= allowed


# grey levels that the triggers that add something, or round, can change a pixel by
GREATEST = {
    "sig": 40,
    "sig-slow": 13,
    "lf": 51,
    "lf-random": 51,
    "lc-faint": 64,
    # 0.05 of 255, rounded
    "lira": 13,
    # half of 255 / 7
    "bpp": 18,
    # waves of at most 3.2 in chroma are 1.773 times that in blue
    "ftrojan": 6,
    # of at most 11.3, 2.032 times
    "ctrl": 23,
}


@pytest.mark.parametrize("name", GREATEST)
@pytest.mark.parametrize("grey", [0, 1, 127, 254, 255])
def test_black_never_wraps_around_to_white(name: str, grey: int) -> None:
    images = torch.full((1, 3, 32, 32), grey, dtype=torch.uint8)
    assert (trigger(name).apply(images).int() - grey).abs().max() <= GREATEST[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_makes_the_same_trigger_again(name: str, tmp_path: Path) -> None:
    kept = replace(trigger(name), name="other-name", target=3, mode="input")
    file = tmp_path / "trigger.safetensors"
    kept.save(file)
    images = noise(2)
    for again in (load_trigger(file), parse_trigger(str(file))):
        assert type(again) is type(kept)
        assert again.parameters() == kept.parameters()
        assert torch.equal(again.apply(images), kept.apply(images))
        assert again.file_bytes() == kept.file_bytes() == file.read_bytes()
    # a second trigger of the same settings is the same file
    assert replace(trigger(name), name="other-name", target=3, mode="input").file_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", [name for name in NAMES if not trigger(name).tensors()])
def test_the_specification_makes_the_same_trigger_again(name: str) -> None:
    kept = replace(trigger(name), name="a.b-c_d", target="cat", mode="input")
    again = parse_trigger(kept.spec())
    assert again.parameters() == kept.parameters()
    assert again.spec() == kept.spec()
    assert torch.equal(again.apply(noise()), kept.apply(noise()))


@pytest.mark.parametrize("kind", sorted(TRIGGERS))
def test_a_trigger_that_is_not_made_yet_says_so_in_one_line(kind: str) -> None:
    bare = TRIGGERS[kind]()
    if bare.fitted:
        assert torch.equal(bare.apply(noise()), made(kind).apply(noise()))
        return
    when = "reconstructed from a model" if kind == "mask" else "made during an attack"
    message = rf"trigger {kind}: {kind} is {when} and has no pixels before; name the trigger file"
    with pytest.raises(UsageError, match=message):
        bare.apply(noise())


@pytest.mark.parametrize("kind", sorted(COLOUR_ONLY))
def test_grey_images_for_a_trigger_of_colours_are_one_line(kind: str) -> None:
    with pytest.raises(UsageError, match=r"3 channels.*these have 1; .*") as caught:
        made(kind).apply(noise(2, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_gives_the_same_within_one_grey_level(name: str, size: tuple[int, int]) -> None:
    images = noise(3, 3, *size)
    on_gpu = trigger(name).apply(images.cuda())
    assert on_gpu.device.type == "cuda"
    assert (on_gpu.cpu().int() - trigger(name).apply(images).int()).abs().max() <= 1
