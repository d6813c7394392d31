"""What a run measures on: targets, views, and the checks that stop a run whose numbers would mean nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.data.images import ImageSet
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.evaluator import Evaluator, check_plausible, prepare_evaluator, resolve_target
from hfdetox.evaluation.metrics import Predictions, rate
from hfdetox.evaluation.results import Measurement
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.triggers import BadNets, Trigger
from tests.tiny_training import _quick_garbage, accelerator, toy_preprocessing, toy_set

__all__ = ["_quick_garbage", "accelerator"]

NAMES = ("cat", "1", "dog")


class Backdoored(nn.Module):
    """Answers the brightest channel, and class 2 where the last pixel is white."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = torch.eye(3) * 20

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stamped = (images[:, :, -1, -1] > 0.999).all(1)
        return self.head(images.mean((2, 3))) + 100 * stamped[:, None] * torch.tensor([0.0, 0.0, 1.0])


def classifier() -> Classifier:
    """Return a classifier with a backdoor to `dog`."""
    return load_classifier(Backdoored(), preprocessing=toy_preprocessing(), labels=NAMES)


def prepared(
    accelerator: Accelerator, triggers: Sequence[Trigger], *, target: str | None = None, images: ImageSet | None = None,
    warned: list[str] | None = None,
) -> Evaluator:  # fmt: skip
    """Prepare an evaluation on twelve images, four of each class."""
    notes: list[str] = [] if warned is None else warned
    return prepare_evaluator(
        classifier(), images or toy_set(12), triggers, accelerator, target=target, warn=notes.append, progress=False
    )


# --- targets ---


@pytest.mark.parametrize(
    ("target", "index"),
    [
        ("dog", 2), ("DOG", 2), ("cat", 0), (2, 2), (0, 0), (None, 0), ("0", 0), ("2", 2),
        # the label named 1 is also label number 1
        ("1", 1), (1, 1),
        ("all-to-all", "all-to-all"), ("All-to-All", "all-to-all"),
    ],
)  # fmt: skip
def test_targets(target: str | int | None, index: int | str) -> None:
    assert resolve_target(target, NAMES) == index


def test_a_labels_name_wins_over_an_index() -> None:
    labels = ("2", "1", "0")
    assert resolve_target("2", labels) == 0
    assert resolve_target(2, labels) == 2
    assert resolve_target("all-to-all", ["cat", "all-to-all"]) == 1


@pytest.mark.parametrize("target", ["bird", "3", "-1", 3, -1, "", "1.0"])
def test_an_unknown_target_lists_the_labels(target: str | int) -> None:
    message = f"target {target!r} is neither a label (cat, 1, dog), nor an index from 0 to 2, nor all-to-all"
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve_target(target, NAMES)


def test_an_unknown_target_of_many_labels_lists_the_first() -> None:
    with pytest.raises(UsageError, match=r"\(l0, l1, .*, l9 and 990 more\), nor an index from 0 to 999"):
        resolve_target("bird", [f"l{i}" for i in range(1000)])


# --- views ---


def test_a_view_leaves_out_the_images_of_its_target_and_carries_the_trigger(accelerator: Accelerator) -> None:
    evaluation = prepared(accelerator, [BadNets(target="dog"), BadNets(name="late", mode="input", target=1)])
    native, late = evaluation.views
    assert (native.target, late.target) == (2, 1)
    assert native.trigger.target == 2
    assert native.source.positions.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert native.source.labels.tolist() == [0, 1] * 4
    assert late.source.positions.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    # 8 pixels high: the patch of 3 is one pixel
    assert native.source.images is not None
    assert evaluation.clean.images is not None
    assert (native.source.images[:, :, -1, -1] == 255).all()
    unstamped = torch.ones(8, 8, dtype=torch.bool)
    unstamped[-1, -1] = False
    clean = evaluation.clean.images[native.source.positions]
    assert torch.equal(native.source.images[..., unstamped], clean[..., unstamped])
    # the same images clean and triggered, for the measurement keeps nothing back
    assert len(evaluation.clean) == 12


