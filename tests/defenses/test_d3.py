"""D3 in runs of the engine: a plain PyTorch loop that it must match, the layers it moves, and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses.auto import D3Config
from hfdetox.defenses.d3 import D3
from hfdetox.models.layers import LayerPatternError
from hfdetox.training.batches import Batch
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.tiny_training import (
    NormedNet,
    Scaled,
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    mlp,
    norm_of,
    weights_of,
)

__all__ = ["_quick_garbage", "accelerator"]

SMALL = D3Config(epochs=3, batch_size=16, learning_rate=0.05)


# --- the plain reference, from the paper's equations ---


def plain_d3(
    network: nn.Module, weight: nn.Parameter, batches: list[list[Batch]], config: D3Config, state: torch.Tensor
) -> None:
    """Train as the paper says; `batches` are the parts of every step, `state` that of torch's generator."""
    old = weight.detach().clone()
    torch.set_rng_state(state)
    with torch.no_grad():
        weight.uniform_(-0.5, 0.5)
        weight *= old.norm() / weight.norm()
    optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=config.momentum)
    steps = len(batches) // config.epochs
    network.train()
    for number, parts in enumerate(batches):
        images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
        rate = config.learning_rate * (1 + math.cos(math.pi * (number // steps) / config.epochs)) / 2
        optimizer.param_groups[0]["lr"] = rate
        hinge = (cross_entropy(network(images), labels, reduction="none") - config.epsilon).clamp(min=0).mean()
        loss = config.lambda_ * hinge - (weight - old).norm()
        optimizer.zero_grad()
        (loss / (config.lambda_ + 1) if config.lambda_ > 1 else loss).backward()
        optimizer.step()
        with torch.no_grad():
            weight *= old.norm() / weight.norm()


def recorded(phase: Phase) -> tuple[list[list[Batch]], list[torch.Tensor]]:
    """Make a phase note its batches, step by step, and the random state at its start."""
    batches: list[list[Batch]] = []
    states: list[torch.Tensor] = []
    loss, start, number = phase.loss, phase.start, phase.gradient_accumulation_steps

    def noting_loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        if not batches or len(batches[-1]) == number:
            batches.append([])
        batches[-1].append(batch)
        return loss(network, batch)

    def noting_start() -> None:
        states.append(torch.get_rng_state())
        assert start is not None
        start()

    phase.loss, phase.start = noting_loss, noting_start
    return batches, states


def run_d3(network: Scaled, config: D3Config, accelerator: Accelerator, images: ToyImages) -> tuple[Any, Any, Any]:
    """Run the engine on the defense's phase; return the record, the batches and the random states at the start."""
    phases = config.phases(network)
    batches, states = recorded(phases[-1])
    record = Engine(accelerator, images, seed=3).run(network, phases)
    return record, batches, states


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize(
    ("make", "head", "parts"),
    [(mlp, "4", 1), (mlp, "4", 2), (convnet, "6", 1)],
    ids=["mlp", "mlp-accumulated", "convnet-batchnorm"],
)
@pytest.mark.parametrize("lambda_", [10.0, 0.5])
def test_the_engine_matches_plain_pytorch(
    lambda_: float, make: Callable[[], Scaled], head: str, parts: int, augmentation: Any, accelerator: Accelerator
) -> None:
    config = replace(SMALL, lambda_=lambda_, augmentation=augmentation, gradient_accumulation_steps=parts)
    network, plain = make(), make()
    # 45 images in steps of 16 leave a last step of 13, whose two parts are uneven
    record, batches, states = run_d3(network, config, accelerator, ToyImages(45))
    assert [sum(len(part.labels) for part in step) for step in batches] == [16, 16, 13] * 3
    plain_d3(plain, plain.model.get_submodule(head).weight, batches, config, states[0])  # type: ignore[arg-type]
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=2e-5, atol=2e-6, msg=name)
    assert record.steps == 9
    assert not equal_weights(weights_of(network), weights_of(make()))


def test_bf16_matches_plain_pytorch_within_a_tolerance() -> None:
    """Stated tolerance: selected weights end within 1 % of the way they went, others within 10 % (a ReLU may fall
    the other way when bf16 keeps 8 bits of its input)."""
    network, plain = mlp(), mlp()
    before = weights_of(network)
    record, batches, states = run_d3(network, SMALL, make_accelerator("cpu", "bf16"), ToyImages(45))
    plain_d3(plain, plain.model[4].weight, batches, SMALL, states[0])
    assert record.precision == "bf16"
    for name, tensor in plain.state_dict().items():
        way = (tensor - before[name]).norm()
        assert (network.state_dict()[name] - tensor).norm() < (0.01 if name == "model.4.weight" else 0.1) * way, name
    # the sphere is kept in float32 all the same
    assert norm_of(network.model[4]) == pytest.approx(float(before["model.4.weight"].norm()), rel=1e-6)


def test_d3_in_a_foreign_loop_equals_the_engine(accelerator: Accelerator) -> None:
    """The object as a person drops it into a loop of their own: two parts a step, projection after real steps only."""
    config = replace(SMALL, gradient_accumulation_steps=2, augmentation="none")
    network, foreign = mlp(), mlp()
    _, batches, states = run_d3(network, config, accelerator, ToyImages(48))
    d3 = D3(foreign.model, config)
    torch.set_rng_state(states[0])
    d3.initialize()
    optimizer = torch.optim.SGD(foreign.parameters(), lr=config.learning_rate, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    for number, step in enumerate(batches, start=1):
        for part in step:
            (d3.loss(foreign(part.images), part.labels) / len(step)).backward()
        optimizer.step()
        d3.project()
        optimizer.zero_grad()
        if number % 3 == 0:
            schedule.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(foreign.state_dict()[name], tensor, rtol=2e-5, atol=2e-6, msg=name)


def test_weights_stay_on_the_sphere_through_a_run(accelerator: Accelerator) -> None:
    network = mlp()
    radius = norm_of(network.model[4])
    norms: list[float] = []
    (phase,) = SMALL.phases(network)
    project = phase.after_step
    assert project is not None

    def project_and_note() -> None:
        project()
        norms.append(norm_of(network.model[4]))

    phase.after_step = project_and_note
    Engine(accelerator, ToyImages()).run(network, [phase])
    assert norms == pytest.approx([radius] * 9, rel=1e-6)


# --- layers ---


def test_a_pattern_without_a_layer_lists_what_there_is() -> None:
    with pytest.raises(LayerPatternError, match=r"'blocks\.\*'.*0, 2, 4|'blocks\.\*'.*\*"):
        D3Config(layers=("blocks.*",)).phases(mlp())


def test_convolutions_can_be_selected(accelerator: Accelerator) -> None:
    network = convnet()
    radius = norm_of(network.model[0])
    config = replace(SMALL, layers=("0", "head"))
    assert config.selected_layers(network.model) == ["0", "6"]
    old = network.model[0].weight.detach().clone()
    run_d3(network, config, accelerator, ToyImages())
    assert norm_of(network.model[0]) == pytest.approx(radius, rel=1e-6)
    assert float((network.model[0].weight.detach() - old).norm()) > 0.5 * radius


def test_freeze_norm_freezes_the_scale_alone_of_a_norm_that_feeds_the_head(accelerator: Accelerator) -> None:
    changed = {}
    for freeze in (True, False):
        network = Scaled(NormedNet())
        before = weights_of(network)
        run_d3(network, replace(SMALL, freeze_norm=freeze), accelerator, ToyImages(side=16))
        after = weights_of(network)
        changed[freeze] = {name for name in before if not torch.equal(before[name], after[name])}
        assert network.model.norm.weight.requires_grad  # type: ignore[union-attr]
    assert changed[False] == set(before)
    assert changed[False] - changed[True] == {"model.norm.weight"}


def test_freeze_norm_does_nothing_without_such_a_norm(accelerator: Accelerator) -> None:
    results = []
    for freeze in (True, False):
        network = convnet()
        assert len(replace(SMALL, freeze_norm=freeze).phases(network)[0].parameters) == 6
        run_d3(network, replace(SMALL, freeze_norm=freeze), accelerator, ToyImages())
        results.append(weights_of(network))
    assert equal_weights(*results)


def test_parameters_that_the_caller_froze_stay_frozen(accelerator: Accelerator) -> None:
    network = mlp()
    network.model[1].weight.requires_grad_(False)
    before = network.model[1].weight.clone()
    run_d3(network, SMALL, accelerator, ToyImages())
    assert torch.equal(network.model[1].weight, before)


# --- settings ---

CHANGED = {
    "epochs": 2, "batch_size": 12, "learning_rate": 0.02, "momentum": 0.5, "weight_decay": 0.1,
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "augmentation": "crop", "lambda_": 0.5, "epsilon": 0.9,
    "layers": ("features",), "initialization": "far", "freeze_norm": False, "reweight": "class",
    "centered": True, "cosine": -0.9, "match_augmentation": True, "mixup": 0.5, "min_steps": 20,
    "features": "adamw", "features_learning_rate": 0.01, "distillation": 0.5, "gratings": 0.5,
}  # fmt: skip
# what a setting needs beside it to matter
BESIDE = {"cosine": {"lambda_": "auto"}, "features_learning_rate": {"features": "adamw"}}


# `reconstruct` chooses which phases run at all: test_by_evidence.py
@pytest.mark.parametrize("name", [f.name for f in fields(D3Config) if f.name != "reconstruct"])
def test_every_setting_changes_the_run(name: str, accelerator: Accelerator) -> None:
    """A setting without a row in CHANGED fails here: none may be there for show."""
    weights, parts = [], []
    base = replace(SMALL, **BESIDE.get(name, {}))
    for config in (base, replace(base, **{name: CHANGED[name]})):
        assert getattr(config, name) != CHANGED[name] or config is not base
        network = Scaled(NormedNet())
        _, batches, _ = run_d3(network, config, accelerator, ToyImages(side=16))
        weights.append(weights_of(network))
        parts.append([len(step) for step in batches])
    if name == "gradient_accumulation_steps":
        # it saves memory and nothing else: the same steps in two parts
        assert parts == [[1] * 9, [2] * 9]
    else:
        assert not equal_weights(*weights)


def test_presets_and_defaults_are_those_of_the_paper_and_the_code() -> None:
    paper, code = (D3Config(**D3Config.presets[name]) for name in ("paper", "code"))
    assert paper == D3Config()
    assert (paper.lambda_, paper.epsilon, paper.learning_rate, paper.momentum) == (10, 0.1, 0.01, 0.9)
    assert (paper.epochs, paper.batch_size, paper.initialization) == (100, 256, "random")
    assert (paper.layers, paper.max_grad_norm, paper.freeze_norm) == (("head",), None, True)
    assert code == replace(paper, lambda_=0.5)


def test_the_optimiser_is_sgd_without_weight_decay() -> None:
    optimizer = D3Config(learning_rate=0.3, momentum=0.7).sgd([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.7, 0, False)
