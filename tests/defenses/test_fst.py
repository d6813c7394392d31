"""FST: where it starts, its inner product by hand, the sphere, and its relation to D3's distance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.defenses.fst import FST, FSTConfig
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, noted
from tests.tiny_training import NormedNet, Scaled, ToyImages, _quick_garbage, accelerator, convnet, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = FSTConfig(epochs=2, batch_size=16, learning_rate=0.05)


class Fixed(nn.Module):
    """Gives the same logits for every image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[math.log(3), 0.0]]).expand(len(images), 2)


def test_terms_by_hand() -> None:
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    fst = FST(nn.Sequential(head), FSTConfig(alpha=0.2))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 3.0], [4.0, -1.0]]))
    batch = Batch(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.75, 0.25]))
    terms = {name: float(value.detach()) for name, value in fst.terms(Fixed(), batch).items()}
    # p = (3/4, 1/4); ⟨W, W⁰⟩ = 3 · 0 + 0 + 0 − 4; W − W⁰ = (−3, 3, 4, −5)
    clean = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert terms["clean_loss"] == pytest.approx(clean, rel=1e-5)
    assert terms["inner_product"] == pytest.approx(-4)
    assert terms["loss"] == pytest.approx(clean - 0.8, rel=1e-5)
    assert terms["distance"] == pytest.approx(math.sqrt(9 + 9 + 16 + 25))


def test_weight_and_bias_are_drawn_anew() -> None:
    network = mlp()
    before = weights_of(network)
    fst = FST(network.model, FSTConfig())
    torch.manual_seed(5)
    fst.initialize()
    after = weights_of(network)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.4.weight", "model.4.bias"]
    torch.manual_seed(5)
    # 16 inputs: between −1/4 and 1/4
    assert torch.equal(after["model.4.weight"], torch.empty(3, 16).uniform_(-0.25, 0.25))
    assert torch.equal(after["model.4.bias"], torch.empty(3).uniform_(-0.25, 0.25))


def test_one_step_by_hand(accelerator: Accelerator) -> None:
    config = FSTConfig(epochs=1, batch_size=48, learning_rate=0.1, alpha=0.3, augmentation="none")
    network, plain = mlp(), mlp()
    (phase,) = config.phases(network)  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    draw, states = phase.start, []
    assert draw is not None

    def start() -> None:
        states.append(torch.get_rng_state())
        draw()

    phase.start = start
    seen = noted(phase)
    Engine(accelerator, ToyImages()).run(network, [phase])

    head = plain.model[4]  # type: ignore[index]
    old = head.weight.detach().clone()
    torch.set_rng_state(states[0])
    with torch.no_grad():
        head.weight.uniform_(-0.25, 0.25)
        head.bias.uniform_(-0.25, 0.25)
    loss = cross_entropy(plain(seen[0].images), seen[0].labels) + 0.3 * (head.weight * old).sum()
    loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
        head.weight *= old.norm() / head.weight.norm()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_norm_is_the_old_one_and_the_angle_grows(accelerator: Accelerator) -> None:
    products = {}
    for alpha in (0.0, 5.0):
        network = mlp()
        radius = float(network.model[4].weight.detach().norm())  # type: ignore[index]
        config = FSTConfig(epochs=10, batch_size=16, learning_rate=0.02, alpha=alpha)
        record = Engine(accelerator, ToyImages()).run(network, config.phases(network))  # type: ignore[arg-type]
        now = network.model[4].weight.detach()  # type: ignore[index]
        assert float(now.norm()) == pytest.approx(radius, rel=1e-5)
        products[alpha] = record.history[-1]["inner_product"]
    assert products[5.0] < products[0.0]


def test_the_scale_of_a_norm_before_the_head_is_frozen(accelerator: Accelerator) -> None:
    changed = {}
    for freeze in (True, False):
        network = Scaled(NormedNet())
        before = weights_of(network)
        config = FSTConfig(epochs=1, batch_size=16, freeze_norm=freeze)
        Engine(accelerator, ToyImages(side=16)).run(network, config.phases(network))  # type: ignore[arg-type]
        after = weights_of(network)
        changed[freeze] = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed[False] - changed[True] == {"model.norm.weight"}


def test_repeatable_and_tidy(accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(SMALL, lambda: convnet(dropout=0.3), accelerator)


def test_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(SMALL, lambda: convnet(dropout=0.3), accelerator, tmp_path, saves=2)


def test_presets() -> None:
    paper, tiny = parse_defense("fst")[0].settings(), parse_defense("fst:tiny")[0].settings()
    assert (paper["alpha"], paper["epochs"], paper["learning_rate"], paper["weight_decay"]) == (0.2, 10, 0.01, 0)
    assert (tiny["alpha"], tiny["epochs"], tiny["learning_rate"]) == (0.001, 15, 0.001)
    assert parse_defense("fst:readme")[0].settings()["alpha"] == 0.1


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_range_of_alpha(alpha: float) -> None:
    with pytest.raises(UsageError, match="fst: alpha must be at least 0 and finite"):
        FSTConfig(alpha=alpha)