def test_an_all_to_all_trigger_is_put_on_every_image(accelerator: Accelerator) -> None:
    evaluation = prepared(accelerator, [BadNets()], target="all-to-all")
    (view,) = evaluation.views
    assert view.target == view.trigger.target == "all-to-all"
    assert view.source.positions.tolist() == list(range(12))
    # the true classes are 0, 1, 2 in turn
    assert view.wanted().tolist() == [1, 2, 0] * 4
    # this model answers `dog` (2) to every patch: what class 1 moves to, and class 2's own label
    result = evaluation.measure("before").measurement.triggers["badnets"]
    assert (result.attack_success_rate.successes, result.attack_success_rate.samples) == (4, 12)
    assert (result.robust_accuracy.successes, result.robust_accuracy.samples) == (4, 12)


def test_before_and_after_are_measured_on_the_same_images(accelerator: Accelerator) -> None:
    evaluation = prepared(accelerator, [BadNets()], target="dog")
    before = evaluation.measure("before")
    assert before.measurement.accuracy.value == 1
    result = before.measurement.triggers["badnets"]
    assert (result.attack_success_rate.value, result.robust_accuracy.value) == (1, 0)
    again = evaluation.measure("again")
    assert again.measurement == before.measurement
    # another model in the same place is what is measured afterwards
    evaluation.classifier.model.head.weight.data.neg_()  # type: ignore[union-attr, operator]
    assert evaluation.measure("after").measurement.accuracy.value == 0


def test_a_triggers_own_target_wins_over_the_runs(accelerator: Accelerator) -> None:
    warned: list[str] = []
    evaluation = prepared(accelerator, [BadNets(target=1), BadNets(name="b")], target="dog", warned=warned)
    assert [view.target for view in evaluation.views] == [1, 2]
    assert warned == []


def test_without_any_target_label_0_is_taken_and_said(accelerator: Accelerator) -> None:
    warned: list[str] = []
    (view,) = prepared(accelerator, [BadNets()], warned=warned).views
    assert view.target == 0
    assert warned == ["trigger badnets names no target; label 0 (cat) is taken, see --target"]


def test_only_images_of_the_target_is_an_error(accelerator: Accelerator) -> None:
    images = toy_set(12).subset([2, 5, 8, 11])
    with pytest.raises(UsageError, match="every evaluation image is of the target class 'dog'; trigger badnets cannot"):
        prepared(accelerator, [BadNets(target="dog")], images=images)
    assert len(prepared(accelerator, [BadNets(target="cat")], images=images).views) == 1


class Nothing(BadNets):
    """A trigger that stamps the pixel that is there."""

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return images.clone()


@pytest.mark.parametrize("mode", ["native", "input"])
def test_a_trigger_that_changes_nothing_is_an_error(mode: str, accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="trigger badnets changes no pixel of the images the model sees"):
        prepared(accelerator, [Nothing(target=0, mode=mode)])  # type: ignore[arg-type]


class StampsClass1(BadNets):
    """A trigger that changes nothing but images that are brightest in channel 1."""

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        second = images.float().mean((2, 3)).argmax(1) == 1
        return torch.where(second[:, None, None, None], super().apply(images), images)


def test_a_trigger_that_changes_a_few_images_only_is_measured(accelerator: Accelerator) -> None:
    images = toy_set(600)
    # class 1 comes last, behind 200 images that do not change
    order = sorted(range(600), key=lambda i: i % 3 == 1)
    evaluation = prepared(accelerator, [StampsClass1(target=0)], images=images.subset(order))
    (found,) = evaluation.visibility().values()
    # the images of class 0 are left out, of the others half change
    assert found.changed == 0.5
    assert evaluation.measure("before").measurement.triggers["badnets"].attack_success_rate.samples == 400


def test_a_trigger_that_does_not_fit_is_an_error(accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match="does not fit an image of 8×8"):
        prepared(accelerator, [BadNets(size=64, target=0)])


# --- plausibility ---


def answered(predicted: list[int], truth: list[int]) -> Predictions:
    """Return an outcome with these answers."""
    labels = np.array(predicted)
    correct = labels == np.array(truth)
    return Predictions(
        Measurement(rate(int(correct.sum()), len(correct)), 1.0), correct, {}, labels, np.zeros(len(labels)), {}
    )


