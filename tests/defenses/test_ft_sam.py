"""FT-SAM: one step against its equation, BatchNorm's statistics, presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.defenses.ft_sam import FTSAMConfig
from hfdetox.errors import UsageError
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, noted
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, convnet, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = FTSAMConfig(epochs=2, batch_size=16, learning_rate=0.05, rho=0.5)


def test_one_step_by_hand(accelerator: Accelerator) -> None:
    """All 48 images in one step: w − η (∇L(w + e) + decay · w), with e = ρ · w² g / ‖|w| g‖."""
    config = FTSAMConfig(epochs=1, batch_size=48, learning_rate=0.1, rho=0.7, augmentation="none")
    network, plain = mlp(), mlp()
    (phase,) = config.phases(network)  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    seen = noted(phase)
    Engine(accelerator, ToyImages()).run(network, [phase])
    assert len(seen) == 1  # the two passes of a step see one batch

    weights = list(plain.parameters())
    images = ToyImages()
    assert images.images is not None

    def smoothed() -> torch.Tensor:
        # s / (K − 1) = 0.05 on each wrong class is PyTorch's smoothing of 0.1 · 3 / 2
        return cross_entropy(plain(images.images), images.labels, label_smoothing=0.15)

    gradients = torch.autograd.grad(smoothed(), weights)
    norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(weights, gradients, strict=True)]).norm()
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, gradients, strict=True):
            w += 0.7 * w**2 * g / norm
    perturbed = torch.autograd.grad(smoothed(), weights)
    for now, old, g in zip(network.parameters(), before, perturbed, strict=True):
        torch.testing.assert_close(now.detach(), old - 0.1 * (g + 5e-4 * old), rtol=1e-4, atol=1e-6)


def test_statistics_are_those_of_the_first_pass_alone(accelerator: Accelerator) -> None:
    config = FTSAMConfig(epochs=1, batch_size=48, augmentation="none")
    network, plain = convnet(), convnet()
    Engine(accelerator, ToyImages()).run(network, config.phases(network))  # type: ignore[arg-type]
    images = ToyImages().images
    assert images is not None
    features = plain.model[0](images.float() / 127.5 - 1).detach()  # type: ignore[index]
    # momentum 0.1 from a mean of 0
    expected = 0.1 * features.mean((0, 2, 3))
    torch.testing.assert_close(weights_of(network)["model.1.running_mean"], expected, rtol=1e-4, atol=1e-5)
    assert weights_of(network)["model.1.num_batches_tracked"] == 1


def test_history_has_the_plain_loss_too(accelerator: Accelerator) -> None:
    network = mlp()
    (row, _) = Engine(accelerator, ToyImages()).run(network, SMALL.phases(network)).history  # type: ignore[arg-type]
    assert row["loss"] != row["clean_loss"] > 0


def test_repeatable_and_tidy(accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(SMALL, lambda: convnet(dropout=0.3), accelerator)


def test_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(SMALL, lambda: convnet(dropout=0.3), accelerator, tmp_path, saves=2)


def test_presets() -> None:
    cifar, other = parse_defense("ft-sam")[0].settings(), parse_defense("ft-sam:gtsrb-tiny")[0].settings()
    assert (cifar["rho"], cifar["label_smoothing"], cifar["weight_decay"]) == (2, 0.1, 5e-4)
    assert (other["rho"], other["label_smoothing"]) == (8, 0)


@pytest.mark.parametrize(
    "changes", [{"rho": 0.0}, {"rho": float("inf")}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}]
)
def test_ranges(changes: dict[str, float]) -> None:
    with pytest.raises(
        UsageError, match=r"ft-sam: (rho must be positive and finite|label_smoothing must be in \[0, 1\)), got"
    ):
        FTSAMConfig(**changes)  # type: ignore[arg-type]
