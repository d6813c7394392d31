"""FT against a plain loop, its loss by hand, and the control arm with a random head."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.defenses.ft import FTConfig, RandomHeadConfig
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, noted, one_batch, run
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, convnet, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = FTConfig(epochs=2, batch_size=16, learning_rate=0.05)
RANDOM = RandomHeadConfig(epochs=2, batch_size=16, learning_rate=0.05)


def test_ft_is_a_plain_loop_of_sgd_with_decay_and_a_cosine(accelerator: Accelerator) -> None:
    network, plain = convnet(), convnet()
    (phase,) = SMALL.phases(network)  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    seen = noted(phase)
    Engine(accelerator, ToyImages()).run(network, [phase])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    plain.train()
    for number, batch in enumerate(seen):
        # the cosine of two epochs of three steps: 1, then (1 + cos(π / 2)) / 2 = 0.5
        optimizer.param_groups[0]["lr"] = 0.05 if number < 3 else 0.025
        optimizer.zero_grad()
        cross_entropy(plain(batch.images), batch.labels).backward()
        optimizer.step()
    assert len(seen) == 6
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [
        # p = (1/2, 1/4, 1/4), label 0: ln 2
        (0.0, math.log(2)),
        # 0.9 ln 2 + 0.05 · (ln 4 + ln 4)
        (0.1, 0.9 * math.log(2) + 0.1 * math.log(4)),
    ],
)
def test_cross_entropy_by_hand(smoothing: float, expected: float) -> None:
    logits = torch.tensor([[math.log(2), 0.0, 0.0], [9.0, 9.0, 9.0]])
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    assert float(batch.cross_entropy(logits, smoothing=smoothing)) == pytest.approx(expected, rel=1e-6)


def test_smoothing_leaves_less_to_the_label_than_pytorchs() -> None:
    """PyTorch's s puts s / K on each class: with s' = s · K / (K − 1) both are the same."""
    batch = one_batch(6)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    theirs = cross_entropy(logits, batch.labels, label_smoothing=0.2 * 3 / 2)
    torch.testing.assert_close(batch.cross_entropy(logits, smoothing=0.2), theirs)


def test_cross_entropy_is_float32_inside_autocast() -> None:
    batch = one_batch(6)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = batch.cross_entropy(logits, smoothing=0.1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, batch.cross_entropy(logits.float(), smoothing=0.1))


def test_the_random_head_starts_uniform_on_the_old_sphere_and_keeps_its_bias() -> None:
    network = mlp()
    before = weights_of(network)
    (phase,) = RANDOM.phases(network)  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    assert phase.start is not None
    torch.manual_seed(5)
    phase.start()
    after = weights_of(network)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.4.weight"]
    torch.manual_seed(5)
    uniform = torch.rand(3, 16) - 0.5
    expected = uniform / uniform.norm() * before["model.4.weight"].norm()
    torch.testing.assert_close(after["model.4.weight"], expected)
    assert RANDOM.selected_layers(network.model) == ["4"]


def test_plain_ft_draws_nothing() -> None:
    (phase,) = SMALL.phases(mlp())  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    assert phase.start is None


@pytest.mark.parametrize("config", [SMALL, RANDOM], ids=["ft", "random-head"])
def test_repeatable_and_tidy(config: FTConfig, accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(config, lambda: convnet(dropout=0.3), accelerator)


@pytest.mark.parametrize("config", [SMALL, RANDOM], ids=["ft", "random-head"])
def test_resumes(config: FTConfig, accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(config, lambda: convnet(dropout=0.3), accelerator, tmp_path, saves=2)


def test_both_learn_the_toy_classes(accelerator: Accelerator) -> None:
    for config in (FTConfig(epochs=15, batch_size=16), RandomHeadConfig(epochs=15, batch_size=16)):
        network = mlp()
        history = run(config, network, accelerator).history
        assert history[-1]["clean_loss"] < 0.5 * history[0]["clean_loss"]
        assert history[-1]["loss"] == history[-1]["clean_loss"]


def test_presets_and_defaults() -> None:
    assert parse_defense("ft")[0] == FTConfig()
    assert (FTConfig().weight_decay, FTConfig().epochs, FTConfig().learning_rate) == (5e-4, 100, 0.01)
    for name in ("ft", "ft-random-head"):
        assert parse_defense(f"{name}:d3-settings")[0].settings()["weight_decay"] == 0
