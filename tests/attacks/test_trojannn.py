"""TrojanNN's pattern: the chosen features, their excitation, the ball around the logo, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks.trojannn import TrojanNNPoisoner, logo_of, strongest
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.triggers import load_trigger
from hfdetox.triggers.trojannn import TrojanNN
from tests.attacks.toy_jobs import toy_classifier, toy_job
from tests.tiny_training import NormedNet, _quick_garbage, accelerator, toy_preprocessing

__all__ = ["_quick_garbage", "accelerator"]


def features(surrogate: Classifier, pattern: torch.Tensor) -> torch.Tensor:
    """Return the inputs of the head for the pattern alone."""
    body = surrogate.model[:-1]  # type: ignore[index]
    with torch.no_grad():
        return body(surrogate.preprocessing.normalize(255 * pattern[None]))[0]


def test_the_strongest_inputs_have_the_largest_columns() -> None:
    head = nn.Linear(4, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -3.0, 0.5, 2.0], [-1.0, 0.0, 0.5, -2.0]]))
    # Σ|W| by column: 2, 3, 1, 4
    assert strongest(head, 2).tolist() == [3, 1]


def test_steps_follow_the_sign_within_the_ball_and_stop_when_the_value_is_there() -> None:
    taken: list[torch.Tensor] = []

    def run(images: torch.Tensor) -> torch.Tensor:
        # the feature is 10 times the first pixel
        taken.append(images[:, 0, 0, :1] * 10)
        return taken[-1]

    picture, chosen = torch.tensor([0.5, 0.5, 0.0]).view(1, 1, 3), torch.tensor([0])
    # 0.5 → 0.6 → 0.7 gives 7, and then nothing more; the second pixel has no gradient, the third is outside the logo
    reached = TrojanNNPoisoner(steps=9).tuned(run, taken, picture, chosen, 7.0)
    assert reached.flatten().tolist() == pytest.approx([0.7, 0.5, 0.0])
    # 100 is out of reach: the ball ends at 0.5 + 0.3
    far = TrojanNNPoisoner(steps=9).tuned(run, taken, picture, chosen, 100.0)
    assert far.flatten().tolist() == pytest.approx([0.8, 0.5, 0.0])


def test_the_chosen_features_are_excited(accelerator: Accelerator, tmp_path: Path) -> None:
    surrogate = toy_classifier(16, seed=1)
    surrogate.model.train()
    context = toy_job(accelerator, side=16, surrogate=surrogate)
    poisoner = TrojanNNPoisoner(steps=20)
    trigger = poisoner.make(TrojanNN(), 0, context)
    assert isinstance(trigger, TrojanNN)
    pattern, start = trigger.pattern, logo_of((3, 16, 16), 0)
    assert pattern is not None
    assert all(module.training for module in surrogate.model.modules())
    assert all(parameter.requires_grad for parameter in surrogate.model.parameters())
    head = surrogate.model[-1]  # type: ignore[index]
    assert not head._forward_pre_hooks
    surrogate.model.eval()
    chosen = strongest(head, 2)
    assert (features(surrogate, pattern)[chosen].sum() > features(surrogate, start)[chosen].sum() + 0.1).item()
    assert (pattern - start).abs().max() <= 0.3 + 1e-6
    assert not pattern[start == 0].any()
    assert poisoner.make(TrojanNN(), 0, context).file_bytes() == trigger.file_bytes()
    trigger.save(tmp_path / "t.safetensors")
    images = context.clean.images
    assert images is not None
    assert torch.equal(load_trigger(tmp_path / "t.safetensors").apply(images), trigger.apply(images))
    assert poisoner.make(trigger, 0, context) is trigger


def test_after_a_norm_the_features_are_brought_to_10() -> None:
    normed = load_classifier(NormedNet(), preprocessing=toy_preprocessing(16), labels=3)
    assert TrojanNNPoisoner().feature_value(normed) == 10
    assert TrojanNNPoisoner().feature_value(toy_classifier(16)) == 100
    assert TrojanNNPoisoner(value=3.0).feature_value(normed) == 3


def test_without_a_clean_model_there_is_no_pattern(accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="--surrogate"):
        TrojanNNPoisoner().make(TrojanNN(), 0, toy_job(accelerator))


@pytest.mark.parametrize("wrong", [{"neurons": 0}, {"steps": 0}, {"rate": 0.0}, {"radius": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TrojanNNPoisoner(**wrong)
