"""Metrics against hand-worked values, tables and a plain bootstrap."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.stats import binom
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.data.cache import Pixels
from hfdetox.errors import RunError
from hfdetox.evaluation.metrics import (
    Predictions,
    TriggerView,
    class_accuracies,
    defense_effectiveness_rating,
    measure,
    predict,
    rate,
    ratings,
)
from hfdetox.evaluation.results import LabelRate, Measurement
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from hfdetox.triggers import BadNets, Blended
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, convnet, mlp, toy_pixels

__all__ = ["_quick_garbage", "accelerator"]


# --- rates ---


@pytest.mark.parametrize("samples", [1, 7, 500, 10_000])
def test_interval_of_none_and_of_all_has_a_closed_form(samples: int) -> None:
    none, every = rate(0, samples), rate(samples, samples)
    edge = 0.025 ** (1 / samples)
    assert none.interval == pytest.approx((0, 1 - edge), abs=1e-12)
    assert every.interval == pytest.approx((edge, 1), abs=1e-12)
    assert (none.value, every.value) == (0, 1)


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [(5, 10, 0.1871, 0.8129), (1, 10, 0.0025, 0.4450), (3, 20, 0.0321, 0.3789), (90, 100, 0.8238, 0.9510)],
)
def test_interval_is_that_of_the_tables(successes: int, samples: int, low: float, high: float) -> None:
    found = rate(successes, samples)
    assert found.interval == pytest.approx((low, high), abs=5e-5)
    assert (found.value, found.successes, found.samples) == (successes / samples, successes, samples)


def test_interval_is_where_the_binomial_tails_are_2_5_percent() -> None:
    low, high = rate(163, 9000).interval
    assert float(binom.sf(162, 9000, low)) == pytest.approx(0.025)
    assert float(binom.cdf(163, 9000, high)) == pytest.approx(0.025)


@pytest.mark.parametrize(("successes", "samples"), [(0, 0), (3, 2), (-1, 5)])
def test_a_rate_of_nothing_is_an_error(successes: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {samples}"):
        rate(successes, samples)


@pytest.mark.parametrize(
    ("accuracy", "success", "expected"),
    [
        # the published example: 96.08
        ((0.9182, 0.9221), (0.9379, 0.0163), 0.9608),
        # accuracy falls: (0.9 − 0.1 + 1) / 2
        ((0.95, 0.85), (0.95, 0.05), 0.9),
        # accuracy and attack fall alike: nothing is won
        ((0.5, 0.0), (0.5, 0.0), 0.5),
        ((0.9, 0.9), (0.8, 0.8), 0.5),
        # a gain of accuracy and a stronger attack count as nothing
        ((0.5, 0.9), (0.2, 0.7), 0.5),
        ((1.0, 0.0), (0.0, 0.0), 0.0),
        ((1.0, 1.0), (1.0, 0.0), 1.0),
    ],
)
def test_der_by_hand(accuracy: tuple[float, float], success: tuple[float, float], expected: float) -> None:
    assert defense_effectiveness_rating(accuracy, success) == pytest.approx(expected, abs=1e-9)


# --- predictions ---


class Brightest(nn.Module):
    """Answers the brightest channel, and class 0 where the last pixel is white: a backdoor by construction."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.float().mean((2, 3)) / 10
        stamped = (images[:, :, -1, -1] == 255).all(1)
        return logits + 100 * stamped[:, None] * torch.tensor([1.0, 0.0, 0.0])


def test_predictions_follow_the_sources_order(accelerator: Accelerator) -> None:
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    images = ToyImages(7, labels=labels)
    found = predict(Brightest(), images, accelerator)
    assert found.predicted.tolist() == labels.tolist()
    expected = cross_entropy(Brightest()(images.images), labels, reduction="none")  # type: ignore[arg-type]
    assert found.losses == pytest.approx(expected.numpy())
    # whatever the numbers of the images are
    images.positions = torch.tensor([30, 2, 17, 5, 8, 0, 9])
    again = predict(Brightest(), images, accelerator)
    assert again.predicted.tolist() == labels.tolist()
    assert again.losses == pytest.approx(expected.numpy())


