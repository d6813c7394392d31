"""The mean of weights over the later steps."""

import pytest
import torch
from torch import nn

from hfdetox.training.averaging import WeightAverage


def stepped(average: WeightAverage, weight: nn.Parameter, values: list[float]) -> None:
    for value in values:
        weight.data.fill_(value)
        average.update()


def test_the_mean_is_that_of_the_steps_from_the_first_that_counts() -> None:
    weight = nn.Parameter(torch.zeros(2))
    average = WeightAverage([weight])
    average.first = 2
    stepped(average, weight, [100.0, 50.0, 1.0, 2.0, 6.0])
    assert weight.tolist() == [6.0, 6.0], "nothing moves before the end"
    average.take()
    assert weight.tolist() == pytest.approx([3.0, 3.0])


def test_before_a_step_counts_the_weights_stay() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight])
    average.first = 5
    stepped(average, weight, [7.0, 8.0])
    average.take()
    assert weight.item() == 8.0


@pytest.mark.parametrize("cut", range(5))
def test_a_stopped_run_goes_on_with_the_same_mean(cut: int) -> None:
    values, found = [9.0, 3.0, 4.0, 8.0, 1.0], []
    for stops in ([], [cut]):
        weight = nn.Parameter(torch.zeros(1))
        average = WeightAverage([weight])
        average.first = 1
        for place, value in enumerate(values):
            if place in stops:
                state = {name: tensor.clone() for name, tensor in average.state_dict().items()}
                average = WeightAverage([weight])
                average.load_state_dict(state)
            stepped(average, weight, [value])
        average.take()
        found.append(weight.item())
    assert found[0] == found[1] == pytest.approx(4.0)
