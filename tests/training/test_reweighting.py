"""The weights of classes and images, against values worked out by hand, and a tuning that uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses import parse_defense
from hfdetox.defenses.auto import D3Config
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from hfdetox.training.reweighting import Reweighting, class_weights, critic_weights, image_weights, reweighted
from tests.defenses.pixels import pixel_convnet
from tests.tiny_training import Scaled, ToyImages, _quick_garbage, accelerator, equal_weights, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = D3Config(epochs=4, batch_size=16, learning_rate=0.05, augmentation="none")


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- q ---


def test_a_class_weighs_by_the_exponential_of_its_harm() -> None:
    # exp(10 · ln 2 / 10) = 2, and (2 q + q) / 2 = 1
    found = class_weights(doubles(math.log(2) / 10, 0), doubles(7, 7))
    torch.testing.assert_close(found, doubles(4 / 3, 2 / 3))


def test_without_harm_classes_weigh_by_what_they_lack_in_number() -> None:
    # q = (c / 30, c / 10); the mean over 40 images (c + c) / 40 is 1 at c = 20
    torch.testing.assert_close(class_weights(doubles(0, 0), doubles(30, 10)), doubles(2 / 3, 2))
    torch.testing.assert_close(class_weights(doubles(0, 0, 0), doubles(5, 5, 5)), doubles(1, 1, 1))


def test_class_weights_stay_within_their_bounds_and_of_mean_one() -> None:
    # exp(10) would leave the second class nothing: it keeps 1/3, and the first has 2 − 1/3
    torch.testing.assert_close(class_weights(doubles(1, 0), doubles(8, 8)), doubles(5 / 3, 1 / 3))
    # a tenth of the images gets the most a class may weigh, 3, and the others (10 − 3) / 9
    torch.testing.assert_close(class_weights(doubles(1, 0), doubles(1, 9)), doubles(3, 7 / 9))


def test_a_class_without_images_weighs_in_no_mean() -> None:
    found = class_weights(doubles(0, 0, 0), doubles(4, 4, 0))
    torch.testing.assert_close(found[:2], doubles(1, 1))


# --- v = max(0, a − b·D) ---


@pytest.mark.parametrize(
    ("scores", "budget", "expected"),
    [
        # v = 1 ± x with x² = ρ
        ((0, 1), 0.25, (1.5, 0.5)),
        ((5, 3), 0.25, (0.5, 1.5)),
        # v = (1 + x, 1, 1 − x): 2 x² = 3 ρ; a = 3/2, b = 1/2
        ((0, 1, 2), 1 / 6, (1.5, 1, 0.5)),
        # the third is cut off: v = (3/2 + t, 3/2 − t, 0), 1/2 + 2 t² + 1 = 3
        ((0, 1, 3), 1.0, (1.5 + math.sqrt(0.75), 1.5 - math.sqrt(0.75), 0)),
        # as much as there is to shift, 1/4 + 1/4 + 1 = 3/2, is less than the budget 3
        ((0, 0, 3), 1.0, (1.5, 1.5, 0)),
        ((2, 2, 2), 1.0, (1, 1, 1)),
        ((7,), 1.0, (1,)),
    ],
)
def test_the_critics_weights_are_the_optimum(
    scores: tuple[float, ...], budget: float, expected: tuple[float, ...]
) -> None:
    torch.testing.assert_close(critic_weights(doubles(*scores), budget), doubles(*expected), rtol=0, atol=1e-6)


def test_the_critics_weights_do_not_depend_on_the_scores_scale() -> None:
    scores = doubles(0.3, -1.0, 2.5, 0.9, 0.1)
    expected = critic_weights(scores, 0.5)
    torch.testing.assert_close(critic_weights(1e-6 * scores + 40, 0.5), expected, rtol=0, atol=1e-6)
    assert float(expected.sum()) == pytest.approx(5)
    assert float((expected - 1).square().mean()) == pytest.approx(0.5)


# --- w ---


def test_an_images_weight_is_clipped_and_then_of_mean_one() -> None:
    # q·v = 3·2, 3·1, 1·1 and nothing for an image of the held-out part; clipped 4, 3, 1 of mean 8/3
    labels = torch.tensor([0, 0, 1, -1])
    found = image_weights(doubles(3, 1), labels, doubles(2, 1, 1, 1))
    torch.testing.assert_close(found, doubles(1.5, 1.125, 0.375, 0))


def test_a_batchs_weights_are_multiplied_by_its_images() -> None:
    weights = Reweighting("class")
    weights.weights = doubles(0.5, 2, 1)
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), torch.tensor([2, 1]))
    found = weights.weighted(batch)
    assert found.weights.tolist() == [0.5, 1.0]
    assert found.weights.dtype == torch.float32
    assert found.images is batch.images


# --- looks at a network ---


class Answering(nn.Module):
    """Logits that call an image by `answers`, by the image's first value; `head` is an identity with known features."""

    def __init__(self, answers: Mapping[int, int], features: Mapping[int, list[float]]) -> None:
        super().__init__()
        self.answers, self.features = answers, features
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = images[:, 0, 0, 0].tolist()
        logits = self.head(torch.tensor([self.features[int(n)] for n in numbers]))
        chosen = torch.tensor([self.answers[int(n)] for n in numbers])
        return logits * 0 + nn.functional.one_hot(chosen, 2)


