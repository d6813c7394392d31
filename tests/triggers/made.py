"""Triggers ready to be put on images, one of every family: those that an attack makes get seeded random arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from hfdetox.triggers import TRIGGERS, BadNets, Blended, Trigger, parse_trigger
from hfdetox.triggers._networks import network_state
from hfdetox.triggers.inputaware import Generator, InputAware
from hfdetox.triggers.lf import LF
from hfdetox.triggers.lira import LIRA, Autoencoder
from hfdetox.triggers.mask import Mask
from hfdetox.triggers.ssba import SSBA, Encoder
from hfdetox.triggers.trojannn import TrojanNN, logo

State = dict[str, torch.Tensor]


def random_state(network: torch.nn.Module, seed: int) -> State:
    """Return seeded values for a network's state, far enough from 0 that its inputs show in what it gives.

    Matrices and kernels keep the size of what they are given (He et al.); scales and variances are 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(array.shape, generator=generator) * (2 / array[0].numel()) ** 0.5 if array.ndim > 1
        else torch.rand(array.shape, generator=generator) + (-0.5 if name.endswith(("bias", "mean")) else 0.5)
        for name, array in network_state(network).items()
    }  # fmt: skip


@cache
def encoder_state(bits: int = 8, channels: int = 3) -> State:
    """Return random values for SSBA's encoder; the same object every time, not to be changed."""
    return random_state(Encoder(bits, channels), 5)


@cache
def generator_states(channels: int = 3) -> tuple[State, State]:
    """Return random values for Input-aware's generator and mask; the same objects every time, not to be changed."""
    return random_state(Generator(channels, channels), 1), random_state(Generator(channels, 1), 2)


@cache
def autoencoder_state(channels: int = 3) -> State:
    """Return random values for LIRA's autoencoder; the same object every time, not to be changed."""
    return random_state(Autoencoder(channels), 6)


def _inputaware() -> Trigger:
    generator, mask = generator_states()
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
    return InputAware(generator=generator, mask=mask, mean=mean, std=std)


def _mask(channels: int = 3) -> Trigger:
    generator = torch.Generator().manual_seed(8)
    return Mask(
        mask=torch.rand(1, 8, 8, generator=generator), pattern=torch.rand(channels, 32, 32, generator=generator)
    )


# families that are nothing before an attack, or a search, has made them: a function that gives one with random arrays
MAKERS: dict[str, Callable[[], Trigger]] = {
    "inputaware": _inputaware,
    "lira": lambda: LIRA(epsilon=0.05, autoencoder=autoencoder_state()),
    "mask": _mask,
    "lf": lambda: LF(perturbation=LF(pattern="random", seed=4).signal()),
    "ssba": lambda: SSBA(bits=8, encoder=encoder_state()),
    "trojannn": lambda: TrojanNN(pattern=logo(32, 1)),
}


def made(kind: str) -> Trigger:
    """Return a fitted trigger of a family, always the same one."""
    return MAKERS[kind]() if kind in MAKERS else TRIGGERS[kind]()


def noise(count: int = 4, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Return uint8 images N×C×H×W of noise without 255, so that a white pixel is always a stamped one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, channels, height, width), generator=generator).to(torch.uint8)


PICTURE = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(3)).to(torch.uint8)

# more shapes of the families than their defaults, by a name of their own
VARIANTS: dict[str, Trigger] = {
    "badnets-placed": parse_trigger("badnets:size=5,value=7,right=3,bottom=9"),
    "badnets-grid": parse_trigger("badnets:grid,size=4,bottom=1"),
    "badnets-picture": BadNets(size=6, image=PICTURE),
    "blended-seed": parse_trigger("blended:alpha=0.05,seed=9"),
    "mask-blend": Mask(
        mask=torch.full((1, 1, 1), 0.08), pattern=torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(4))
    ),
    "blended-picture": Blended(alpha=1.0, image=PICTURE),
    "sig-slow": parse_trigger("sig:delta=12.5,frequency=1.5"),
    "bpp-dithered": parse_trigger("bpp:dither=true,levels=3"),
    "ftrojan-strong": parse_trigger("ftrojan:magnitude=80"),
    "ctrl-strong": parse_trigger("ctrl:magnitude=300"),
    "lc-faint": parse_trigger("lc:amplitude=0.25"),
    "lf-random": parse_trigger("lf:random,seed=2"),
    "wanet-strong": parse_trigger("wanet:s=1.5,k=8,seed=2"),
}


def every_trigger() -> dict[str, Trigger]:
    """Return one trigger of every family and the variants, by name."""
    return {kind: made(kind) for kind in sorted(TRIGGERS)} | VARIANTS
