"""NAD: the attention map and the loss by hand, its teacher, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.defenses.ft import FTConfig
from hfdetox.defenses.nad import NAD, NADConfig, attention_map
from hfdetox.errors import UsageError
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, one_batch
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, convnet, equal_weights, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = NADConfig(epochs=2, teacher_epochs=2, batch_size=16, learning_rate=0.05)


def test_attention_map_by_hand() -> None:
    # two positions of two channels: 1 + 4 = 5 and 4 + 16 = 20 for p = 2; 3 and 6 for p = 1
    features = torch.tensor([[[1.0, -2.0], [2.0, 4.0]]])
    torch.testing.assert_close(attention_map(features, 2.0), torch.tensor([[5.0, 20.0]]) / math.sqrt(425))
    torch.testing.assert_close(attention_map(features, 1.0), torch.tensor([[3.0, 6.0]]) / math.sqrt(45))
    assert attention_map(features.bfloat16(), 2.0).dtype == torch.float32
    assert torch.equal(attention_map(torch.zeros(1, 2, 2), 2.0), torch.zeros(1, 2))


def test_terms_by_hand() -> None:
    """The toy network has one stage, its convolution: the last, whose weight is beta3."""
    network, batch = convnet(), one_batch(6)
    nad = NAD(network, NADConfig(beta1=7.0, beta2=11.0, beta3=3.0))  # type: ignore[arg-type]
    assert [(stage.name, stage.layout) for stage in nad.stages] == [("0", "NCHW")]
    assert nad.betas == (3.0,)
    with torch.no_grad():
        nad.teacher.model[0].weight.add_(0.1)  # type: ignore[operator, index, union-attr]
    inputs = batch.images.float() / 127.5 - 1
    maps = []
    for convolution in (network.model[0], nad.teacher.model[0]):  # type: ignore[index]
        energy = convolution(inputs).detach().square().sum(1).flatten(1)
        maps.append(energy / energy.norm(dim=1, keepdim=True))
    attention = 3 * ((maps[0] - maps[1]) ** 2).mean()
    network.eval()
    terms = nad.terms(network, batch)
    clean = cross_entropy(network(batch.images), batch.labels)
    torch.testing.assert_close(terms["attention"], attention)
    torch.testing.assert_close(terms["loss"].detach(), (clean + attention).detach())
    assert float(attention) > 0


def test_the_student_starts_at_no_attention_loss_and_the_teacher_gets_no_gradient() -> None:
    network = convnet().eval()
    nad = NAD(network, SMALL)  # type: ignore[arg-type]
    terms = nad.terms(network, one_batch(6))
    assert float(terms["attention"]) == pytest.approx(0, abs=1e-9)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in nad.teacher.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_teacher_is_a_fine_tuned_copy_and_leaves_the_network_alone(accelerator: Accelerator) -> None:
    network, tuned = convnet(), convnet()
    before = weights_of(network)
    teach, _ = SMALL.phases(network)  # type: ignore[arg-type]
    assert isinstance(teach, Phase)
    assert teach.network is not None
    Engine(accelerator, ToyImages()).run(network, [teach])
    assert equal_weights(weights_of(network), before)
    config = FTConfig(epochs=2, batch_size=16, learning_rate=0.05)
    Engine(accelerator, ToyImages()).run(tuned, config.phases(tuned))  # type: ignore[arg-type]
    for name, tensor in weights_of(tuned).items():
        torch.testing.assert_close(teach.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not teach.network.training


def test_the_students_rate_stays(accelerator: Accelerator) -> None:
    network = convnet()
    history = Engine(accelerator, ToyImages()).run(network, SMALL.phases(network)).history  # type: ignore[arg-type]
    assert [row["phase"] for row in history] == ["nad-teacher", "nad-teacher", "nad", "nad"]
    assert [row["learning_rate"] for row in history] == pytest.approx([0.05, 0.025, 0.05, 0.05])


def test_a_network_without_feature_maps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no stages or blocks that give feature maps.*use a method that needs none"):
        SMALL.phases(mlp())  # type: ignore[arg-type]


def test_repeatable_and_tidy(accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(SMALL, lambda: convnet(dropout=0.3), accelerator)


def test_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(SMALL, lambda: convnet(dropout=0.3), accelerator, tmp_path, saves=4)


def test_presets() -> None:
    paper = parse_defense("nad")[0].settings()
    assert (paper["epochs"], paper["teacher_epochs"], paper["power"]) == (10, 10, 2)
    assert (paper["beta1"], paper["beta2"], paper["beta3"], paper["weight_decay"]) == (500, 1000, 1000, 5e-4)


@pytest.mark.parametrize("changes", [{"teacher_epochs": 0}, {"beta2": -1.0}, {"power": 0.0}, {"beta3": float("inf")}])
def test_ranges(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"nad: {next(iter(changes))} must be "):
        NADConfig(**changes)  # type: ignore[arg-type]
