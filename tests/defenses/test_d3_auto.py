"""`d3:auto`: what it finds from the model and the images, how it moves λ, and that a run with it is like any other."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses import describe_defense, parse_defense
from hfdetox.defenses.auto import (
    BOUNDS,
    HEAD_START,
    INTEGRAL,
    PROPORTIONAL,
    TURNED_BACK,
    AutoD3,
    D3Config,
    chosen_augmentation,
    first_lambda,
    path,
)
from hfdetox.defenses.d3 import D3
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Phase
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, run
from tests.tiny_training import Scaled, _quick_garbage, accelerator, convnet, mlp, norm_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL: dict[str, Any] = {**D3Config.presets["auto-1"], "epochs": 4, "min_steps": 0, "batch_size": 16}


def auto(**settings: Any) -> D3Config:
    """Return the preset for toy images: 48 of them are three steps an epoch."""
    return D3Config(**{**SMALL, **settings})


def pair() -> tuple[nn.Sequential, AutoD3]:
    """Return a 3×2 head and the method on it, at its start; of ten steps none is made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3))
    d3 = AutoD3(model, D3Config(lambda_="auto", epsilon=0.1, learning_rate=1.0))
    d3.steps = 10
    d3.initialize()
    return model, d3


# --- the settings ---


def test_auto_is_read_shown_and_made_again() -> None:
    config, preset = parse_defense("d3:auto", {"epsilon": "0.2", "cosine": "-0.3"})
    assert preset == "auto"
    assert (config.lambda_, config.epsilon, config.cosine) == ("auto", 0.2, -0.3)
    assert parse_defense(*describe_defense(config))[0] == config
    assert parse_defense("d3", {"lambda": "auto"})[0] == D3Config(lambda_="auto")
    assert config.settings()["lambda"] == "auto"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lambda": "much"}, "lambda must be a number or auto, got 'much'"),
        ({"lambda": "0"}, "lambda must be positive and finite, or auto, got 0"),
        ({"epsilon": "-1"}, "epsilon must be at least 0 and finite, or auto, got -1"),
        ({"cosine": "0"}, r"cosine must be in \(-1, 0\), got 0"),
        ({"min_steps": "-1"}, "min_steps must be at least 0, got -1"),
        ({"features": "adam"}, "features must be one of sgd, adamw, auto, got 'adam'"),
        ({"features_learning_rate": "0"}, "features_learning_rate must be positive and finite, got 0"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_defense("d3:auto", overrides)


def test_a_word_that_is_not_auto_is_refused_by_the_class_too() -> None:
    with pytest.raises(UsageError, match="lambda must be positive and finite, or auto, got 'much'"):
        D3Config(lambda_="much")  # type: ignore[arg-type]


def test_the_method_without_a_loop_wants_numbers() -> None:
    with pytest.raises(UsageError, match="must be numbers here"):
        D3(mlp().model, D3Config(lambda_="auto"))


def test_constants_make_no_look() -> None:
    network = mlp()
    assert [type(phase) for phase in D3Config().phases(network)] == [Phase]  # type: ignore[arg-type]
    assert len(D3Config(centered=True).phases(network)) == 1  # type: ignore[arg-type]


# --- λ ---


def test_lambda_moves_by_hand() -> None:
    """One step of dual ascent on log λ_I, and the proportional term, from a lag worked out from the weights."""
    model, d3 = pair()
    d3.step = 4
    begun = float(d3.lambda_)
    old, now = d3.initial["0"].flatten(), model[0].weight.detach().flatten().clone()
    first = float(torch.dot(old, now) / old.norm() / now.norm())
    moved = now + torch.tensor([0.02, 0.0, -0.05, 0.0, 0.0, 0.03])
    model[0].weight.data.copy_(moved.view(3, 2))
    d3.project()
    # of half of the steps a cosine schedule has spent 0.5 + 1/π of all rate, and 0.3 of it is no part of the way
    wanted = first + (-0.4 - first) * (0.5 + 1 / math.pi - 0.3) / 0.7
    lag = float(torch.dot(old, moved) / old.norm() / moved.norm()) - wanted
    logarithm = math.log(begun) - INTEGRAL * lag
    assert float(d3.log_lambda) == pytest.approx(logarithm, rel=1e-5)
    assert float(d3.lambda_) == pytest.approx(math.exp(logarithm - PROPORTIONAL * lag), rel=1e-5)
    assert norm_of(model[0]) == pytest.approx(float(old.norm()), rel=1e-6)


def test_who_lags_is_pushed_harder_and_who_leads_less() -> None:
    """Kept where they began, the weights lag more with every step; at −W⁰ they lead. λ stays within its bounds."""
    model, d3 = pair()
    start, found = model[0].weight.detach().clone(), []
    for _ in range(d3.steps):
        model[0].weight.data.copy_(start)
        d3.project()
        found.append(float(d3.lambda_))
    assert found == sorted(found, reverse=True)
    assert BOUNDS[0] <= found[-1] < found[0] / 1.5

    model, d3 = pair()
    begun = float(d3.lambda_)
    for _ in range(d3.steps):
        model[0].weight.data.copy_(-d3.initial["0"])
        d3.project()
    assert 10 * begun < float(d3.lambda_) <= 1.001 * BOUNDS[1]


def test_the_first_lambda_by_hand() -> None:
    # 200 steps of 0.03 / (1 − 0.9), half on average, are 30; what is left of it turns norm 9 by asin(0.4)
    config = D3Config(**D3Config.presets["auto"])
    assert first_lambda(config, 200, [9.0]) == pytest.approx(30 * (1 - TURNED_BACK) / (9 * 0.4115168) - 1, rel=1e-6)
    assert first_lambda(config, 200, [6.0, 12.0]) == pytest.approx(first_lambda(config, 200, [9.0]))
    assert first_lambda(config, 400, [18.0]) == pytest.approx(first_lambda(config, 200, [9.0]))


def test_the_loss_by_hand_below_and_above_one() -> None:
    model, d3 = pair()
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    distance = float((model[0].weight.detach() - d3.initial["0"]).norm())
    for value in (0.5, 4.0):
        d3.lambda_ = torch.tensor(value)
        expected = (value * (math.log(3) - 0.1) - distance) / (value + 1)
        assert float(d3.terms(logits, labels)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_the_path_follows_the_rate_that_the_schedule_has_spent() -> None:
    epochs = 400
    rates = [(1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]
    for upto in (0, 40, 100, 200, 399, 400):
        spent = sum(rates[:upto]) / sum(rates)
        expected = max(0, (spent - HEAD_START) / (1 - HEAD_START))
        assert path(upto / epochs) == pytest.approx(expected, abs=4e-3)
    assert (path(0), path(0.1)) == (0, 0)
    assert path(1) == pytest.approx(1)


def test_the_weights_end_where_they_shall(accelerator: Accelerator) -> None:
    """Two cosines asked for, two reached, on networks with heads of very unequal norms."""
    for scale in (1.0, 6.0):
        for cosine in (-0.2, -0.5):
            network = mlp()
            network.model[4].weight.data *= scale
            record = run(auto(cosine=cosine, epochs=40, learning_rate=0.05), network, accelerator)
            assert record.history[-1]["cosine"] == pytest.approx(cosine, abs=0.11)


# --- who trains what ---


def rates_of(config: D3Config, network: Scaled) -> dict[str, float]:
    """Return the learning rate of every parameter by name, and check that the phase has each of them once."""
    phase = config.phases(network)[-1]  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    groups = phase.optimizer(phase.parameters).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sorted(rates) == sorted(map(id, phase.parameters))
    assert sum(len(group["params"]) for group in groups) == len(rates)
    return {name: rates[id(p)] for name, p in network.named_parameters() if id(p) in rates}


def test_without_batch_norm_adamw_trains_all_but_the_selected_weights() -> None:
    rates = rates_of(auto(features_learning_rate=0.002), mlp())
    assert rates.pop("model.4.weight") == D3Config.presets["auto"]["learning_rate"]
    assert set(rates.values()) == {0.002}
    assert "model.4.bias" in rates


def test_with_batch_norm_or_when_told_sgd_trains_all() -> None:
    assert set(rates_of(auto(), convnet()).values()) == {0.03}
    assert set(rates_of(auto(features="sgd"), mlp()).values()) == {0.03}
    assert set(rates_of(auto(features="adamw"), convnet()).values()) == {0.03, 5e-4}
    assert set(rates_of(D3Config(), mlp()).values()) == {0.01}


def test_a_step_moves_features_by_adamw_and_the_head_by_sgd(accelerator: Accelerator) -> None:
    """AdamW's first step is its rate whatever the gradient; SGD's is its rate times the gradient."""
    network = mlp()
    phase = auto(lambda_=4.0, epsilon=0.0, match_augmentation=False).phases(network)[-1]  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    head, other = network.model[4].weight, network.model[1].weight
    optimizer = phase.optimizer(phase.parameters)
    head.grad, other.grad = torch.full_like(head, 2.0), torch.full_like(other, 7.0)
    before = head.detach().clone(), other.detach().clone()
    optimizer.step()
    assert torch.allclose(before[0] - head, torch.full_like(head, 0.03 * 2), atol=1e-6)
    assert torch.allclose(before[1] - other, 5e-4 * (1 + 0.05 * before[1]), atol=1e-6)


# --- blended images ---


def test_blended_images_by_hand(accelerator: Accelerator) -> None:
    """The loss of a blended image is the blend of both labels' losses, before the hinge."""
    model, d3 = pair()
    d3.lambda_ = torch.tensor(4.0)
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    losses = [math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)]
    distance = float((model[0].weight.detach() - d3.initial["0"]).norm())
    terms = d3.terms(logits, torch.tensor([0]), None, torch.tensor([1]), 0.75)
    clean = 0.75 * losses[0] + 0.25 * losses[1]
    assert float(terms["clean_loss"].detach()) == pytest.approx(clean, rel=1e-5)
    assert float(terms["loss"].detach()) == pytest.approx((4 * (clean - 0.1) - distance) / 5, rel=1e-5)


def test_mixup_blends_images_and_labels_in_the_same_pairs(accelerator: Accelerator) -> None:
    """Images of one grey level each: what the network gets tells the pair and the share, and the loss has the same."""
    seen: list[torch.Tensor] = []

    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images[:, 0, 0, 0].detach().clone())
            return self.head(images.mean((1, 2, 3))[:, None])

    network = Scaled(Grey())
    phase = D3Config(mixup=1.0, layers=("head",)).phases(network)[0]  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    levels = torch.tensor([0.0, 51.0, 255.0])
    batch = Batch(levels.view(3, 1, 1, 1).expand(3, 3, 2, 2), torch.tensor([0, 1, 2]), torch.full((3,), 1 / 3))
    torch.manual_seed(1)
    terms = phase.loss(network, batch)
    torch.manual_seed(1)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    others = torch.randperm(3)
    blended = share * levels + (1 - share) * levels[others]
    assert torch.allclose(seen[-1], blended / 127.5 - 1, atol=1e-5)
    logits = network.model.head((blended / 127.5 - 1)[:, None])
    losses = torch.stack([cross_entropy(logits, labels, reduction="none") for labels in (batch.labels, others)])
    expected = (share * losses[0] + (1 - share) * losses[1]).mean()
    assert float(terms["clean_loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)


# --- the rows' mean ---


def test_a_vector_added_to_every_row_is_no_distance() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    d3 = D3(model, D3Config(centered=True))
    d3.initialize()
    before = d3.terms(torch.zeros(1, 3), torch.tensor([0]))
    old = d3.initial["0"].norm()
    model[0].weight.data += torch.tensor([3.0, -1.0, 0.5, 2.0])
    d3.project()
    after = d3.terms(torch.zeros(1, 3), torch.tensor([0]))
    assert float(after["distance"]) == pytest.approx(float(before["distance"]), rel=1e-5)
    assert float(after["cosine"]) == pytest.approx(float(before["cosine"]), abs=1e-5)
    assert model[0].weight.mean(0).abs().max() < 1e-6
    assert norm_of(model[0]) == pytest.approx(float(old), rel=1e-5)


def test_other_layers_keep_their_mean() -> None:
    """Only the head's rows are classes."""
    network = mlp()
    d3 = D3(network.model, D3Config(layers=("1", "head"), centered=True))
    assert set(d3.weights) == {"1", "4"}
    assert torch.equal(d3.initial["1"], network.model[1].weight)
    assert d3.initial["4"].mean(0).abs().max() < 1e-6


# --- a run like any other ---


@pytest.mark.parametrize("make", [convnet, mlp])
def test_repeatable_and_tidy(make: Any, accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(auto(), make, accelerator)


@pytest.mark.parametrize("reweight", ["none", "class"])
@pytest.mark.parametrize("make", [convnet, mlp])
def test_resumes_from_the_look_and_from_every_epoch(
    make: Any, reweight: Any, accelerator: Accelerator, tmp_path: Path
) -> None:
    config = auto(epochs=2, min_steps=8, reweight=reweight)
    # 48 images are three steps of 16, the 38 without the held-out fifth as well
    assert_resumes(config, make, accelerator, tmp_path, saves=1 + 3)


def test_what_was_chosen_is_said_with_its_reason(accelerator: Accelerator) -> None:
    config = auto(min_steps=20, cosine=-0.3)
    record = run(config, mlp(), accelerator)
    where, features, augmentation, epsilon, length, hard, *short = config.choices(record.history)
    look, values = record.history[0], [entry["lambda"] for entry in record.history[1:]]
    assert where.startswith(
        "Selected: head, which is turned away from its old weights. It started from random weights as large as"
    )
    assert "measured without the mean over the classes" in where
    assert where.endswith("No normalisation stands before it that could undo the turn.")
    assert features == "AdamW trained the features, for the network has no BatchNorm."
    assert augmentation.startswith(f"Augmentation {chosen_augmentation(look)}: ")
    assert f"none {100 * look['accuracy_none']:.1f} %" in augmentation
    assert epsilon.startswith(f"ε = {look['epsilon']:.3f}: the median")
    assert length.startswith("7 epochs, 21 steps")
    assert hard.startswith(f"λ between {min(values):.2f} and {max(values):.2f}")
    assert hard.endswith(f"they ended at {record.history[-1]['cosine']:.2f}.")
    assert config.choices([]) == []
    assert D3Config().choices(record.history) == []
    assert len(replace(config, epsilon=0.1).choices(record.history)) == 5 + len(short)


@pytest.mark.parametrize(("ended", "short"), [(-0.39, False), (-0.21, True), (-0.31, False), (0.3, True)])
def test_weights_that_did_not_turn_as_far_as_wanted_are_named(ended: float, short: bool) -> None:
    look = {"phase": "d3-look", "accuracy_none": 0.8, "epsilon": 0.3, "epochs": 2, "steps": 20, "fixed_scales": 0.0,
            "adamw": 0.0}  # fmt: skip
    epochs = [{"phase": "d3", "lambda": 2.0, "cosine": 0.5}, {"phase": "d3", "lambda": 0.5, "cosine": ended}]
    said = auto().choices([look, *epochs])
    assert (said[-1] == "That is short of it: the clean images held them back although λ fell to 0.50.") == short
