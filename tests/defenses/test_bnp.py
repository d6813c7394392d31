"""BNP: its divergence by hand, exact statistics over batches, and the channel that differs from clean images."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from hfdetox.defenses.bnp import BNP, BNPConfig, divergence
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from tests.defenses.handmade import TRIGGER_CHANNEL, handmade, varied
from tests.tiny_training import (
    Scaled,
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    mlp,
    weights_of,
)  # fmt: skip

__all__ = ["_quick_garbage", "accelerator"]


def inputs_of_norm(network: Scaled, images: ToyImages) -> torch.Tensor:
    """Return what the norm at `model.1` reads of all images, channels first, float64."""
    assert images.images is not None
    with torch.no_grad():
        values = network.model[0](images.images.float() / 127.5 - 1)  # type: ignore[index]
    return values.transpose(0, 1).flatten(1).double()


def test_divergence_by_hand() -> None:
    # equal: 0. Shift 2, v_b 1, v_r 4: ½ ln 4 + (1 + 4) / 8 − ½. Shift 0, v_b 4, v_r 1: −½ ln 4 + 2 − ½
    found = divergence(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 4.0]), torch.tensor([3.0, 4.0, 1.0]))
    expected = [0.0, math.log(2) + 0.125, 1.5 - math.log(2)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_divergence_is_that_of_torchs_normal_distributions() -> None:
    clean, stored = torch.distributions.Normal(1.5, 0.7), torch.distributions.Normal(-0.4, 1.9)
    found = divergence(torch.tensor(1.9), torch.tensor(0.49), torch.tensor(3.61))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(clean, stored))


def test_statistics_are_exact_over_uneven_batches() -> None:
    network, images = varied(convnet()), ToyImages(21)
    assert images.images is not None
    bnp = BNP(network, 3.0)
    bnp.start()
    with torch.no_grad():
        for rows in (slice(0, 16), slice(16, 21)):
            labels = images.labels[rows]
            bnp.on_batch(network, Batch(images.images[rows], labels, torch.full((len(labels),), 1 / len(labels))))
    values = inputs_of_norm(network, images)
    count, first, second = bnp.sums["model.1"].double()
    assert count.tolist() == [21 * 64] * 8
    torch.testing.assert_close(
        first / count + network.model[1].running_mean.double(), values.mean(1), atol=1e-5, rtol=0
    )
    variance = second / count - (first / count).square()
    torch.testing.assert_close(variance, values.var(1, correction=0), atol=1e-5, rtol=1e-4)


def test_the_channel_whose_statistics_differ_goes_and_nothing_else_changes(accelerator: Accelerator) -> None:
    network, images = handmade(), ToyImages(30)
    values, norm = inputs_of_norm(network, images), network.model[1]
    with torch.no_grad():
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1, correction=0))
        # five deviations away: KL = (v + 25 v) / (2 v) − ½ = 12.5, the others' are 0: 3.75 deviations above the mean
        norm.running_mean[TRIGGER_CHANNEL] += 5 * norm.running_var[TRIGGER_CHANNEL].sqrt()
    before = weights_of(network)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    record = Engine(accelerator, images).run(network, BNPConfig().phases(network))  # type: ignore[arg-type]
    assert (record.history[0]["pruned"], record.history[0]["channels"]) == (1, 16)
    before["model.1.weight"][TRIGGER_CHANNEL] = 0
    before["model.1.bias"][TRIGGER_CHANNEL] = 0
    assert equal_weights(weights_of(network), before)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_network_without_running_statistics_is_refused_in_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"bnp: Sequential has no BatchNorm whose running statistics.*of clean images"
    ) as caught:
        BNPConfig().phases(mlp())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_u_is_checked() -> None:
    with pytest.raises(UsageError, match="u must be at least 0"):
        BNPConfig(u=math.nan)
