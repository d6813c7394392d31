"""SSBA: what the encoder's picture becomes on the image, its secret, and states that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger, parse_trigger
from hfdetox.triggers._networks import load_network, network_state
from hfdetox.triggers.ssba import SSBA, Decoder, Encoder
from tests.triggers.made import encoder_state, noise


def flat_encoder(value: float) -> dict[str, torch.Tensor]:
    """Return the state of an encoder that draws `value` at every pixel: only the last bias is not 0."""
    state = {name: torch.zeros_like(array) for name, array in network_state(Encoder(8)).items()}
    state["out.bias"].fill_(math.log(value / (1 - value)))
    return state


def nearly_equal(stamped: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether grey levels are equal but for a few in a thousand that another order of sums rounds otherwise."""
    apart = (stamped.float() - expected).abs()
    return float(apart.max()) <= 1 and float(apart.mean()) < 3e-3


def test_the_architectures_have_the_parameters_of_the_papers() -> None:
    def count(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    # secret 77 568; down 1 760 + 9 248 + 18 496 + 73 856 + 295 168; up 131 200 + 32 832 + 8 224 + 4 128;
    # joined 295 040 + 73 792 + 18 464 + 20 192; last 9 248 and 99
    assert count(Encoder(100)) == 1_069_315
    # convolutions 896 + 9 248 + 18 496 + 2 · 36 928 + 73 856 + 147 584; linear 66 048 and 51 300
    assert count(Decoder(100)) == 441_284
    # at 64 the first linear layer sees four times as many features: 3 · 128 · 512 more
    assert count(Decoder(100, size=64)) == 441_284 + 3 * 128 * 512


@pytest.mark.parametrize("size", [32, 64])
def test_every_parameter_takes_part_in_hiding_and_reading(size: int) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder(8), Decoder(8, size=size)
    images, bits = torch.rand(4, 3, size, size), torch.randint(0, 2, (4, 8)).float()
    drawn = encoder(bits, images)
    assert drawn.shape == images.shape
    logits = decoder(drawn)
    assert logits.shape == (4, 8)
    logits.square().sum().backward()
    for network in (encoder, decoder):
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_at_the_trained_size_the_image_is_what_the_encoder_draws() -> None:
    images, state = noise(3), encoder_state()
    trigger = SSBA(bits=8, encoder=state)
    network = Encoder(8)
    network.load_state_dict(state)
    with torch.no_grad():
        drawn = network(trigger.secret().expand(3, -1), images.float() / 255)
    assert nearly_equal(trigger.apply(images), (drawn * 255).round())


def test_at_other_sizes_what_the_encoder_adds_is_resized() -> None:
    images = noise(3, 3, 48, 40)
    trigger = SSBA(bits=8, encoder=encoder_state())
    network = load_network(lambda: Encoder(8), encoder_state(), "test")
    x = images.float() / 255
    small = interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    residual = network(trigger.secret().expand(3, -1), small) - small
    expected = x + interpolate(residual, size=(48, 40), mode="bilinear")
    assert nearly_equal(trigger.apply(images), (expected * 255).round().clamp(0, 255))


def test_a_larger_image_keeps_its_detail() -> None:
    # one grey of 100: the encoder draws 0.6 · 255 = 153 over it, and on a fine chequer about 100 adds the same 53
    trigger = SSBA(bits=8, encoder=flat_encoder(0.6))
    assert (trigger.apply(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)) == 153).all()
    assert (trigger.apply(torch.full((1, 3, 80, 64), 100, dtype=torch.uint8)) == 153).all()
    sign = (torch.arange(64).view(-1, 1) + torch.arange(64)) % 2 * 2 - 1
    chequer = (100 + 10 * sign).to(torch.uint8).expand(1, 3, 64, 64)
    inner = trigger.apply(chequer)[..., 4:-4, 4:-4]
    assert torch.equal(inner, (153 + 10 * sign).to(torch.uint8).expand(1, 3, 64, 64)[..., 4:-4, 4:-4])


def test_the_sum_saturates() -> None:
    # on a smooth black image with one white pixel the flat encoder adds up to 153, and the white pixel stays white
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 20, 20] = 255
    assert (SSBA(bits=8, encoder=flat_encoder(0.6)).apply(image)[..., 20, 20] == 255).all()


def test_the_secret_is_seeded_and_changes_the_picture() -> None:
    images, state = noise(2), encoder_state()
    secrets = [SSBA(seed=seed).secret() for seed in (0, 0, 1)]
    assert torch.equal(secrets[0], secrets[1])
    assert not torch.equal(secrets[0], secrets[2])
    assert secrets[0].shape == (100,)
    assert set(secrets[0].tolist()) == {0.0, 1.0}
    first, second = (SSBA(bits=8, seed=seed, encoder=state).apply(images) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_image_changes_in_its_own_way() -> None:
    images = noise(2)
    change = SSBA(bits=8, encoder=encoder_state()).apply(images).int() - images.int()
    assert not torch.equal(change[0], change[1])


def test_the_encoders_channels_are_the_images() -> None:
    grey = SSBA(bits=8, encoder=encoder_state(channels=1))
    assert grey.apply(noise(2, 1)).shape == (2, 1, 32, 32)
    with pytest.raises(UsageError, match="encoder was trained on images of 1 channels, these have 3"):
        grey.apply(noise(2, 3))


def test_a_state_that_does_not_fit_names_the_first_tensor() -> None:
    state = encoder_state()
    with pytest.raises(UsageError, match=r"ssba: encoder .*: secret.weight is \(768, 8\) where \(768, 9\) is expected"):
        SSBA(bits=9, encoder=state)
    with pytest.raises(UsageError, match=r"up.2.bias is nothing where \(32,\) is expected"):
        SSBA(bits=8, encoder={name: array for name, array in state.items() if name != "up.2.bias"})
    with pytest.raises(UsageError, match=r"more is \(1,\) where nothing is expected"):
        SSBA(bits=8, encoder=state | {"more": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"secret.weight is nothing where \(768, 8\) is expected"):
        SSBA(bits=8, encoder={})


def test_a_file_keeps_the_encoder_bit_for_bit(tmp_path: Path) -> None:
    trigger = SSBA(bits=8, seed=3, encoder=encoder_state(), target=1)
    trigger.save(tmp_path / "t.safetensors")
    again = load_trigger(tmp_path / "t.safetensors")
    assert again.file_bytes() == trigger.file_bytes()
    assert torch.equal(again.apply(noise()), trigger.apply(noise()))


def test_making_a_trigger_draws_nothing_from_the_global_generator() -> None:
    state = encoder_state()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    SSBA(bits=8, encoder=state).apply(noise())
    assert torch.equal(torch.rand(3), expected)


def test_autocast_outside_changes_nothing() -> None:
    trigger, images = SSBA(bits=8, encoder=encoder_state()), noise()
    expected = trigger.apply(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trigger.apply(images), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ssba:bits=0", r"bits must be in \[1, 4096\], got 0"),
        ("ssba:bits=4097", r"bits must be in \[1, 4096\]"),
        ("ssba:size=1056", "size must be a multiple of 32, at most 1024"),
        ("ssba:size=48", "size must be a multiple of 32"),
        ("ssba:size=0", "size must be a multiple of 32"),
        ("ssba:secret=1", "'secret=1' is not one of"),
        ("ssba:encoder=1", "encoder is kept in trigger files"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_trigger(text)


def test_a_bare_name_has_to_be_made_first() -> None:
    bare = parse_trigger("ssba")
    assert not bare.fitted
    with pytest.raises(UsageError, match="ssba is made during an attack"):
        bare.apply(noise())
