"""No step of a training waits for its device; a stub stands for a GPU (waits.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hfdetox.attacks import Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.data.cache import Pixels
from hfdetox.defenses import parse_defense
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.sharpness import SharpnessAware
from hfdetox.triggers import parse_trigger
from tests.attacks.toy_jobs import toy_job
from tests.defenses import test_battery as battery
from tests.tiny_training import _quick_garbage, convnet, make_phase, mean_loss, toy_pixels
from tests.training.waits import Waits, as_host

__all__ = ["_quick_garbage"]

# an image that is done leaves SAU's search, which saves its passes: how many are left is read once a search step
KNOWN = {"sau": {"defenses/sau.py: an index whose values are read"}}
# the engine's and D3's own settings, and what else is in a step
SETTINGS = {
    "crop-flip": {"augmentation": "crop-flip"},
    "resized-crop-flip": {"augmentation": "resized-crop-flip"},
    "accumulated and clipped": {"gradient_accumulation_steps": "2", "max_grad_norm": "1"},
    "classes": {"reweight": "class"},
    "images": {"reweight": "wasserstein"},
    "auto": {"lambda": "auto", "mixup": "0.2", "features": "adamw", "centered": "true"},
}
ATTACKS = {
    "badnets": {}, "bpp": {}, "blind": {}, "lira": {}, "wanet": {}, "inputaware": {"mask_epochs": "2"},
    "ssba": {"encoder_epochs": "2"},
}  # fmt: skip


def pixels(count: int = 96, side: int = 8) -> Pixels:
    """Return cached toy images; their positions are the host's."""
    found = toy_pixels(count, side)
    as_host(found.positions)
    return found


def places(found: set[str]) -> set[str]:
    """Leave the numbers of lines out."""
    return {f"{text.partition(':')[0]}:{text.partition(': ')[2] and ' ' + text.partition(': ')[2]}" for text in found}


@pytest.mark.parametrize("name", battery.NAMES)
def test_no_step_of_a_defense_waits(name: str) -> None:
    network, settings, images = battery.network(name), battery.settings(name), pixels()
    config, _ = parse_defense(name, settings | ({"epochs": "2"} if "epochs" in settings else {}))
    with Waits() as waits:
        Engine(make_accelerator("cpu", "no"), images).run(network, config.phases(network))
    assert places(waits.in_steps) == KNOWN.get(name, set())
    assert waits.mixed == set()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_makes_a_step_wait(name: str) -> None:
    network, images = battery.network("d3"), pixels()
    config, _ = parse_defense("d3:paper", {**battery.settings("d3"), "epochs": "2", **SETTINGS[name]})
    with Waits() as waits:
        Engine(make_accelerator("cpu", "bf16"), images).run(network, config.phases(network))
    assert waits.in_steps == set()
    assert waits.mixed == set()


@pytest.mark.parametrize("name", ATTACKS)
def test_no_step_of_an_attack_waits(name: str) -> None:
    trigger = parse_trigger(name if name in ("badnets", "ssba") else f"{name}:mode=input")
    context = toy_job(make_accelerator("cpu", "no"), clean=pixels(48, 32), side=32, sharpness=SharpnessAware(),
                      training=TrainingSettings(epochs=2, batch_size=16))  # fmt: skip
    with Waits() as waits:
        run_attack(context, [Implant(trigger, 0, 0.25, poisoner_for(name, ATTACKS[name]))])
    assert waits.in_steps == set()
    assert waits.mixed == set()


def mask(x: torch.Tensor) -> torch.Tensor:
    """Return a condition of the device's."""
    return x > 0


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.detach().sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: np.asarray(x.detach().numpy()),
    "nonzero": lambda x: mask(x).nonzero(),
    "where": lambda x: torch.where(mask(x)),
    "mask": lambda x: x[mask(x)],
    "assigned by a mask": lambda x: x.clone().__setitem__(torch.arange(len(x), device=x.device) < 2, x[:2]),
    "a list as index": lambda x: x[[0, 1]],
    "drawn places": lambda x: x[torch.randperm(2)],
    "a number of the device as index": lambda x: x[x.argmax()],
    "a copy that waits": lambda x: torch.rand(3).to(x.device),
    "made on the device of a list": lambda x: torch.tensor([1.0], device=x.device),
    "copied into": lambda x: x.new_zeros(3).copy_(torch.rand(3)),
}  # fmt: skip
FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number drawn on the host": lambda x: x * float(torch.rand(())),
    "a number of the host beside": lambda x: x + torch.rand(()),
    "a copy that does not wait": lambda x: torch.rand(3).to(x.device, non_blocking=True) + x.new_ones(3),
    "made on the device": lambda x: torch.zeros(3, device=x.device) + x.new_ones(3),
    "places on the device": lambda x: x[torch.arange(2, device=x.device)],
    "chosen by a condition": lambda x: torch.where(mask(x), x, 0),
    "assigned a number by a mask": lambda x: x.clone().__setitem__(mask(x), 0.0),
    "a slice": lambda x: x[1:, None],
    "another type": lambda x: x.to(torch.float64),
    "a host's list of places": lambda x: torch.randperm(5).tolist(),
}  # fmt: skip


def stepping(what: Callable[[torch.Tensor], Any]) -> Waits:
    """Train with something in every step."""
    network, images = convnet(), pixels(48)

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        what(next(model.parameters()).flatten())
        return mean_loss(model, batch)

    with Waits() as waits:
        Engine(make_accelerator("cpu", "no"), images).run(network, [make_phase(network, epochs=1, loss=loss)])
    return waits


@pytest.mark.parametrize("name", WAITING)
def test_the_stub_sees_what_waits(name: str) -> None:
    assert stepping(WAITING[name]).in_steps


@pytest.mark.parametrize("name", FREE)
def test_the_stub_lets_pass_what_does_not(name: str) -> None:
    waits = stepping(FREE[name])
    assert waits.in_steps == set()
    assert waits.mixed == set()


def test_the_stub_sees_tensors_of_both_in_one_operation() -> None:
    assert stepping(lambda x: x[:3] + torch.rand(3)).mixed
    assert stepping(lambda x: torch.rand(len(x))[x.argsort()[:3]]).mixed