@pytest.mark.parametrize("max_bytes", [10**9, 0], ids=["cached", "on demand"])
def test_predictions_of_pixels_at_some_positions(max_bytes: int, accelerator: Accelerator) -> None:
    whole = toy_pixels(300, max_bytes=max_bytes)
    assert (whole.images is None) == (max_bytes == 0)
    part = whole.view(BadNets(mode="input"), positions=[299, 4, 7, 100])
    assert predict(Brightest(), whole, accelerator).predicted.tolist() == whole.labels.tolist()
    assert predict(Brightest(), part, accelerator).predicted.tolist() == [0, 0, 0, 0]
    unstamped = whole.view(positions=[299, 4, 7, 100])
    assert predict(Brightest(), unstamped, accelerator).predicted.tolist() == [299 % 3, 1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_predicting_uses_eval_mode_and_puts_the_mode_back(training: bool, accelerator: Accelerator) -> None:
    network = convnet(dropout=0.9)
    network.train(training)
    statistics = network.model[1].running_mean.clone()  # type: ignore[union-attr, operator]
    first, second = (predict(network, ToyImages(), accelerator) for _ in range(2))
    assert first.losses.tolist() == second.losses.tolist()
    assert torch.equal(network.model[1].running_mean, statistics)  # type: ignore[arg-type]
    assert all(module.training == training for module in network.modules())


def test_measuring_is_float32_after_a_training_in_bf16() -> None:
    accelerator = make_accelerator("cpu", "bf16")
    network = mlp()

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(model(batch.images), batch.labels)}

    phase = Phase(name="toy", parameters=list(network.parameters()), optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
                  loss=loss, epochs=1, batch_size=16)  # fmt: skip
    assert Engine(accelerator, ToyImages()).run(network, [phase]).precision == "bf16"
    found = predict(network, ToyImages(), accelerator)
    images = ToyImages()
    exact = cross_entropy(network(images.images), images.labels, reduction="none")
    assert found.losses == pytest.approx(exact.detach().numpy(), rel=1e-5)