def numbered(numbers: list[int], labels: list[int]) -> Batch:
    """Return images that show their own number, at positions of that number."""
    positions = torch.tensor(numbers)
    images = positions.float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return Batch(images, torch.tensor(labels), torch.full((len(numbers),), 1 / len(numbers)), positions)


def look(
    weights: Reweighting, network: nn.Module, parts: Mapping[str, Batch], accelerator: Accelerator
) -> dict[str, float]:
    """Do what the engine does with the passes of a look."""
    found: dict[str, float] = {}
    for each in weights.probes("fit")():
        each.on_batch(network, parts[each.part])
        assert each.finish is not None
        found |= each.finish(accelerator) or {}
    return found


FEATURES = {0: [0.0, 0.0], 1: [1.0, 0.0], 2: [2.0, 0.0], 3: [0.0, 5.0], 4: [0.0, 6.0], 5: [0.0, 7.0],
            6: [0.0, 0.0], 7: [0.0, 0.0], 8: [0.0, 0.0], 9: [0.0, 0.0]}  # fmt: skip
# images 0 to 5 are trained on, 6 to 9 held out: two of each class
PARTS = {"fit": numbered([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1]), "held-out": numbered([6, 7, 8, 9], [0, 0, 1, 1])}
RIGHT = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 0, 7: 0, 8: 1, 9: 1}


def test_a_class_that_lost_accuracy_weighs_more_after_an_epoch(accelerator: Accelerator) -> None:
    weights = Reweighting("class")
    assert look(weights, Answering(RIGHT, FEATURES), PARTS, accelerator) == {}
    assert weights.weights.tolist() == pytest.approx([1] * 6)
    assert weights.accuracy.tolist() == [1, 1]
    # class 0 falls from 2 of 2 to 1 of 2: exp(10 · 1/2) leaves class 1 the least, 1/3, so q would be (5/3, 1/3);
    # of the old (1, 1) half is kept
    found = look(weights, Answering({**RIGHT, 7: 1}, FEATURES), PARTS, accelerator)
    torch.testing.assert_close(weights.classes, doubles(4 / 3, 2 / 3))
    torch.testing.assert_close(weights.weights, doubles(*[4 / 3] * 3, *[2 / 3] * 3))
    assert found["worst_class_drop"] == pytest.approx(0.5)
    assert found["class_spread"] == pytest.approx(0.5)
    assert found["largest_class_weight"] == pytest.approx(4 / 3)


def test_a_class_that_gained_accuracy_did_no_harm(accelerator: Accelerator) -> None:
    weights = Reweighting("class")
    look(weights, Answering({**RIGHT, 6: 1}, FEATURES), PARTS, accelerator)
    found = look(weights, Answering(RIGHT, FEATURES), PARTS, accelerator)
    assert found["worst_class_drop"] == 0
    torch.testing.assert_close(weights.classes, doubles(1, 1))


