"""What a defense says that it will compute, beside what goes through its networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from hfdetox.defenses import parse_defense
from hfdetox.defenses.base import FORWARD
from hfdetox.models.layers import classes_of, has_batch_norm
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.defenses import test_battery as battery
from tests.tiny_training import _quick_garbage, toy_pixels

__all__ = ["_quick_garbage"]

# in place of what would take minutes
SHORT = {"epochs": "6", "inversion_epochs": "30", "initial_rounds": "30", "free_rounds": "26", "sparse_rounds": "26",
         "inner_steps": "4", "patience": "25"}  # fmt: skip
DEFENSES = [*battery.NAMES, "d3:auto", "d3:auto-1"]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the images that go forward through any network, and those that a gradient comes back of."""
    found = {"forward": 0, "back": 0}

    def back(images: int, _: Any) -> None:
        found["back"] += images

    def seen(module: nn.Module, given: Any, logits: Any) -> None:
        if isinstance(module, Network):
            found["forward"] += len(given[0])
            if logits.requires_grad:
                logits.register_hook(functools.partial(back, len(given[0])))

    hook = nn.modules.module.register_module_forward_hook(seen)
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.parametrize("images", [300, 90])
@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_computes_what_it_says(name: str, images: int) -> None:
    network = battery.network(name.partition(":")[0])
    known = parse_defense(name, {})[0].settings()
    config, _ = parse_defense(name, {key: value for key, value in SHORT.items() if key in known})
    with counted() as found:
        Engine(make_accelerator("cpu", "no"), toy_pixels(images, 8)).run(network, config.phases(network))
    done = found["back"] + FORWARD * (found["forward"] - found["back"])
    for settled in (config, config.settled(batch_norm=has_batch_norm(network))):
        check(done, settled.efforts(images, classes_of(network.model)), images)


def check(done: float, ways: tuple[float, ...], images: int) -> None:
    # CLP computes nothing, and says that it looks once
    assert 0.65 * min(ways) - images * FORWARD <= done <= 1.3 * max(ways), (done, ways)


@pytest.mark.parametrize(("name", "setting"), [("d3:auto", "features"), ("unlearn", "optimizer")])
def test_patches_are_searched_again_where_there_is_no_batch_norm_alone(name: str, setting: str) -> None:
    """`_search_again`: `rounds` patches of half the steps more, of 48 images, for each accused class."""
    config, _ = parse_defense(name, {})
    without, normed = (config.settled(batch_norm=there) for there in (False, True))
    again = 2 * 60 * 48
    for place, accused in ((0, 1), (1, 4)):
        first, second = (one.efforts(2500, 10)[place] for one in (without, normed))
        assert first - second == pytest.approx(accused * again)
    # of a network that is not known yet, the least and the most
    assert min(config.efforts(2500, 10)) == min(normed.efforts(2500, 10))
    assert max(config.efforts(2500, 10)) == max(without.efforts(2500, 10))
    chosen, _ = parse_defense(name, {setting: "adamw"})
    assert chosen.settled(batch_norm=True) == chosen


def test_a_defense_of_a_package_needs_no_settling() -> None:
    config, _ = parse_defense("ft", {})
    assert config.settled(batch_norm=True) == config
