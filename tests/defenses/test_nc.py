"""NC: the anomaly index, masks and their schedule by hand, the gradients of groups of classes, verdicts and stamps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.defenses.nc import Inversion, NCConfig, anomaly_index
from hfdetox.errors import UsageError
from hfdetox.training import search
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.search import bounded, stamped
from tests.defenses.pixels import linear, pixel_convnet, pixels
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, run
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, equal_weights, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = NCConfig(epochs=1, inversion_epochs=2, batch_size=24)
FOUR = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]]


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        # median 3; 2 1 0 1 97 away, whose median is 1
        ([1, 2, 3, 4, 100], [2 / 1.4826, 1 / 1.4826, 0, 1 / 1.4826, 97 / 1.4826]),
        # median 5; 3 1 1 15 away, whose median is 2
        ([2, 4, 6, 20], [3 / 2.9652, 1 / 2.9652, 1 / 2.9652, 15 / 2.9652]),
    ],
)
def test_the_anomaly_index_by_hand(norms: list[float], expected: list[float]) -> None:
    assert anomaly_index(torch.tensor(norms, dtype=torch.float32)).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_anomaly_index_of_equal_norms_is_finite() -> None:
    index = anomaly_index(torch.tensor([1.0, 5.0, 5.0, 5.0]))
    assert torch.isfinite(index).all()
    assert index[1:].tolist() == [0, 0, 0]
    assert index[0] > 2


def test_masks_and_stamps_by_hand() -> None:
    # tanh 0 = 0, tanh 1 = 0.761594
    assert bounded(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.5, 0.880797], rel=1e-5)
    x = pixels((0.0, 1.0), (1.0, 0.0))
    masks, patterns = torch.tensor([[0.0, 0.5], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.2, 1.0]])
    found = stamped(x, masks.view(2, 1, 1, 2), patterns.view(2, 1, 1, 2)).flatten(1) / 255
    # trigger by trigger: half of the second pixel is black; the first pixel is 0.2
    expected = torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.2, 1.0], [0.2, 0.0]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("together", [1024, 1])
def test_the_loss_and_its_gradients_are_those_of_a_loop_over_classes(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "TOGETHER", together)
    network = linear(FOUR)
    inversion = Inversion(network, NCConfig(kappa=0.01, classes=("3", "0", "2")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inversion.masks.copy_(torch.randn(3, 1, 1, 2, generator=generator))
        inversion.patterns.copy_(torch.randn(3, 1, 1, 2, generator=generator))
    images, labels = pixels((0.2, 0.9), (0.7, 0.1), (0.4, 0.4)), torch.tensor([0, 1, 2])
    terms = inversion(Batch(images, labels, torch.full((3,), 1 / 3)))
    found = torch.autograd.grad(terms["loss"], (inversion.masks, inversion.patterns))
    free = [tensor.detach().clone().requires_grad_() for tensor in (inversion.masks, inversion.patterns)]
    loss = torch.zeros(())
    for row, target in enumerate((3, 0, 2)):
        mask, pattern = free[0][row].tanh() / 2 + 0.5, free[1][row].tanh() / 2 + 0.5
        logits = network((1 - mask) * images + mask * pattern * 255)
        # κ at 1×2 pixels is 32²/2 times that at 32×32
        loss = loss + cross_entropy(logits, torch.full((3,), target)) + 0.01 * 512 * mask.sum()
        rate = (logits.argmax(1) == target).float().mean()
        assert terms[f"success_{target}"].item() == pytest.approx(rate.item())
    expected = torch.autograd.grad(loss, free)
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_kappa_follows_five_epochs_of_success_or_failure() -> None:
    inversion = Inversion(linear(FOUR), NCConfig(classes=("0", "1", "2")))
    start = 1e-3 * 512
    entry = {"success_0": 0.98, "success_1": 0.97, "success_2": 1.0}
    for _ in range(4):
        assert not inversion.end_epoch(entry)
    assert inversion.kappa.tolist() == pytest.approx([start] * 3)
    # class 2 fails once, and its count begins anew
    inversion.end_epoch({**entry, "success_2": 0.5})
    assert inversion.kappa.tolist() == pytest.approx([2 * start, start / 2**1.5, start], rel=1e-5)
    for _ in range(5):
        inversion.end_epoch(entry)
    assert inversion.kappa.tolist() == pytest.approx([4 * start, start / 8, 2 * start], rel=1e-5)


def test_the_smallest_successful_mask_is_kept_and_patience_ends_a_class() -> None:
    inversion = Inversion(linear(FOUR), NCConfig(classes=("0", "1", "2"), patience=2))
    entry = {"success_0": 1.0, "success_1": 0.5, "success_2": 1.0}
    inversion.end_epoch(entry)
    # two pixels of 0.880797; class 1 has none yet and counts as the whole image
    assert inversion.best_norm.tolist() == pytest.approx([1.761594, 2, 1.761594], rel=1e-5)
    with torch.no_grad():
        inversion.masks[2] = 0
        inversion.masks[0] = 3
    inversion.end_epoch(entry)
    assert inversion.best_norm.tolist() == pytest.approx([1.761594, 2, 1], rel=1e-5)
    assert inversion.best_masks[2].flatten().tolist() == [0.5, 0.5]
    assert not inversion.end_epoch(entry)
    # class 0 waited two epochs, class 2 one, and class 1, without success, does not wait
    assert inversion.active()[1] == [1, 2]
    assert not inversion.end_epoch(entry)
    assert inversion.active()[1] == [1]


@pytest.mark.parametrize(
    ("norms", "flagged"),
    [
        # median 50.5; 49.5 .5 .5 1.5 away, whose median is 1
        ([1.0, 50.0, 51.0, 52.0], [True, False, False, False]),
        # as far above: no
        ([50.0, 51.0, 52.0, 100.0], [False] * 4),
    ],
)
def test_outliers_below_the_median_are_flagged(
    norms: list[float], flagged: list[bool], accelerator: Accelerator
) -> None:
    inversion = Inversion(linear(FOUR), NCConfig())
    inversion.best_norm.copy_(torch.tensor(norms))
    found = inversion.judge(accelerator)
    assert inversion.flagged.tolist() == flagged
    assert found["flagged"] == sum(flagged)
    assert found["unchanged"] == (not any(flagged))
    assert [found[f"mask_norm_{label}"] for label in range(4)] == norms
    assert found["anomaly_index_1"] == pytest.approx(0.5 / 1.4826, rel=1e-5)


def test_a_share_of_the_images_is_stamped_with_their_true_labels() -> None:
    inversion = Inversion(linear(FOUR), NCConfig())
    inversion.flagged[2] = True
    inversion.best_masks[2] = torch.tensor([[[1.0, 0.0]]])
    inversion.best_patterns[2] = torch.tensor([[[0.4, 1.0]]])
    images, labels = torch.zeros(1000, 1, 1, 2, dtype=torch.uint8), torch.arange(1000)
    torch.manual_seed(0)
    found, same = inversion.stamp_some(images, labels, range(1000))
    assert torch.equal(same, labels)
    assert not images.any()
    assert found[:, 0, 0, 0].unique().tolist() == pytest.approx([0, 102])
    assert not found[:, 0, 0, 1].any()
    # 200 expected, deviation 12.6
    assert 140 < int((found[:, 0, 0, 0] > 0).sum()) < 260


def test_without_a_flag_the_model_comes_back_unchanged_and_the_history_says_so(accelerator: Accelerator) -> None:
    network = pixel_convnet()
    before = weights_of(network)
    record = run(NCConfig(inversion_epochs=2, batch_size=24, anomaly=1e12), network, accelerator)  # type: ignore[arg-type]
    assert equal_weights(before, weights_of(network))
    assert [row["phase"] for row in record.history] == ["nc-inversion", "nc-inversion", "nc-verdict"]
    assert (record.history[-1]["flagged"], record.history[-1]["unchanged"]) == (0, 1)


def flagging(config: NCConfig, network: object, accelerator: Accelerator) -> list[str]:
    """Run with class 1 flagged, whatever was found; return the phases."""
    search, verdict, tuning = config.phases(network)  # type: ignore[arg-type]
    inversion = search.network  # type: ignore[union-attr]
    assert isinstance(inversion, Inversion)
    judge = verdict.finish  # type: ignore[union-attr]

    def and_flag(on: Accelerator) -> dict[str, float]:
        found = dict(judge(on) or {})  # type: ignore[misc]
        inversion.flagged.copy_(torch.tensor([False, True, False]))
        return found

    verdict.finish = and_flag  # type: ignore[union-attr]
    record = Engine(accelerator, ToyImages(), seed=3).run(network, [search, verdict, tuning])  # type: ignore[arg-type]
    return [row["phase"] for row in record.history]


@pytest.mark.parametrize("reweight", ["none", "class"])
def test_a_flagged_class_is_unlearnt(reweight: str, accelerator: Accelerator) -> None:
    network = pixel_convnet()
    before = weights_of(network)
    config = NCConfig(epochs=2, inversion_epochs=1, batch_size=24, reweight=reweight)  # type: ignore[arg-type]
    assert flagging(config, network, accelerator) == ["nc-inversion", "nc-verdict", "nc-unlearning", "nc-unlearning"]
    after = weights_of(network)
    assert all(not torch.equal(before[name], after[name]) for name, _ in network.named_parameters())


def test_seeds_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    config = NCConfig(inversion_epochs=2, batch_size=24, anomaly=1e12)
    assert_repeatable_and_tidy(config, pixel_convnet, accelerator)  # type: ignore[arg-type]
    assert_resumes(config, pixel_convnet, accelerator, tmp_path, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "message"),
    [("0,1,7", "classes 0 to 3, and classes names 7"), ("0,1", "three are the least"), ("0,0,1", "different indices"),
     ("cat,dog,bird", "different indices")],
)  # fmt: skip
def test_wrong_classes(classes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_defense("nc", {"classes": classes})[0].phases(linear(FOUR))
