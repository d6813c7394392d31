"""ANP and RNP against their equations: the perturbation, one trained step, the unlearning, and runs that resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses.anp import ANP, ANPConfig, ascend
from hfdetox.defenses.base import TuningConfig
from hfdetox.defenses.rnp import RNP, RNPConfig
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.handmade import convnet_logits, varied
from tests.killing import Killed
from tests.tiny_training import (
    CLASSES,
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

SMALL_ANP = ANPConfig(epochs=3, batch_size=16, augmentation="none", budget=0.5)
SMALL_RNP = RNPConfig(epochs=3, batch_size=16, augmentation="none", budget=0.5)


def batch_of(count: int = 12) -> Batch:
    """Return toy images whose weights are uneven and sum to 1."""
    images = ToyImages(count)
    assert images.images is not None
    weights = torch.arange(1.0, count + 1)
    return Batch(images.images, images.labels, weights / weights.sum())


def loss_by_hand(network: Scaled, batch: Batch, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return Σ w_i ce_i of the network with these γ and β."""
    logits = convnet_logits(network, batch.images, scale, shift)
    return (batch.weights * cross_entropy(logits, batch.labels, reduction="none")).sum()


# --- ANP ---


def test_anps_ascent_and_its_projection_by_hand() -> None:
    noise, slope = torch.tensor([0.3, -0.3, 0.1, 0.3]), torch.tensor([2.0, -0.001, 0.0, -5.0])
    # one step of 0.4: 0.7 and −0.7 go back to ±0.4; two steps of 0.2 each: 0.5 does
    assert ascend(noise, slope, 0.4, 1).tolist() == pytest.approx([0.4, -0.4, 0.1, -0.1])
    assert ascend(noise, slope, 0.4, 2).tolist() == pytest.approx([0.4, -0.4, 0.1, 0.1])
    assert ascend(noise, slope, 0.4, 8).tolist() == pytest.approx([0.35, -0.35, 0.1, 0.25])


@pytest.mark.parametrize("steps", [1, 2])
def test_anps_perturbation_is_the_signed_ascent_from_a_uniform_start(steps: int) -> None:
    network, batch = varied(convnet()), batch_of()
    anp = ANP(network, ANPConfig(steps=steps))
    anp.masked.train()
    torch.manual_seed(4)
    found = anp.perturbation(batch)
    torch.manual_seed(4)
    delta, xi = (torch.empty(8).uniform_(-0.4, 0.4) for _ in range(2))
    norm = network.model[1]
    for _ in range(steps):
        delta.requires_grad_()
        xi.requires_grad_()
        loss = loss_by_hand(network, batch, norm.weight.detach() * (1 + delta), norm.bias.detach() * (1 + xi))
        slopes = torch.autograd.grad(loss, [delta, xi])
        delta = (delta.detach() + 0.4 / steps * slopes[0].sign()).clamp(-0.4, 0.4)
        xi = (xi.detach() + 0.4 / steps * slopes[1].sign()).clamp(-0.4, 0.4)
    torch.testing.assert_close(found[0], delta)
    torch.testing.assert_close(found[1], xi)
    assert not found[0].requires_grad
    assert anp.masked.mask.grad is None


