"""What SAU, i-BAU, NPD and NC share, and what each does to a small network with a backdoor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hfdetox.defenses._perturbed import neg_log_complement, runner_up
from hfdetox.defenses.base import DefenseConfig
from hfdetox.defenses.i_bau import IBAUConfig
from hfdetox.defenses.nc import NCConfig
from hfdetox.defenses.npd import NPDConfig
from hfdetox.defenses.sau import SAUConfig
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.models.network import Network
from hfdetox.training.engine import Engine
from tests.defenses.pixels import UnitRange, corner_backdoored, rates
from tests.defenses.runs import run
from tests.tiny_models import logits, make_folder, own_library
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, weights_of

__all__ = ["_quick_garbage", "accelerator"]


def test_the_surprise_is_stable_at_certainty() -> None:
    logits = torch.tensor([[math.log(2), 0.0, 0.0], [200.0, 0.0, 0.0]], requires_grad=True)
    surprise = neg_log_complement(logits, torch.tensor([0, 0]))
    # p = 1/2: ln 2; and 200 − ln 2, where 1 − p is 0 in float32
    assert surprise.tolist() == pytest.approx([math.log(2), 200 - math.log(2)], rel=1e-6)
    surprise.sum().backward()
    assert logits.grad is not None
    # p_0 up; the others by p_k − p_k / (1 − p_0)
    assert logits.grad[0].tolist() == pytest.approx([0.5, -0.25, -0.25])
    assert torch.isfinite(logits.grad).all()


def test_the_likeliest_other_class() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert runner_up(logits, torch.tensor([0, 2])).tolist() == [1, 0]


@pytest.mark.parametrize("config", [SAUConfig(), NPDConfig()], ids=lambda config: config.name)
def test_images_of_an_unknown_range_are_refused(config: DefenseConfig) -> None:
    preprocessing = UnitRange(2)
    preprocessing.dtype = torch.float32
    network = Network(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), preprocessing)
    with pytest.raises(UsageError, match=f"{config.name}: it perturbs pixels, and .* pass an image processor") as said:
        config.phases(network)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("kind", ["transformers/vit", "transformers/resnet", "timm/vit"])
@pytest.mark.parametrize(
    "config",
    [
        SAUConfig(epochs=1, batch_size=8, steps=2),
        IBAUConfig(epochs=1, batch_size=8),
        NPDConfig(epochs=1, warmup=0, batch_size=8, learning_rate=0.1),
    ],
    ids=lambda config: config.name,
)
def test_the_librarys_own_model_is_trained_and_saved(config: DefenseConfig, kind: str, accelerator: Accelerator,
                                                     tmp_path: Path) -> None:  # fmt: skip
    classifier = load_classifier(make_folder(tmp_path / "before", kind))
    source = ToyImages(16, side=32)
    assert source.images is not None
    before = weights_of(classifier.model)
    with torch.no_grad():
        old = classifier.network(source.images)
    Engine(accelerator, source, seed=1).run(classifier.network, config.phases(classifier.network))
    with torch.no_grad():
        expected = classifier.network(source.images)
    assert float((expected - old).abs().max()) > 1e-4
    assert {name: t.shape for name, t in before.items()} == {
        n: t.shape for n, t in classifier.model.state_dict().items()
    }
    classifier.save(tmp_path / "after")
    with torch.no_grad():
        pictures = classifier.preprocessing.normalize(source.images)
    torch.testing.assert_close(logits(own_library(tmp_path / "after", kind), pictures), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SAUConfig(epochs=20, batch_size=48, learning_rate=3e-3),
        IBAUConfig(batch_size=24, learning_rate=3e-3, share=0.1),
        NPDConfig(epochs=20, warmup=0, batch_size=48, learning_rate=0.05, layer="3", augmentation="none", radius=1.5),
        # of three norms the MAD is the smaller distance to the middle one, by chance; the index of class 0 is 1.45
        NCConfig(epochs=20, inversion_epochs=60, batch_size=48, augmentation="none", anomaly=1.0),
    ],
    ids=lambda config: config.name,
)
def test_the_attack_success_falls_and_the_accuracy_stays(config: DefenseConfig, accelerator: Accelerator) -> None:
    network, fresh = corner_backdoored(), ToyImages(96, seed=11)
    accuracy, success = rates(network, fresh)
    assert accuracy > 0.9
    assert success > 0.9
    run(config, network, accelerator, count=96)  # type: ignore[arg-type]
    accuracy_after, success_after = rates(network, fresh)
    assert success_after < success - 0.3
    assert accuracy_after > accuracy - 0.1
