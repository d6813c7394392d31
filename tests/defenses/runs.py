"""Runs of a defense on toy images, and what every one of them must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses.base import DefenseConfig
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.engine import Engine, TrainingRecord
from hfdetox.training.phases import Phase
from tests.killing import Killed, KillingStore
from tests.tiny_training import Scaled, ToyImages, equal_weights, weights_of

SEED = 3


def run(
    config: DefenseConfig,
    network: Scaled,
    accelerator: Accelerator,
    count: int = 48,
    store: CheckpointStore | None = None,
) -> TrainingRecord:
    """Take the network through the defense's phases on toy images."""
    engine = Engine(accelerator, ToyImages(count), seed=SEED, checkpoints=store)
    return engine.run(network, config.phases(network))  # type: ignore[arg-type]


def one_batch(count: int = 48) -> Batch:
    """Return all toy images as one batch."""
    images = ToyImages(count)
    assert images.images is not None
    return Batch(images.images, images.labels, torch.full((count,), 1 / count))


def noted(phase: Phase) -> list[Batch]:
    """Make a phase note the batches its loss is asked for, each once."""
    seen: list[Batch] = []
    loss = phase.loss

    def noting(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        if not seen or seen[-1] is not batch:
            seen.append(batch)
        return loss(network, batch)

    phase.loss = noting
    return seen


def assert_repeatable_and_tidy(config: DefenseConfig, make: Callable[[], Scaled], accelerator: Accelerator) -> None:
    """The same seed gives the same weights, whatever was drawn before; hooks, modes and flags are as they were."""
    results: list[Mapping[str, Any]] = []
    for noise in (1, 2):
        network = make()
        first = next(network.parameters())
        first.requires_grad_(False)
        frozen = first.detach().clone()
        torch.manual_seed(noise)
        run(config, network, accelerator)
        assert [p.requires_grad for p in network.parameters()] == [False] + [True] * (
            len(list(network.parameters())) - 1
        )
        assert torch.equal(first, frozen)
        assert all(p.grad is None for p in network.parameters())
        for module in network.modules():
            assert not module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        results.append(weights_of(network))
    assert equal_weights(dict(results[0]), dict(results[1]))


def assert_resumes(
    config: DefenseConfig, make: Callable[[], Scaled], accelerator: Accelerator, folder: Path, saves: int
) -> None:
    """Killed after any of its `saves` checkpoints, a run goes on to the very weights of the uninterrupted one."""
    whole = make()
    expected = run(config, whole, accelerator, store=CheckpointStore(folder / "whole"))
    assert len(expected.history) == saves
    for kill in range(1, saves + 1):
        place = folder / str(kill)
        with pytest.raises(Killed):
            run(config, make(), accelerator, store=KillingStore(place, kill))
        resumed = make()
        record = run(config, resumed, accelerator, store=CheckpointStore(place))
        assert equal_weights(weights_of(whole), weights_of(resumed)), kill
        assert [row["phase"] for row in record.history] == [row["phase"] for row in expected.history]
