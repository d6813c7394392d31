"""FP: activities, masks and the chosen share by hand, the one-pass accuracies against pruning for real, the mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses import parse_defense
from hfdetox.defenses.fp import FinePruning, FPConfig, last_within, share_masks
from hfdetox.defenses.ft import FTConfig
from hfdetox.errors import UsageError
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Pass
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, one_batch, run
from tests.tiny_training import CLASSES, Scaled, ToyImages, _quick_garbage, accelerator, convnet, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = FPConfig(epochs=2, batch_size=16, learning_rate=0.05)


def half_dead(accelerator: Accelerator) -> Scaled:
    """Return a network that knows the toy classes, whose first 8 of 16 features are always 0."""
    network = mlp()
    with torch.no_grad():
        network.model[1].weight[:8] = 0  # type: ignore[index, union-attr, operator]
        network.model[1].bias[:8] = -1  # type: ignore[index, union-attr, operator]
    run(FTConfig(epochs=10, batch_size=16, learning_rate=0.05, weight_decay=0.0), network, accelerator)
    return network


@pytest.mark.parametrize(
    ("accuracies", "max_drop", "place"),
    [
        ([0.9, 0.9, 0.82, 0.80, 0.9], 0.1, 2),  # allowed above 0.81: the later 0.9 comes too late
        ([0.9, 0.5, 0.9], 0.1, 0),
        ([0.9, 0.9, 0.9], 0.1, 2),
        ([1.0, 0.75, 0.5], 0.5, 1),  # a drop of exactly the limit fails
        ([0.0, 0.0], 0.1, 0),
    ],
)
def test_the_failing_step_is_taken_back(accuracies: list[float], max_drop: float, place: int) -> None:
    assert last_within(accuracies, max_drop) == place


def test_masks_by_hand() -> None:
    masks = share_masks(torch.tensor([3.0, 0.0, 2.0, 0.0]), [0.0, 0.25, 0.49, 0.5, 0.99])
    # the least active first, of equal ones the earlier: 1, 3, 2, then 0
    expected = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]
    assert masks.tolist() == expected


def test_shares_end_before_everything() -> None:
    shares = FinePruning(mlp().model, FPConfig()).shares
    assert len(shares) == 100
    assert (shares[0], shares[1], shares[-1]) == pytest.approx((0, 0.01, 0.99))
    assert FinePruning(mlp().model, FPConfig(step=0.3)).shares == pytest.approx([0, 0.3, 0.6, 0.9])


def test_activity_is_the_mean_over_images(accelerator: Accelerator) -> None:
    network = mlp().eval()
    fp = FinePruning(network.model, SMALL)
    looks = Pass(name="look", on_batch=fp.add_activations, finish=fp.average, batch_size=20)
    Engine(accelerator, ToyImages()).run(network, [looks])
    hidden = network.model[:4](one_batch().images.float() / 127.5 - 1)  # type: ignore[index, operator]
    torch.testing.assert_close(fp.activity["4"], hidden.detach().abs().mean(0))


def conv_head() -> Scaled:
    """Return a network whose head is a 1×1 convolution of pooled features, as timm's ResNetV2 has it."""
    torch.manual_seed(0)
    head = nn.Conv2d(16, CLASSES, 1)
    return Scaled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten()))


@pytest.mark.parametrize("make", [mlp, convnet, conv_head])
def test_accuracies_of_one_pass_are_those_of_pruned_networks(
    make: Callable[[], Scaled], accelerator: Accelerator
) -> None:
    network = make().eval()
    fp = FinePruning(network.model, FPConfig(step=0.2))
    (head,) = fp.heads
    batch = one_batch()
    with torch.no_grad():
        fp.add_activations(network, batch)
        fp.average(accelerator)
        fp.rank()
        fp.count_correct(network, batch)
        weight = network.model.get_submodule(head).weight
        old = weight.clone()  # type: ignore[operator]
        counts = []
        for mask in fp.masks[head]:
            weight.copy_(old * mask.reshape(1, -1, *[1] * (old.ndim - 2)))  # type: ignore[operator]
            counts.append(int((network(batch.images).argmax(1) == batch.labels).sum()))
    assert fp.correct.tolist() == counts
    assert len(counts) == 5


def test_silent_features_are_cut_off_and_stay_so(accelerator: Accelerator) -> None:
    network = half_dead(accelerator)
    assert network.model[4].weight[:, :8].all()  # type: ignore[index, union-attr]
    record = run(SMALL, network, accelerator)
    assert [row["phase"] for row in record.history] == ["fp-activation", "fp-pruning", "fp", "fp"]
    chosen = record.history[1]
    assert chosen["pruned_share"] >= 0.5
    assert chosen["held_out_accuracy"] > 0.9 * chosen["held_out_accuracy_before"] > 0
    weight = network.model[4].weight  # type: ignore[index, union-attr]
    silent = (weight == 0).all(0)  # type: ignore[union-attr]
    assert silent[:8].all()  # type: ignore[index]
    assert int(silent.sum()) == int(chosen["pruned_share"] * 16 + 1e-9)  # type: ignore[union-attr]


def test_a_convolution_for_a_head_is_pruned_by_column(accelerator: Accelerator) -> None:
    network = conv_head()
    run(FPConfig(epochs=1, batch_size=16, step=0.25, max_drop=1.0), network, accelerator)
    # only a loss of everything would stop the pruning: three quarters of 16 columns go, and stay zero
    silent = (network.model.get_submodule("3").weight == 0).flatten(1).all(0)  # type: ignore[union-attr, operator]
    assert int(silent.sum()) == 12


def test_the_mask_touches_pruned_columns_alone() -> None:
    network = mlp()
    fp = FinePruning(network.model, SMALL)
    fp.kept["4"][[2, 5]] = 0
    before = weights_of(network)
    fp.mask()
    after = weights_of(network)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.4.weight"]
    assert not after["model.4.weight"][:, [2, 5]].any()
    kept = [column for column in range(16) if column not in (2, 5)]
    assert torch.equal(after["model.4.weight"][:, kept], before["model.4.weight"][:, kept])


def test_a_head_that_is_no_matrix_is_refused() -> None:
    network = Scaled(nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(UsageError, match="fp: the head 0 is a Conv2d, and fp prunes columns of a Linear or of a 1×1"):
        SMALL.phases(network)  # type: ignore[arg-type]


def test_a_layer_behind_the_head_is_refused_before_anything_changes(accelerator: Accelerator) -> None:
    network = Scaled(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES), nn.Softmax(1)))
    before = weights_of(network)
    with pytest.raises(UsageError, match="fp: the logits of Sequential are not the output of 1, so that"):
        run(SMALL, network, accelerator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(network).items())


def test_repeatable_and_tidy(accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(SMALL, lambda: convnet(dropout=0.3), accelerator)


def test_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(SMALL, lambda: convnet(dropout=0.3), accelerator, tmp_path, saves=4)


def test_presets() -> None:
    paper = parse_defense("fp")[0].settings()
    assert (paper["step"], paper["max_drop"], paper["weight_decay"], paper["epochs"]) == (0.01, 0.1, 5e-4, 100)
    assert parse_defense("fp:budget")[0].settings()["max_drop"] == 0.02


@pytest.mark.parametrize("changes", [{"step": 0.0}, {"step": 1.0}, {"max_drop": 0.0}, {"max_drop": 1.1}])
def test_ranges(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"fp: (step must be in \(0, 1\)|max_drop must be in \(0, 1\]), got"):
        FPConfig(**changes)  # type: ignore[arg-type]