def test_images_near_those_that_were_lost_keep_their_weight(accelerator: Accelerator) -> None:
    weights = Reweighting("wasserstein")
    look(weights, Answering(RIGHT, FEATURES), PARTS, accelerator)
    # image 0 is lost; the others of its class lie at 1 and 2 on the critic's axis (their mean minus it, 1.5 − 0 > 0),
    # so that v = (1 + x, 1 − x) with x² = ρ = 1: the nearer has all the weight
    found = look(weights, Answering({**RIGHT, 0: 1}, FEATURES), PARTS, accelerator)
    assert found["lost_images"] == 1
    torch.testing.assert_close(weights.weights, doubles(1, 2, 0, 1, 1, 1), rtol=0, atol=1e-6)


def test_what_the_old_network_had_wrong_is_not_lost(accelerator: Accelerator) -> None:
    weights = Reweighting("wasserstein")
    wrong = {**RIGHT, 0: 1}
    look(weights, Answering(wrong, FEATURES), PARTS, accelerator)
    assert look(weights, Answering(wrong, FEATURES), PARTS, accelerator)["lost_images"] == 0
    torch.testing.assert_close(weights.weights, doubles(*[1] * 6))


# --- in a training ---


def tuned(accelerator: Accelerator, how: str, folder: Path | None = None, stop: int | None = None) -> Scaled:
    network = mlp()
    (phase,) = replace(SMALL, reweight=how).phases(network)  # type: ignore[arg-type]
    assert isinstance(phase, Phase)
    if stop is not None:
        phase.stop = _Stop(stop)
    store = CheckpointStore(folder) if folder is not None else None
    Engine(accelerator, ToyImages(), seed=1, checkpoints=store).run(network, [phase])
    return network


class _Stop:
    """Kill a run after an epoch's checkpoint: the next epoch's `stop` raises."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def __call__(self, entry: object) -> bool:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return False


def test_none_is_the_very_phase() -> None:
    phase = SMALL.phase(name="toy", parameters=[], loss=lambda model, batch: {})
    assert reweighted(phase, "none") is phase
    assert phase.on_epoch_end is None
    assert phase.part == "all"


@pytest.mark.parametrize("how", ["class", "wasserstein"])
def test_a_resumed_run_has_the_same_weights(how: str, accelerator: Accelerator, tmp_path: Path) -> None:
    whole = weights_of(tuned(accelerator, how))
    with pytest.raises(KeyboardInterrupt):
        tuned(accelerator, how, tmp_path, stop=2)
    resumed = weights_of(tuned(accelerator, how, tmp_path))
    assert equal_weights(whole, resumed)
    assert not equal_weights(whole, weights_of(tuned(accelerator, "none")))


def test_the_held_out_fifth_is_not_trained_on(accelerator: Accelerator) -> None:
    network = mlp()
    seen: set[int] = set()

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        seen.update(batch.positions.tolist())
        logits = model(batch.images)
        return {"loss": (batch.weights * nn.functional.cross_entropy(logits, batch.labels, reduction="none")).sum()}

    phase = replace(SMALL, reweight="class").phase(name="toy", parameters=list(network.parameters()), loss=loss)
    record = Engine(accelerator, ToyImages(), seed=1).run(network, [phase])
    # round(48 / 5) = 10 are held out
    assert len(seen) == 38
    assert len(record.history) == 4
    assert all(0 <= entry["worst_class_drop"] <= 1 and entry["class_spread"] >= 0 for entry in record.history)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["anp", "rnp", "i-bau", "ims", "clp", "bn", "bnp", "bna"])
def test_defenses_that_do_not_tune_the_classifier_refuse_weights_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}.*reweight") as said:
        parse_defense(name, {"reweight": "class"})
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("how", ["class", "wasserstein"])
@pytest.mark.parametrize("name", ["d3", "ft", "ft-random-head", "ft-sam", "fst", "fp", "nad", "sau", "npd", "nc"])
def test_every_tuning_defense_weighs_its_images(name: str, how: str, accelerator: Accelerator) -> None:
    quick = {"epochs": "1", "batch_size": "48", "augmentation": "none", "reweight": how}
    own = {"npd": {"layer": "3", "warmup": "0"}, "nc": {"inversion_epochs": "1", "success": "0.01", "anomaly": "0.01"},
           "nad": {"teacher_epochs": "1"}}  # fmt: skip
    config, _ = parse_defense(name, {**quick, **own.get(name, {})})
    network = pixel_convnet()
    record = Engine(accelerator, ToyImages(48), seed=3).run(network, config.phases(network))
    assert "worst_class_drop" in record.history[-1]