def test_predicting_shows_progress_only_when_asked(
    accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(Brightest(), ToyImages(), accelerator, title="measure it")
    assert capsys.readouterr().err == ""


# --- measuring ---


def views(evaluation: Pixels, *triggers: Any, target: int = 0) -> list[TriggerView]:
    """Return the views as an evaluation makes them: images of the target class left out."""
    positions = evaluation.without_label(target)
    return [TriggerView(trigger, target, evaluation.view(trigger, positions=positions), 3) for trigger in triggers]


def test_measure_by_hand(accelerator: Accelerator) -> None:
    # 9 images: 3 of each class; images 1 and 5 show another class than their label says
    evaluation = toy_pixels(9, wrong={1: 0, 5: 1})
    trigger = BadNets(name="patch", mode="input", target=0)
    outcome = measure(Brightest(), evaluation, views(evaluation, trigger, Blended(alpha=0.01)), accelerator)
    found = outcome.measurement
    assert (found.accuracy.successes, found.accuracy.samples) == (7, 9)
    assert outcome.correct.tolist() == [i not in (1, 5) for i in range(9)]
    assert outcome.predicted.tolist() == [0, 0, 2, 0, 1, 1, 0, 1, 2]
    # two of three images of classes 1 and 2: the first of the worst is named; the deviations are 2, −1 and −1 ninths
    assert found.classes is not None
    assert found.classes.accuracies == pytest.approx([1, 2 / 3, 2 / 3])
    assert (found.classes.worst_label, found.classes.worst.successes, found.classes.worst.samples) == (1, 2, 3)
    assert found.classes.spread == pytest.approx(2**0.5 / 9)
    assert found.loss == pytest.approx(float(predict(Brightest(), evaluation, accelerator).losses.mean()))
    # the three images of class 0 carry no trigger; all six others are taken by it
    patch = found.triggers["patch"]
    assert (patch.attack_success_rate.successes, patch.attack_success_rate.samples) == (6, 6)
    assert (patch.robust_accuracy.successes, patch.robust_accuracy.samples) == (0, 6)
    # without it 4 of these 6 are right; it moves all of them to its target, where one goes anyway
    assert patch.accuracy_without == rate(4, 6)
    assert patch.destination is not None
    assert (patch.destination.label, patch.destination.rate, patch.destination.without) == (0, rate(6, 6), rate(1, 6))
    assert patch.destination.excess.value == pytest.approx(5 / 6)
    assert (patch.kind, patch.mode, patch.target) == ("badnets", "input", 0)
    assert patch.spec == "badnets:name=patch,target=index:0,mode=input"
    assert patch.file_sha256 == hashlib.sha256(trigger.file_bytes()).hexdigest()
    places, hits = outcome.hits["patch"]
    assert places.tolist() == [1, 2, 4, 5, 7, 8]
    assert hits.all()
    assert outcome.triggered["patch"].tolist() == [0] * 6
    drawn = BadNets(name="drawn", target=0, image=torch.zeros(3, 2, 2, dtype=torch.uint8))
    again = measure(Brightest(), evaluation, views(evaluation, drawn), accelerator).measurement
    assert again.triggers["drawn"].spec == "triggers/drawn.safetensors"  # no text form has its picture
    # a blend too faint to matter: image 1 is answered with the target by itself, image 5 with neither
    faint = found.triggers["blended"]
    assert (faint.attack_success_rate.successes, faint.robust_accuracy.successes) == (1, 4)
    for result in found.triggers.values():
        assert result.attack_success_rate.value + result.robust_accuracy.value <= 1


def test_a_class_without_images_has_no_accuracy() -> None:
    found = class_accuracies(np.array([3, 3, 0]), np.array([True, False, True]), 5)
    assert found.accuracies == [1.0, None, None, 0.5, None]
    assert (found.worst_label, found.worst.value, found.spread) == (3, 0.5, 0.25)
    assert [(one.label, one.name, one.rate) for one in found.lowest] == [(3, "3", rate(1, 2)), (0, "0", rate(1, 1))]


def test_the_ten_worst_of_many_classes_are_named() -> None:
    """Of equal ones that with more images: none of two is worse than none of one."""
    truth = np.repeat(np.arange(1000), 1 + (np.arange(1000) % 3 == 0))
    found = class_accuracies(truth, truth >= 30, 1000, [f"class {i}" for i in range(1000)])
    assert [one.label for one in found.lowest] == list(range(0, 30, 3))
    assert found.lowest[1] == LabelRate(3, "class 3", rate(0, 2))


def test_images_of_the_target_class_never_count_as_a_success(accelerator: Accelerator) -> None:
    """A model that always answers the target has ASR 1 of the others, and one that never errs has ASR 0."""
    evaluation = toy_pixels(30)
    for target in (0, 1, 2):
        (result,) = measure(
            Brightest(), evaluation, views(evaluation, Blended(alpha=0.01), target=target), accelerator
        ).measurement.triggers.values()
        assert result.attack_success_rate.samples == 20
        assert result.attack_success_rate.successes == 0
        assert result.robust_accuracy.value == 1


class Shifted(nn.Module):
    """Answers the brightest channel, and the next class where the last pixel is white."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        brightest = images.float().mean((2, 3)).argmax(1)
        stamped = (images[:, :, -1, -1] == 255).all(1)
        return 10 * torch.eye(3)[(brightest + stamped) % 3]


def test_all_to_all_by_hand(accelerator: Accelerator) -> None:
    # 9 images: 3 of each class, all with the trigger; image 1 (class 1) shows class 0, image 5 (class 2) class 1
    evaluation = toy_pixels(9, wrong={1: 0, 5: 1})
    trigger = BadNets(mode="input", target="all-to-all")
    view = TriggerView(trigger, "all-to-all", evaluation.view(trigger), 3)
    assert view.wanted().tolist() == [1, 2, 0] * 3
    outcome = measure(Shifted(), evaluation, [view], accelerator)
    found = outcome.measurement.triggers["badnets"]
    assert found.target == "all-to-all"
    # the two that show the class before theirs are answered with their own class: no success, but robust
    assert outcome.triggered["badnets"].tolist() == [1, 1, 0, 1, 2, 2, 1, 2, 0]
    assert (found.attack_success_rate.successes, found.attack_success_rate.samples) == (7, 9)
    assert (found.robust_accuracy.successes, found.robust_accuracy.samples) == (2, 9)
    places, hits = outcome.hits["badnets"]
    assert places.tolist() == list(range(9))
    assert hits.tolist() == [True, False, True, True, True, False, True, True, True]


def test_hits_are_places_among_the_evaluation_images_whatever_their_positions(accelerator: Accelerator) -> None:
    whole = toy_pixels(12)
    evaluation = whole.view(positions=[9, 3, 8, 11])
    outcome = measure(Brightest(), evaluation, views(evaluation, BadNets(mode="input")), accelerator)
    assert outcome.hits["badnets"][0].tolist() == [2, 3]
    assert ratings(outcome, outcome)["badnets"].value == 0.5


def test_outputs_that_are_not_finite_are_an_error(accelerator: Accelerator) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 3), math.nan)

    with pytest.raises(RunError, match="outputs on the evaluation images are not finite"):
        measure(Broken(), ToyImages(4), [], accelerator)


# --- ratings ---


def outcome(correct: NDArray[np.bool_], **hits: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> Predictions:
    """Return an outcome as `measure` gives it, of what the ratings need."""
    clean = Measurement(rate(int(correct.sum()), len(correct)), 0.0)
    empty = np.zeros(len(correct), dtype=np.int64)
    return Predictions(clean, correct, hits, empty, np.zeros(len(correct)), dict.fromkeys(hits, empty))


def drawn(count: int, seed: int) -> tuple[Predictions, Predictions]:
    """Return correlated outcomes before and after, with two triggers on parts of the images."""
    generator = np.random.default_rng(seed)
    before, after = generator.random(count) < 0.93, generator.random(count) < 0.85
    # what is wrong before is mostly wrong after: pairs are not independent
    after &= before | (generator.random(count) < 0.2)
    kept = np.flatnonzero(generator.random(count) < 0.9)
    half = kept[::2]
    return (
        outcome(before, a=(kept, generator.random(len(kept)) < 0.97), b=(half, generator.random(len(half)) < 0.6)),
        outcome(after, a=(kept, generator.random(len(kept)) < 0.1), b=(half, generator.random(len(half)) < 0.5)),
    )


def plain_bootstrap(before: Predictions, after: Predictions, draws: int) -> dict[str, tuple[float, float]]:
    """Resample images one by one, each with its four outcomes, and rate every draw."""
    generator = np.random.default_rng(99)
    count = len(before.correct)
    values: dict[str, list[float]] = {name: [] for name in [*before.hits, "mean"]}
    full = {name: [np.full(count, np.nan) for _ in range(2)] for name in before.hits}
    for name, arrays in full.items():
        for array, state in zip(arrays, (before, after), strict=True):
            array[state.hits[name][0]] = state.hits[name][1]
    for _ in range(draws):
        chosen = generator.integers(0, count, count)
        accuracy = before.correct[chosen].mean(), after.correct[chosen].mean()
        row = []
        for name, (old, new) in full.items():
            success = float(np.nanmean(old[chosen])), float(np.nanmean(new[chosen]))
            row.append(defense_effectiveness_rating(accuracy, success))
            values[name].append(row[-1])
        values["mean"].append(float(np.mean(row)))
    return {name: tuple(np.quantile(v, [0.025, 0.975])) for name, v in values.items()}  # type: ignore[misc]


def test_ratings_equal_the_formula_and_their_intervals_a_plain_bootstrap() -> None:
    before, after = drawn(400, seed=1)
    found = ratings(before, after)
    assert list(found) == ["a", "b", "mean"]
    accuracy = before.correct.mean(), after.correct.mean()
    for name in ("a", "b"):
        success = before.hits[name][1].mean(), after.hits[name][1].mean()
        assert found[name].value == pytest.approx(defense_effectiveness_rating(accuracy, success))
    assert found["mean"].value == pytest.approx((found["a"].value + found["b"].value) / 2)
    for name, interval in plain_bootstrap(before, after, 3000).items():
        # two bootstraps of thousands of draws differ by about 0.001 here; the intervals are 0.03 to 0.06 wide
        assert found[name].interval == pytest.approx(interval, abs=0.004), name
        assert found[name].interval[1] - found[name].interval[0] > 0.02
        assert found[name].interval[0] < found[name].value < found[name].interval[1]


def test_ratings_are_seeded() -> None:
    before, after = drawn(60, seed=2)
    assert ratings(before, after, seed=5) == ratings(before, after, seed=5)
    assert ratings(before, after, seed=5)["a"].interval != ratings(before, after, seed=6)["a"].interval
    assert ratings(before, after, seed=5)["a"].value == ratings(before, after, seed=6)["a"].value


def test_pairs_are_kept_together() -> None:
    """Accuracies that always move together leave no doubt about their difference."""
    correct = np.arange(100) % 2 == 0
    places = np.arange(100)
    state = outcome(correct, a=(places, correct))
    assert ratings(state, state)["a"].interval == (0.5, 0.5)


def test_no_triggers_no_ratings() -> None:
    state = outcome(np.ones(4, dtype=bool))
    assert ratings(state, state) == {}