def test_a_step_of_anp_is_its_equation(accelerator: Accelerator) -> None:
    """One batch, one epoch: m = clamp(1 − lr · ∇[α L(m) + (1 − α) L(m + δ, 1 + ξ)]) with the step's own δ and ξ."""
    network = varied(convnet())
    train, _ = replace(SMALL_ANP, epochs=1, batch_size=64).phases(network)  # type: ignore[arg-type]
    anp, seen = train.loss.__self__, []  # type: ignore[union-attr]
    assert isinstance(anp, ANP)
    perturbation = anp.perturbation

    def noting(batch: Batch) -> Any:
        seen.append((batch, perturbation(batch)))
        return seen[-1][1]

    anp.perturbation = noting  # type: ignore[method-assign]
    before = weights_of(network)
    record = Engine(accelerator, ToyImages(40)).run(network, [train])
    assert equal_weights(weights_of(network), before)
    ((batch, (delta, xi)),) = seen
    assert len(batch.labels) == 32  # the part that is fitted on
    plain, mask = varied(convnet()), torch.ones(8, requires_grad=True)
    scale, shift = plain.model[1].weight.detach(), plain.model[1].bias.detach()
    clean = loss_by_hand(plain, batch, scale * mask, shift)
    robust = loss_by_hand(plain, batch, scale * (mask + delta), shift * (1 + xi))
    (slope,) = torch.autograd.grad(0.2 * clean + 0.8 * robust, mask)
    torch.testing.assert_close(anp.masked.mask.detach(), (1 - 0.2 * slope).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert record.history[0]["loss"] == pytest.approx(float((0.2 * clean + 0.8 * robust).detach()), rel=1e-4)


def test_anp_without_batchnorm_perturbs_hidden_units() -> None:
    network, batch = mlp(), batch_of()
    anp = ANP(network, ANPConfig())
    delta, xi = anp.perturbation(batch)
    assert delta.shape == xi.shape == (16,)
    # no unit has a shift: ξ has no slope and stays where it was drawn
    assert delta.abs().max() <= 0.4
    torch.manual_seed(4)
    _, again = anp.perturbation(batch)
    torch.manual_seed(4)
    torch.empty(16).uniform_(-0.4, 0.4)
    torch.testing.assert_close(again, torch.empty(16).uniform_(-0.4, 0.4))


# --- RNP ---


def test_rnp_unlearns_by_ascent() -> None:
    network, batch = varied(convnet()), batch_of()
    rnp = RNP(network, RNPConfig())
    zeros = nn.Linear(1, 1)
    zeros.forward = lambda images: torch.zeros(len(images), CLASSES)  # type: ignore[method-assign]
    terms = rnp.unlearning_loss(zeros, batch)
    assert float(terms["loss"]) == pytest.approx(-math.log(3))
    # all zeros is class 0: images 1, 4, 7 and 10 of weights 1 to 12, which sum to 78
    assert float(terms["accuracy"]) == pytest.approx((1 + 4 + 7 + 10) / 78)
    assert [rnp.has_unlearnt({"accuracy": value}) for value in (0.1, 0.2, 0.21)] == [True, True, False]


def test_a_step_of_rnps_recovery_is_its_equation(accelerator: Accelerator) -> None:
    """One batch, one epoch: m = clamp(1 − lr · α · ∇L(m)) on the copy; weight decay is the unlearning's alone."""
    network = varied(convnet())
    _, recover, _ = replace(SMALL_RNP, epochs=1, batch_size=64).phases(network)  # type: ignore[arg-type]
    rnp, loss, seen = recover.loss.__self__, recover.loss, []  # type: ignore[union-attr]
    assert isinstance(recover, Phase)
    assert isinstance(rnp, RNP)

    def noting(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return loss(model, batch)

    recover.loss = noting
    with torch.no_grad():
        rnp.unlearnt.model[6].weight.neg_()  # stands for what was unlearnt
    Engine(accelerator, ToyImages(40)).run(network, [recover])
    plain, mask = varied(convnet()), torch.ones(8, requires_grad=True)
    with torch.no_grad():
        plain.model[6].weight.neg_()
    norm = plain.model[1]
    (slope,) = torch.autograd.grad(
        0.2 * loss_by_hand(plain, seen[0], norm.weight.detach() * mask, norm.bias.detach()), mask
    )
    torch.testing.assert_close(rnp.masked.mask.detach(), (1 - 0.2 * slope).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_rnps_unlearning_ends_once_the_accuracy_is_low_and_spares_the_network(accelerator: Accelerator) -> None:
    network = varied(convnet())
    before = weights_of(network)
    # every accuracy is at most 0.99 on a network that was never trained
    unlearn, _, _ = replace(SMALL_RNP, stop_accuracy=0.99).phases(network)  # type: ignore[arg-type]
    rnp = unlearn.loss.__self__  # type: ignore[union-attr]
    assert isinstance(rnp, RNP)
    record = Engine(accelerator, ToyImages(40)).run(network, [unlearn])
    assert record.epochs == 1
    assert equal_weights(weights_of(network), before)
    assert not equal_weights(weights_of(rnp.unlearnt), before)


# --- both, through all of their phases ---


def test_an_epoch_of_rnp_has_the_paper_s_images() -> None:
    # 500 images in batches of 128: 4 steps, however many images there are
    unlearn, recover, _ = RNPConfig().phases(convnet())  # type: ignore[arg-type]
    assert isinstance(unlearn, Phase)
    assert isinstance(recover, Phase)
    assert (unlearn.steps, recover.steps) == (4, 4)


BOTH = pytest.mark.parametrize("config", [SMALL_ANP, SMALL_RNP], ids=["anp", "rnp"])


@BOTH
@pytest.mark.parametrize("make", [convnet, mlp])
def test_a_run_changes_masked_parameters_only_and_leaves_the_network_as_found(
    config: TuningConfig, make: Callable[[], Scaled], accelerator: Accelerator
) -> None:
    network, masked = make(), "model.1.weight" if make is convnet else "model.4.weight"
    network.model[0 if make is convnet else 1].weight.requires_grad_(False)
    before, wanted = weights_of(network), [parameter.requires_grad for parameter in network.parameters()]
    record = Engine(accelerator, ToyImages(40)).run(network, config.phases(network))  # type: ignore[arg-type]
    after = weights_of(network)
    assert {name for name in after if not torch.equal(after[name], before[name])} <= {masked}
    # what was pruned is zero, the rest kept its bits; the history says how much it was
    kept = (after[masked] == before[masked]) | (after[masked] == 0)
    assert kept.all()
    zeros = after[masked] == 0
    assert int((zeros if zeros.ndim == 1 else zeros.all(0)).sum()) == record.history[-1]["pruned"]
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted
    assert not any(module.training or module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


@BOTH
def test_the_same_seed_gives_the_same_weights(config: TuningConfig, accelerator: Accelerator) -> None:
    found = []
    for noise in (1, 2):
        network = varied(convnet())
        phases = config.phases(network)  # type: ignore[arg-type]
        torch.manual_seed(noise)
        Engine(accelerator, ToyImages(40), seed=5).run(network, phases)
        found.append((weights_of(network), phases[-1].state.state_dict()))  # type: ignore[union-attr]
    assert equal_weights(found[0][0], found[1][0])
    assert equal_weights(found[0][1], found[1][1])


@BOTH
@pytest.mark.parametrize("phase", [0, -2], ids=["first", "last-trained"])
def test_resume_equals_the_uninterrupted_run(
    phase: int, config: TuningConfig, accelerator: Accelerator, tmp_path: Path
) -> None:
    # an unlearning that never stops early, so that the fourth step is always there: two steps an epoch
    config = replace(config, stop_accuracy=0.0) if isinstance(config, RNPConfig) else config
    whole = varied(convnet())
    expected = config.phases(whole)  # type: ignore[arg-type]
    Engine(accelerator, ToyImages(40)).run(whole, expected)

    killed, steps = varied(convnet()), []
    phases = config.phases(killed)  # type: ignore[arg-type]
    after = phases[phase].after_step  # type: ignore[union-attr]

    def kill_at_four() -> None:
        if after is not None:
            after()
        steps.append(1)
        if len(steps) == 4:
            raise Killed

    phases[phase].after_step = kill_at_four  # type: ignore[union-attr]
    with pytest.raises(Killed):
        Engine(accelerator, ToyImages(40), checkpoints=CheckpointStore(tmp_path)).run(killed, phases)
    resumed = varied(convnet())
    phases = config.phases(resumed)  # type: ignore[arg-type]
    Engine(accelerator, ToyImages(40), checkpoints=CheckpointStore(tmp_path)).run(resumed, phases)
    assert equal_weights(weights_of(whole), weights_of(resumed))
    assert equal_weights(expected[-1].state.state_dict(), phases[-1].state.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ANPConfig(epsilon=0.0), "anp: epsilon must be positive and finite, got 0.0"),
        (lambda: ANPConfig(alpha=1.5), r"anp: alpha must be in \[0, 1\], got 1.5"),
        (lambda: ANPConfig(steps=0), "anp: steps must be at least 1, got 0"),
        (lambda: ANPConfig(budget=1.0), r"anp: budget must be in \[0, 1\), got 1.0"),
        (lambda: RNPConfig(unlearning_rate=0.0), "rnp: unlearning_rate must be positive and finite, got 0.0"),
        (lambda: RNPConfig(stop_accuracy=1.0), r"rnp: stop_accuracy must be in \[0, 1\), got 1.0"),
        (lambda: RNPConfig(epoch_images=64), "rnp: epoch_images"),
        (lambda: RNPConfig(budget=-0.1), r"rnp: budget must be in \[0, 1\), got -0.1"),
    ],
)
def test_settings_are_checked(make: Callable[[], TuningConfig], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