def check(predicted: list[int], truth: list[int], count: int = 10) -> list[str]:
    """Return the warnings about a model with `count` labels."""
    warned: list[str] = []
    check_plausible(answered(predicted, truth), torch.tensor(truth), [str(i) for i in range(count)], warned.append)
    return warned


TRUTH = [i % 10 for i in range(200)]


def test_a_good_model_passes_in_silence() -> None:
    assert check(TRUTH, TRUTH) == []
    # 60 % right, the rest one label away
    assert check([t if i % 5 < 3 else (t + 1) % 10 for i, t in enumerate(TRUTH)], TRUTH) == []


@pytest.mark.parametrize("answer", [0, 7])
def test_a_model_that_always_says_the_same_is_near_chance(answer: int) -> None:
    with pytest.raises(
        RunError, match=r"accuracy on the clean images is 10\.0%, near chance \(10\.0%\): its labels or its"
    ):
        check([answer] * 200, TRUTH)


def test_random_answers_are_near_chance_and_no_order_of_labels_is_suggested() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(RunError, match="near chance") as caught:
        check(generator.integers(0, 10, 200).tolist(), TRUTH)
    assert "permuted" not in str(caught.value)


@pytest.mark.parametrize(("images", "right", "said"), [(6, 3, r"50\.0%"), (4, 2, r"50\.0%"), (10, 4, r"40\.0%")])
def test_few_images_say_that_they_are_few(images: int, right: int, said: str) -> None:
    truth = [i % 5 for i in range(images)]
    answers = [t if i < right else (t + 1) % 5 for i, t in enumerate(truth)]
    with pytest.raises(
        RunError, match=rf"{said}, but on {images} images that cannot be told from chance \(20\.0%\); mea"
    ):
        check(answers, truth, count=5)


@pytest.mark.parametrize(("count", "right"), [(3, 3), (2, 2), (5, 3)])
def test_few_images_are_a_warning_where_nothing_trains(count: int, right: int) -> None:
    truth, warned = list(range(count)), list[str]()
    answers = [t if t < right else (t + 1) % count for t in truth]
    labels = [str(i) for i in truth]
    check_plausible(answered(answers, truth), torch.tensor(truth), labels, warned.append, trains=False)
    assert [f"on {count} images that cannot be told from chance" in line for line in warned] == [True]
    with pytest.raises(RunError, match="near chance"):
        check_plausible(answered([0] * 200, TRUTH), torch.tensor(TRUTH), list("abcdefghij"), print, trains=False)


def test_permuted_labels_are_recognised() -> None:
    with pytest.raises(RunError, match=r"is 0\.0%, near chance .*in another order it would reach 100\.0%.*--label-map"):
        check([(t + 3) % 10 for t in TRUTH], TRUTH)


def test_some_permuted_labels_are_a_warning() -> None:
    swapped = {7: 8, 8: 9, 9: 7}
    (warning,) = check([swapped.get(t, t) for t in TRUTH], TRUTH)
    assert "is 70.0%; with its labels in another order it would reach 100.0%" in warning


def test_chance_depends_on_the_number_of_labels() -> None:
    truth = [i % 2 for i in range(100)]
    half = [0] * 100
    with pytest.raises(RunError, match=r"50\.0%, near chance \(50\.0%\)"):
        check(half, truth, count=2)
    # the same answers of a model that knows a hundred labels are far from chance
    assert check(half, truth, count=100) == []


def test_answers_that_are_no_numbers_blame_the_training_after_it(accelerator: Accelerator) -> None:
    evaluation = prepared(accelerator, [BadNets(target="dog")])
    with torch.no_grad():
        next(iter(evaluation.classifier.model.parameters())).fill_(float("inf"))
    with pytest.raises(RunError, match="are not finite numbers; its weights or its preprocessing are broken"):
        evaluation.measure_plausible("before", print)
    for title in ("after", "monitor"):
        with pytest.raises(RunError, match="not finite numbers; training was unstable: try a lower learning rate"):
            evaluation.measure(title)
