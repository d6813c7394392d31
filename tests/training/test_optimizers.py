"""Several optimisers as one: the steps, the schedule and the checkpoint are those of the parts."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.phases import JointOptimizer, Phase
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, equal_weights, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]


def joint(network: nn.Module) -> JointOptimizer:
    """Return SGD with momentum for the first layer and Adam for the head."""
    sgd = torch.optim.SGD(network.model[1].parameters(), lr=0.05, momentum=0.9)
    return JointOptimizer(sgd, torch.optim.Adam(network.model[4].parameters(), lr=0.01))


def gradients(network: nn.Module, seed: int) -> None:
    """Give every parameter a gradient of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_a_step_is_a_step_of_each_part() -> None:
    network, plain = mlp(), mlp()
    optimizer = joint(network)
    sgd = torch.optim.SGD(plain.model[1].parameters(), lr=0.05, momentum=0.9)
    adam = torch.optim.Adam(plain.model[4].parameters(), lr=0.01)
    start = weights_of(network)
    for step in range(3):
        gradients(network, step)
        gradients(plain, step)
        optimizer.step()
        sgd.step()
        adam.step()
    assert equal_weights(weights_of(network), weights_of(plain))
    assert not any(torch.equal(start[name], weight) for name, weight in weights_of(network).items())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    network = mlp()
    optimizer = joint(network)
    for step in range(2):
        gradients(network, step)
        optimizer.step()
    state, weights = copy.deepcopy(optimizer.state_dict()), weights_of(network)
    resumed = mlp(seed=1)
    resumed.load_state_dict(weights)
    again = joint(resumed)
    again.load_state_dict(state)
    for step in range(2, 4):
        for net, steps in ((network, optimizer), (resumed, again)):
            gradients(net, step)
            steps.step()
    assert equal_weights(weights_of(network), weights_of(resumed))
    forgot = mlp(seed=1)
    forgot.load_state_dict(weights)
    fresh = joint(forgot)
    for step in range(2, 4):
        gradients(forgot, step)
        fresh.step()
    assert not equal_weights(weights_of(network), weights_of(forgot))


def test_the_rates_of_the_whole_reach_the_parts_after_a_restore_too() -> None:
    network = mlp()
    optimizer = joint(network)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights_of(network)
    gradients(network, 0)
    optimizer.step()
    assert equal_weights(weights_of(network), before)
    assert [len(part.param_groups) for part in optimizer.parts] == [1, 1]


def test_the_engines_schedule_moves_every_part(accelerator: Accelerator) -> None:
    network, made, rates = mlp(), [], []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(joint(network))
        return made[0]

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(model(batch.images), batch.labels)}

    def note() -> None:
        rates.append([part.param_groups[0]["lr"] for part in made[0].parts])

    phase = Phase(name="joint", parameters=list(network.parameters()), optimizer=optimizer, loss=loss, epochs=2,
                  batch_size=48, augmentation="none", after_step=note)  # fmt: skip
    before = weights_of(network)
    Engine(accelerator, ToyImages()).run(network, [phase])
    # one step an epoch; a cosine over two epochs: all of the rate, then (1 + cos(π / 2)) / 2 = half of it
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[0.05, 0.01], [0.025, 0.005]]))
    assert not any(torch.equal(before[name], weight) for name, weight in weights_of(network).items())
