"""SyncBatchNorm for every network that a run trains; there is no GPU here, so its own numbers are torch's to keep."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from hfdetox.training import engine
from hfdetox.training.devices import synchronised
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, convnet, make_phase, weights_of

__all__ = ["_quick_garbage", "accelerator"]

# what `synchronised` asks: two processes on GPUs
GPUS: Any = SimpleNamespace(num_processes=2, device=torch.device("cuda"))


class OwnNorm(nn.BatchNorm2d):
    """A norm that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Flatten(), nn.BatchNorm1d(256))


def test_layers_are_synchronised_in_place_and_put_back() -> None:
    network, seen = norms().eval(), []
    images, before = torch.rand(4, 3, 8, 8), weights_of(network)
    expected, kinds = network(images), [type(layer) for layer in network]
    network[1].register_forward_hook(lambda *_: seen.append(1))
    layers = list(network)
    with synchronised([network], GPUS):
        assert [isinstance(layer, nn.SyncBatchNorm) for layer in network] == [False, True, True, False, True]
        assert isinstance(network[2], SyncBatchNormAct)
        # defenses look for these, and hold the layers that they hook
        assert isinstance(network[1], nn.BatchNorm2d)
        assert list(network) == layers
        assert torch.equal(network(images), expected)
        assert seen == [1]
        network.train()(images)
    assert [type(layer) for layer in network] == kinds
    assert not any(hasattr(layer, "process_group") for layer in network)
    assert network.state_dict().keys() == before.keys()
    assert network[1].num_batches_tracked == 1


def test_a_norm_with_its_own_forward_keeps_it() -> None:
    network = nn.Sequential(OwnNorm(3))
    with synchronised([network], GPUS):
        assert type(network[0]) is OwnNorm


def test_layers_are_put_back_after_an_error_and_one_process_or_cpus_change_nothing() -> None:
    network = norms()
    with pytest.raises(KeyboardInterrupt), synchronised([network], GPUS):
        raise KeyboardInterrupt
    assert type(network[1]) is nn.BatchNorm2d
    for alone in (SimpleNamespace(num_processes=1, device=torch.device("cuda")),
                  SimpleNamespace(num_processes=2, device=torch.device("cpu"))):  # fmt: skip
        with synchronised([network], alone):  # type: ignore[arg-type]
            assert type(network[1]) is nn.BatchNorm2d


def test_the_engine_synchronises_every_network_that_a_phase_trains(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    """Also copies that are no part of the classifier: NAD's teacher, RNP's unlearnt network."""
    given: list[list[nn.Module]] = []
    monkeypatch.setattr(engine, "synchronised", lambda networks, _: given.append(list(networks)) or nullcontext())
    network, teacher = convnet(), convnet(seed=1)
    phases = [replace(make_phase(teacher, epochs=1), network=teacher), make_phase(network, epochs=1)]
    engine.Engine(accelerator, ToyImages()).run(network, phases)
    assert given == [[network, teacher]]
