"""The teacher: a copy of the network as it was, and how far its answers are from those of the network now."""

import math
import warnings

import pytest
import torch
from torch import nn

from hfdetox.models.network import Network
from hfdetox.training.distillation import Teacher
from tests.tiny_training import toy_preprocessing


class Answers(nn.Module):
    """Say the same logits of every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.logits.expand(len(images), -1))


IMAGES = torch.zeros(2, 3, 4, 4)


def test_weights_that_a_hook_computes_are_copied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(48, 8)), nn.Linear(8, 2))
    network = Network(body, toy_preprocessing())
    network.input_size = (3, 4, 4)
    teacher = Teacher(network)
    with torch.no_grad():
        said = network(IMAGES)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(teacher.network(IMAGES), said)


def test_it_is_the_softened_divergence_by_hand() -> None:
    teacher = Teacher(Answers(2.0, 0.0))
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    p = math.e / (1 + math.e)
    by_hand = 4 * 0.25 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert float(teacher.divergence(IMAGES, logits, torch.tensor([0.25, 0.75]))) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_float32_and_its_gradient_reaches_the_logits_alone(dtype: torch.dtype) -> None:
    network = Answers(1.0, -1.0)
    teacher = Teacher(network)
    logits = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    found = teacher.divergence(IMAGES, logits, torch.full((2,), 0.5))
    assert found.dtype == torch.float32
    found.backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0]) < 0 < float(logits.grad[0, 1])
    assert network.logits.grad is None
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_it_stays_what_the_network_was_and_leaves_its_mode_alone() -> None:
    network = Answers(1.0, -1.0).train()
    teacher = Teacher(network)
    network.logits.data.zero_()
    assert network.training
    assert not teacher.network.training
    same = torch.tensor([[1.0, -1.0]]).expand(2, -1)
    assert float(teacher.divergence(IMAGES, same, torch.full((2,), 0.5))) == pytest.approx(0, abs=1e-6)
