"""Sharpness-aware steps: the perturbed gradient, what is restored after it, and the engine's use of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.sharpness import SharpnessAware, parse_adaptive
from tests.tiny_training import (
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


def trained(accelerator: Accelerator, network: nn.Module, **changes: Any) -> dict[str, torch.Tensor]:
    """Return the network's weights after a short run."""
    Engine(accelerator, ToyImages()).run(network, [make_phase(network, **{"epochs": 2, **changes})])
    return weights_of(network)


@pytest.mark.parametrize(
    ("adaptive", "rho", "expected"),
    [
        # L = 2a² + b²/2 at a = 1, b = 3: g = (4a, b) = (4, 3), ‖g‖ = 5, e = 0.5 · (0.8, 0.6) = (0.4, 0.3);
        # the gradient at (1.4, 3.3) is (5.6, 3.3)
        (False, 0.5, (5.6, 3.3)),
        # T = (1, 3): T g = (4, 9), ‖T g‖ = √97, e = √97 · (4, 27) / √97 = (4, 27); at (5, 30): (20, 30)
        (True, math.sqrt(97), (20.0, 30.0)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_gradient_at_the_perturbed_weights_of_a_quadratic(
    adaptive: bool, rho: float, expected: tuple[float, float], scale: float
) -> None:
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([3.0]))
    unused = nn.Parameter(torch.tensor([7.0]))

    def loss() -> torch.Tensor:
        return scale * (2 * a**2 + b**2 / 2).sum()

    loss().backward()
    with SharpnessAware(rho=rho, adaptive=adaptive).perturbed([a, b, unused]):
        assert a.grad is None
        loss().backward()
    assert [float(weight.detach()) for weight in (a, b, unused)] == [1, 3, 7]
    assert a.grad is not None
    assert b.grad is not None
    assert unused.grad is None
    assert (float(a.grad) / scale, float(b.grad) / scale) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_restored_bit_for_bit_whatever_happens(fails: bool) -> None:
    network = mlp()
    images, before = ToyImages(), weights_of(network)
    cross_entropy(network(images.images), images.labels).backward()
    lengths: list[float] = []

    def inside() -> None:
        with SharpnessAware(rho=0.3, adaptive=False).perturbed(list(network.parameters())):
            moved = torch.cat([(weight - before[name]).flatten() for name, weight in network.state_dict().items()])
            lengths.append(float(moved.norm()))
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            inside()
    else:
        inside()
    assert lengths == [pytest.approx(0.3, rel=1e-4)]
    assert equal_weights(weights_of(network), before)


def test_a_gradient_of_zero_moves_nothing() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.zeros(1)
    with SharpnessAware().perturbed([weight]):
        assert float(weight.detach()) == 2


def test_a_step_of_the_engine_is_one_by_hand(accelerator: Accelerator) -> None:
    sharpness, plain = SharpnessAware(rho=0.2, adaptive=True), mlp()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    images = ToyImages()
    # all images in one step: their order does not matter
    cross_entropy(plain(images.images), images.labels).backward()
    parameters = list(plain.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    weights = [parameter.detach().clone() for parameter in parameters]
    norm = sum(float((g * w).square().sum()) for g, w in zip(gradients, weights, strict=True)) ** 0.5
    with torch.no_grad():
        for parameter, g, w in zip(parameters, gradients, weights, strict=True):
            parameter.add_(0.2 / norm * w * w * g)
    optimizer.zero_grad()
    cross_entropy(plain(images.images), images.labels).backward()
    with torch.no_grad():
        for parameter, w in zip(parameters, weights, strict=True):
            parameter.copy_(w)
    optimizer.step()
    found = trained(accelerator, mlp(), sharpness=sharpness, epochs=1, batch_size=48,
                    optimizer=lambda p: torch.optim.SGD(p, lr=0.05))  # fmt: skip
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    assert not equal_weights(found, trained(accelerator, mlp(), epochs=1, batch_size=48,
                                            optimizer=lambda p: torch.optim.SGD(p, lr=0.05)))  # fmt: skip


def test_batchnorms_statistics_are_those_of_the_first_pass_alone(accelerator: Accelerator) -> None:
    rate_zero = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "epochs": 1, "batch_size": 48}
    plain = trained(accelerator, convnet(), **rate_zero)
    network = convnet()
    sharp = trained(accelerator, network, sharpness=SharpnessAware(), **rate_zero)
    # the weights never move, so one step leaves the same mean and variance if the second pass leaves none
    assert equal_weights(plain, sharp)
    assert not torch.equal(sharp["model.1.running_mean"], torch.zeros(8))
    assert int(sharp["model.1.num_batches_tracked"]) == 1


def test_accumulated_parts_equal_the_whole_batch(accelerator: Accelerator) -> None:
    sharpness = SharpnessAware(rho=0.5)
    whole = trained(accelerator, mlp(), sharpness=sharpness)
    parts = trained(accelerator, mlp(), sharpness=sharpness, gradient_accumulation_steps=2)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5)
    assert not equal_weights(whole, trained(accelerator, mlp()))


def test_the_poisoned_batch_is_the_same_in_both_passes(accelerator: Accelerator) -> None:
    seen: list[torch.Tensor] = []

    def poison(images: torch.Tensor, labels: torch.Tensor, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint_like(images, 256), labels

    def loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch.images)
        return mean_loss(network, batch)

    trained(accelerator, mlp(), sharpness=SharpnessAware(), poison=poison, loss=loss, epochs=1)
    assert len(seen) == 6
    assert all(torch.equal(first, second) for first, second in zip(seen[::2], seen[1::2], strict=True))
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_leaves_the_network_as_it_was(fails: bool, accelerator: Accelerator) -> None:
    network, calls = convnet(), []
    before = set(vars(network))

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        calls.append(1)
        # the second call is the pass at the perturbed weights
        if fails and len(calls) == 2:
            raise KeyboardInterrupt
        return mean_loss(model, batch)

    start = weights_of(network)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            trained(accelerator, network, sharpness=SharpnessAware(), loss=loss)
        names = [name for name, _ in network.named_parameters()]
        assert all(torch.equal(start[name], network.state_dict()[name]) for name in names)
    else:
        trained(accelerator, network, sharpness=SharpnessAware(), loss=loss)
    assert network.model[1].track_running_stats
    assert set(vars(network)) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sam", SharpnessAware()),
        ("sam:", SharpnessAware(2.0, True)),
        ("sam:rho=0.05,adaptive=false", SharpnessAware(0.05, False)),
        ("sam:adaptive=true,rho=3", SharpnessAware(3.0, True)),
    ],
)
def test_an_adaptive_attack_is_read_from_its_text(text: str, expected: SharpnessAware) -> None:
    assert parse_adaptive(text) == expected
    assert parse_adaptive(expected.spec()) == expected


def test_the_usual_training_has_none() -> None:
    assert parse_adaptive(None) is None


def test_its_text_names_both_settings() -> None:
    assert SharpnessAware().spec() == "sam:rho=2.0,adaptive=true"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--adaptive '': the adaptive attack is sam"),
        ("sum:rho=1", "--adaptive 'sum:rho=1': the adaptive attack is sam, as in sam:rho=2.0,adaptive=true"),
        ("sam:radius=1", "'radius=1' is not one of rho=…, adaptive=true"),
        ("sam:plain", "'plain' is not one of"),
        ("sam:rho=1,rho=2", "rho is given twice"),
        ("sam:rho=big", "rho must be a number, got 'big'"),
        ("sam:adaptive=1", "adaptive must be true or false, got '1'"),
        ("sam:rho=0", "sam: rho must be above 0, got 0.0"),
        ("sam:rho=nan", "sam: rho must be above 0, got nan"),
    ],
)
def test_a_wrong_adaptive_attack_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_adaptive(text)
    assert "\n" not in str(caught.value)
