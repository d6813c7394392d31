"""LF's pattern: DeepFool against its closed form, the perturbation on a small clean model, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks.lf import LFPoisoner, deepfool, frozen
from hfdetox.errors import UsageError
from hfdetox.triggers import load_trigger
from hfdetox.triggers.lf import LF
from tests.attacks.toy_jobs import toy_classifier, toy_job
from tests.tiny_training import _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]


def test_on_a_linear_classifier_one_step_is_the_closed_form() -> None:
    # f(x) = (3 a, 4 b): at (2, 1) the logits are (6, 4); w = ∇f_1 − ∇f_0 = (−3, 4), |f_1 − f_0| / ‖w‖² = 2 / 25
    def logits(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * torch.tensor([3.0, 4.0])

    images = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    r, arrived = deepfool(logits, images, 1, overshoot=0.02)
    assert r[0].flatten().tolist() == pytest.approx([1.02 * -6 / 25, 1.02 * 8 / 25])
    # the second is there from the start
    assert r[1].flatten().tolist() == [0, 0]
    assert arrived.tolist() == [True, True]


def test_a_target_out_of_reach_has_not_arrived() -> None:
    # a gradient of almost nothing at the top: one step towards a logit that stays 1 behind
    def logits(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.sum((1, 2, 3)) * 0 + 1, -(x.sum((1, 2, 3)) ** 2)], 1)

    _, arrived = deepfool(logits, torch.ones(1, 1, 1, 2), 1, steps=3)
    assert arrived.tolist() == [False]


def test_the_pattern_is_made_on_the_surrogate_and_moves_it(accelerator: Accelerator, tmp_path: Path) -> None:
    surrogate = toy_classifier(32, seed=1)
    trained = toy_job(accelerator, side=32, classifier=surrogate)
    trained.engine().run(surrogate.network, [trained.phase(epochs=6, batch_size=16, augmentation="none")])
    surrogate.network.train()
    for parameter in list(surrogate.network.parameters())[:2]:
        parameter.requires_grad_(False)
    gradients = [parameter.requires_grad for parameter in surrogate.network.parameters()]
    weights = {name: tensor.clone() for name, tensor in surrogate.network.state_dict().items()}
    context = toy_job(accelerator, side=32, surrogate=surrogate)
    poisoner = LFPoisoner(images=16, passes=3, steps=20)
    trigger = poisoner.make(LF(), 0, context)
    assert isinstance(trigger, LF)
    v = trigger.perturbation
    assert v is not None
    assert v.shape == (3, 32, 32)
    assert (v.min().item(), v.max().item()) == (0, pytest.approx(0.2))
    # the toy model tells classes by the brightest channel: red is label 0
    assert v[0].mean() > v[1:].mean()
    # left as it was found
    assert all(module.training for module in surrogate.network.modules())
    assert [parameter.requires_grad for parameter in surrogate.network.parameters()] == gradients
    assert all(torch.equal(weights[name], tensor) for name, tensor in surrogate.network.state_dict().items())
    assert torch.equal(v, poisoner.make(LF(), 0, context).tensors()["perturbation"])
    trigger.save(tmp_path / "t.safetensors")
    assert load_trigger(tmp_path / "t.safetensors").file_bytes() == trigger.file_bytes()


def test_what_needs_no_clean_model_stays_as_it_is(accelerator: Accelerator) -> None:
    random, poisoner = LF(pattern="random"), LFPoisoner()
    assert poisoner.make(random, 0, toy_job(accelerator)) is random
    assert not poisoner.on_clean_model(random)
    assert poisoner.on_clean_model(LF())


def test_without_a_clean_model_there_is_no_pattern(accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match=r"--surrogate, or use lf:random"):
        LFPoisoner().make(LF(), 0, toy_job(accelerator))


def test_a_surrogate_of_other_images_is_refused(accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="16, 16"):
        LFPoisoner().make(LF(), 0, toy_job(accelerator, surrogate=toy_classifier(16)))


def test_a_model_is_as_before_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()

    def fails() -> None:
        with frozen(network, torch.device("cpu")):
            assert not network[1].training
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert network[1].training
    assert network[0].weight.requires_grad


@pytest.mark.parametrize("wrong", [{"images": 0}, {"passes": 0}, {"overshoot": -1.0}, {"delta": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LFPoisoner(**wrong)
