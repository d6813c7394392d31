"""The training loop's checkpoints: how it stops, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses.auto import D3Config
from hfdetox.defenses.d3 import D3
from hfdetox.errors import RunError
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.killing import Killed
from tests.tiny_training import (
    Scaled,
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    make_phase,
    mean_loss,
    mlp,
    weights_of,
)

__all__ = ["_quick_garbage", "accelerator"]


def test_weights_that_are_not_finite_stop_the_run_though_the_loss_is(accelerator: Accelerator) -> None:
    """As a kernel's positions that meet no image: their gradient can be anything, and no loss depends on it."""
    network, unseen = mlp(), nn.Parameter(torch.zeros(2))

    def spoil() -> None:
        with torch.no_grad():
            unseen[1] = math.nan

    phase = make_phase(network, parameters=[*network.parameters(), unseen], after_step=spoil)
    with pytest.raises(RunError, match="the weights are not finite at phase toy, epoch 1; try a lower learning rate"):
        Engine(accelerator, ToyImages()).run(network, [phase])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(
    bad: float, accelerator: Accelerator, tmp_path: Path
) -> None:
    network, calls = mlp(), []

    def loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        calls.append(1)
        # three steps an epoch: the fifth is epoch 2, step 2
        return {"loss": mean_loss(network, batch)["loss"] * (bad if len(calls) == 5 else 1)}

    store = CheckpointStore(tmp_path)
    with pytest.raises(RunError, match=r"phase toy, epoch 2, step 2; try a lower learning rate \(--lr\)"):
        Engine(accelerator, ToyImages(), checkpoints=store).run(network, [make_phase(network, loss=loss)])
    checkpoint = store.load()
    assert checkpoint is not None
    assert checkpoint.record["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())


def test_stop_ends_the_phase_and_a_resumed_run_does_not_go_on_with_it(accelerator: Accelerator, tmp_path: Path) -> None:
    def phases(network: nn.Module) -> list[Phase]:
        return [
            make_phase(network, name="one", epochs=9, stop=lambda row: bool(row["epoch"] == 2)),
            make_phase(network, name="two", epochs=1),
        ]

    network = mlp()
    store = CheckpointStore(tmp_path)
    record = Engine(accelerator, ToyImages(), checkpoints=store).run(network, phases(network))
    assert [(row["phase"], row["epoch"]) for row in record.history] == [("one", 1), ("one", 2), ("two", 1)]

    interrupted = mlp()
    store = CheckpointStore(tmp_path / "again")
    engine = Engine(accelerator, ToyImages(), checkpoints=store)
    first, second = phases(interrupted)
    second.start = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        engine.run(interrupted, [first, second])
    resumed = mlp(seed=1)
    again = engine.run(resumed, phases(resumed))
    assert [(row["phase"], row["epoch"]) for row in again.history] == [("one", 1), ("one", 2), ("two", 1)]
    assert equal_weights(weights_of(network), weights_of(resumed))


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 1),
        (lambda p: torch.optim.SGD(p, lr=0.05), 1),
        (lambda p: torch.optim.AdamW(p, lr=0.01), 2),
    ],
    ids=["momentum", "plain", "adamw-accumulated"],
)
@pytest.mark.parametrize("killed_at", [1, 5, 8])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    optimizer: Any, parts: int, killed_at: int, accelerator: Accelerator, tmp_path: Path
) -> None:
    """Dropout, augmentation, BatchNorm, D3's random start and its initial weights: all as if nothing had happened."""
    images = ToyImages(40)
    config = D3Config(layers=("6",))

    def phase(network: Scaled, kill_at: int | None = None) -> Phase:
        d3, steps = D3(network.model, config), []

        def after() -> None:
            d3.project()
            steps.append(1)
            if len(steps) == kill_at:
                raise Killed

        def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return d3.terms(model(batch.images), batch.labels, batch.weights)

        return make_phase(
            network, optimizer=optimizer, gradient_accumulation_steps=parts, loss=loss, start=d3.initialize,
            after_step=after, state=d3, epochs=4, augmentation="crop-flip",
        )  # fmt: skip

    whole = convnet(dropout=0.3)
    expected = Engine(accelerator, images, seed=7).run(whole, [phase(whole)])

    killed = convnet(dropout=0.3)
    with pytest.raises(Killed):
        Engine(accelerator, images, seed=7, checkpoints=CheckpointStore(tmp_path)).run(
            killed, [phase(killed, killed_at)]
        )

    # three steps an epoch. With other weights all that matters, D3's initial ones too, must come from the checkpoint
    resumed = convnet(seed=1 if killed_at > 3 else 0, dropout=0.3)
    torch.manual_seed(123)
    record = Engine(accelerator, images, seed=7, checkpoints=CheckpointStore(tmp_path)).run(resumed, [phase(resumed)])
    assert equal_weights(weights_of(whole), weights_of(resumed))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in record.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in expected.history
    ]
    assert (record.steps, record.images) == (expected.steps, expected.images)


def test_a_finished_run_is_not_trained_again(accelerator: Accelerator, tmp_path: Path) -> None:
    network, again = mlp(), mlp(seed=1)
    store = CheckpointStore(tmp_path)
    first = Engine(accelerator, ToyImages(), checkpoints=store).run(network, [make_phase(network)])
    calls: list[int] = []
    phase = make_phase(again, after_step=lambda: calls.append(1))
    second = Engine(accelerator, ToyImages(), checkpoints=store).run(again, [phase])
    assert calls == []
    assert equal_weights(weights_of(network), weights_of(again))
    assert second == first


def test_the_scalers_state_is_resumed(tmp_path: Path) -> None:
    scales = []
    for _ in range(2):
        accelerator = make_accelerator("cpu", "no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        network = mlp()
        store = CheckpointStore(tmp_path)
        Engine(accelerator, ToyImages(), checkpoints=store).run(network, [make_phase(network, epochs=2, batch_size=24)])
        scales.append(accelerator.scaler.get_scale())
    # four steps double it twice; the second run, which has nothing left to do, takes it over
    assert scales == [64.0, 64.0]


def test_a_checkpoint_of_another_model_is_one_line(accelerator: Accelerator, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    network, other = mlp(), convnet()
    Engine(accelerator, ToyImages(), checkpoints=store).run(network, [make_phase(network, epochs=1)])
    with pytest.raises(RunError, match="another model than this one; start again without --resume"):
        Engine(accelerator, ToyImages(), checkpoints=store).run(other, [make_phase(other)])
