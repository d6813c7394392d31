"""LC: the perturbation stays in its ball, lowers the surrogate's certainty, and the corners come last."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks import AttackContext, Implant, parse_attack_settings, poisoner_for
from hfdetox.attacks.lc import LabelConsistentPoisoner
from hfdetox.attacks.poison import PoisonedPixels
from hfdetox.errors import UsageError
from hfdetox.triggers import parse_trigger
from tests.attacks.toy_jobs import toy_classifier, toy_job
from tests.tiny_training import _quick_garbage, accelerator, toy_pixels

__all__ = ["_quick_garbage", "accelerator"]


class Signed(torch.nn.Module):
    """Two logits of a 1-channel image: its first pixel minus its second, and 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = (images[:, 0, 0, 0] - images[:, 0, 0, 1]) / 255
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.fixture
def context(accelerator: Accelerator) -> AttackContext:
    """A job with a surrogate, on 60 images of three classes."""
    return toy_job(accelerator, count=60, surrogate=toy_classifier(seed=1))


@pytest.mark.parametrize(
    ("epsilon", "step", "steps", "expected"),
    [
        # class 0 is lost by a darker first and a brighter second pixel; the third has no gradient
        (8.0, 1.5, 1, [98, 102, 50]),  # 100 ∓ 1.5, half to even
        (8.0, 1.5, 100, [92, 108, 50]),
        (8.9, 1.5, 100, [92, 108, 50]),  # 8.9 would round to 9
        (200.0, 60.0, 9, [0, 255, 50]),
    ],
)
def test_the_steps_follow_the_sign_of_the_gradient(
    epsilon: float, step: float, steps: int, expected: list[int]
) -> None:
    poisoner = LabelConsistentPoisoner(epsilon=epsilon, step=step, steps=steps)
    image = torch.tensor([[[[100, 100, 50]]]], dtype=torch.uint8)
    perturbed = poisoner.perturbed(Signed(), image, torch.tensor([0]))
    assert perturbed.dtype == torch.uint8
    assert perturbed.flatten().tolist() == expected
    assert image.flatten().tolist() == [100, 100, 50]


def test_the_perturbation_stays_in_its_ball_and_lowers_the_true_class(context: AttackContext) -> None:
    assert context.surrogate is not None
    network = context.surrogate.network.eval()
    images, labels = toy_pixels(60).images, toy_pixels(60).labels
    assert images is not None
    perturbed = LabelConsistentPoisoner(steps=20).perturbed(network, images, labels)
    moved = (perturbed.int() - images.int()).abs()
    assert int(moved.max()) == 8
    with torch.no_grad():
        before, after = (network(x).softmax(1)[torch.arange(60), labels] for x in (images, perturbed))
    assert (after < before).all()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("mode", ["native", "input"])
def test_poisoned_images_are_perturbed_between_whole_corners(mode: str, context: AttackContext) -> None:
    trigger = parse_trigger(f"lc:mode={mode}")
    backdoor = Implant(trigger, 2, 0.2, poisoner_for("lc", {"steps": "3", "epsilon": "4"}))
    poisoned, again = PoisonedPixels(context, [backdoor]), PoisonedPixels(context, [backdoor])
    places = poisoned.poisoned["lc"]
    # round(0.2 · 60) of the 20 images of class 2
    assert len(places) == 12
    assert poisoned.labels[places].tolist() == [2] * 12
    assert poisoned.images is not None
    assert again.images is not None
    assert context.clean.images is not None
    assert torch.equal(poisoned.images, again.images)
    clean, after = context.clean.images[places], poisoned.images[places]
    stamped = trigger.apply(clean)
    # white and black on 50 % grey: every pixel of the corners moves
    corners = (trigger.apply(torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)) != 128).expand(12, -1, -1, -1)
    assert torch.equal(after[corners], stamped[corners])
    between = (after.int() - clean.int())[~corners]
    assert 0 < int(between.abs().max()) <= 4


@pytest.mark.parametrize("mode", ["native", "input"])
def test_images_that_do_not_fit_into_memory_are_perturbed_alike(mode: str, context: AttackContext) -> None:
    backdoor = Implant(parse_trigger(f"lc:mode={mode}"), 2, 0.2, poisoner_for("lc", {"steps": "2"}))
    whole = PoisonedPixels(context, [backdoor])
    on_demand = PoisonedPixels(replace(context, clean=toy_pixels(60, max_bytes=0)), [backdoor])
    assert on_demand.images is None
    assert whole.images is not None
    _, images, labels = on_demand.__getitems__(range(60))
    assert torch.equal(images, whole.images)
    assert torch.equal(labels, whole.labels)


def test_a_surrogate_must_be_there_and_fit(context: AttackContext) -> None:
    poisoner, trigger = poisoner_for("lc", {}), parse_trigger("lc")
    assert poisoner.make(trigger, 0, context) is trigger
    with pytest.raises(UsageError, match="lc is made on a clean model: name one with --surrogate"):
        poisoner.make(trigger, 0, replace(context, surrogate=None))
    with pytest.raises(UsageError, match=r"lc: the surrogate takes images of \(3, 16, 16\)"):
        poisoner.make(trigger, 0, replace(context, surrogate=toy_classifier(16)))


@pytest.mark.parametrize("texts", [{"epsilon": "0"}, {"step": "nan"}, {"steps": "0"}, {"epsilon": "inf"}])
def test_a_wrong_setting_is_one_line(texts: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"lc: {next(iter(texts))} must be (positive and finite|at least 1), got"):
        parse_attack_settings(["lc"], texts)
