"""Unlearn: who is accused, what carries which trigger in which strength, when is searched, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses import _unlearning, parse_defense
from hfdetox.defenses._unlearning import Unlearning, hardly_found
from hfdetox.defenses.unlearn import UnlearnConfig
from hfdetox.errors import UsageError
from hfdetox.models.network import Network
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Pass, Phase
from hfdetox.training.shift import HeadInputs
from hfdetox.training.statistics import Statistics, measured_layers
from tests.defenses.pixels import linear, pixel_convnet
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, one_batch, run
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, mlp, toy_preprocessing

__all__ = ["_quick_garbage", "accelerator"]

SMALL = {"epochs": 3, "min_steps": 0, "batch_size": 24, "augmentation": "none", "blend_steps": 3, "patch_steps": 3}
NONE = torch.empty(0, dtype=torch.int64)
TEN = [[float(row == column) for column in range(10)] for row in range(10)]


def small(**settings: object) -> UnlearnConfig:
    """Return a configuration for toy images."""
    return UnlearnConfig(**{**SMALL, **settings})  # type: ignore[arg-type]


def head(lengths: list[float]) -> HeadInputs:
    """Return a head of ten classes, each with an axis of its own, on images that are sure of their class.

    Where a class's weight is long, little of its axis sends every image there.
    """
    features = 10 * torch.eye(10)
    return HeadInputs("1", torch.diag(torch.tensor(lengths)), torch.zeros(10), features, torch.arange(10))


@pytest.mark.parametrize(
    ("lengths", "accused", "outliers"),
    [
        ([1, 1.02, 0.98, 1.01, 0.99, 5, 1.03, 0.97, 1.04, 1], [5], 1),
        ([1, 1.02, 0.98, 6, 0.99, 5, 1.03, 0.97, 1.04, 1], [3, 5], 2),
        # nobody stands out: the two lowest
        ([1, 1.02, 0.98, 1.01, 0.99, 1.05, 1.03, 0.97, 1.04, 1], [5, 8], 0),
        # never more than four
        ([9, 8, 7, 6, 5, 1, 1.01, 1.02, 1.03, 1.04], [0, 1, 2, 3], 4),
    ],
)
def test_the_classes_that_are_easily_reached_are_accused(
    lengths: list[float], accused: list[int], outliers: int
) -> None:
    unlearning = Unlearning(linear(TEN), small(accused_below=-2.5 if outliers < 4 else -0.1))
    whole = head(lengths)
    # of two processes, or two batches
    parts = [HeadInputs("1", whole.weight, whole.bias, whole.features[at], whole.labels[at])
             for at in (slice(6), slice(6, 10))]  # fmt: skip
    found = unlearning._score([[part] for part in parts], NONE)
    assert sorted(unlearning.accused.tolist()) == sorted(accused)
    assert found["outliers"] == outliers
    assert found["score_0"] <= found["score_1" if len(accused) > 1 else "score_0"] <= found["others"]


def test_a_class_that_the_head_prefers_is_accused_and_speaks_for_a_backdoor() -> None:
    even = head([1, 1.02, 0.98, 1.01, 0.99, 1, 1.03, 0.97, 1.04, 1])
    unlearning = Unlearning(linear(TEN), small())
    found = unlearning._score([[even]], NONE)
    assert (found["outliers"], unlearning.evident, "probed" in found) == (0, False, False)
    # a bias that few images meet, for they are sure, and that random features all do
    preferred = replace(even, bias=8 * torch.eye(10)[4])
    unlearning = Unlearning(linear(TEN), small(accused_below=-100.0))
    found = unlearning._score([[preferred]], NONE)
    assert (unlearning.accused.tolist(), unlearning.evident, found["probed"]) == ([4], True, 4)
    assert found["probed_share"] > 0.9
    look = {"phase": "unlearn-look", "epochs": 3, "steps": 6, "adamw": 0, "augmented": 0, "accuracy": 1.0,
            "accuracy_augmented": 1.0, "accused_0": 4}  # fmt: skip
    said = small(accused_below=-100.0).choices([{**look, **found}])[0]
    assert "no class was accused by the latent shift; the head gives " in said
    assert "% of random features to class 4" in said


@pytest.mark.parametrize(("biased", "evident"), [(3, False), (5, True)])
def test_a_low_latent_shift_speaks_for_a_backdoor_where_the_head_names_the_same_class(
    biased: int, evident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_unlearning, "_PROBED", 100.0)
    lengths = [1, 1.02, 0.98, 1.01, 0.99, 5, 1.03, 0.97, 1.04, 1]
    preferring = replace(head(lengths), bias=20 * torch.eye(10)[biased], features=100 * torch.eye(10))
    unlearning = Unlearning(linear(TEN), small())
    assert unlearning._score([[preferring]], NONE)["score_0"] < _unlearning._SURE
    assert 5 in unlearning.accused
    assert unlearning.evident == evident


def test_with_few_classes_the_head_accuses_none() -> None:
    unlearning = Unlearning(linear([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), small())
    one = HeadInputs("1", torch.eye(3), torch.tensor([0.0, 5.0, 0.0]), 10 * torch.eye(3), torch.arange(3))
    assert "probed" not in unlearning._score([[one]], NONE)


def test_a_class_that_the_model_hardly_finds_is_accused_first_and_speaks_for_a_backdoor() -> None:
    unlearning = Unlearning(linear(TEN), small())
    found = unlearning._score([[head([1, 1.02, 0.98, 1.01, 0.99, 5, 1.03, 0.97, 1.04, 1])]], torch.tensor([7]))
    assert unlearning.accused.tolist() == [7, 5]
    assert unlearning.evident
    assert (found["outliers"], found["hidden"]) == (2, 1)
    look = {"phase": "unlearn-look", "epochs": 3, "steps": 6, "adamw": 0, "augmented": 0, "accuracy": 1.0,
            "accuracy_augmented": 1.0, "accused_0": 7, "accused_1": 5}  # fmt: skip
    said = small().choices([{**look, **found}])
    assert "of class 7 the model hardly finds its clean images" in said[0]


@pytest.mark.parametrize(
    ("right", "counts", "hidden"),
    [
        # half of the median's share is not below it
        ([90, 80, 40, 39, 85], [100] * 5, [3]),
        ([90, 80, 10, 5, 85], [100] * 5, [3, 2]),
        # nine images say nothing, none say nothing
        ([90, 80, 0, 0, 85], [100, 100, 9, 0, 100], []),
        ([0, 1], [3, 3], []),
        # a poor model is poor on all
        ([20, 12, 11, 30], [100] * 4, []),
    ],
)
def test_who_is_hardly_found(right: list[int], counts: list[int], hidden: list[int]) -> None:
    assert hardly_found(torch.tensor(right), torch.tensor(counts)).tolist() == hidden


def test_a_class_far_below_the_others_speaks_for_a_backdoor() -> None:
    for length, evident in ((5.0, True), (1.05, False)):
        unlearning = Unlearning(linear(TEN), small())
        unlearning._score([[head([1, 1.02, 0.98, 1.01, 0.99, length, 1.03, 0.97, 1.04, 1])]], NONE)
        assert unlearning.evident == evident


@pytest.mark.parametrize(("weight", "evident"), [(20.0, True), (0.5, False)])
def test_a_faint_blend_that_leads_nearly_all_images_speaks_for_a_backdoor(
    weight: float, evident: bool, accelerator: Accelerator
) -> None:
    # the second pixel says class 1, as loudly as it weighs; the first one says class 0 on all images
    unlearning = Unlearning(linear([[1.0, 0.0], [0.0, weight]]), small(alphas=(0.2, 0.08), blend_steps=30))
    unlearning.accused, unlearning.evident, unlearning.images = torch.tensor([1]), False, 40
    unlearning._kept = [torch.tensor([200, 0], dtype=torch.uint8).expand(40, 1, 1, 2)]
    found = unlearning._reconstruct(accelerator)
    assert (unlearning.evident, found["evident"]) == (evident, float(evident))
    assert found["led_1"] == float(evident)


@pytest.mark.parametrize(("size", "evident"), [(60, True), (20, False)])
def test_a_small_patch_that_leads_nearly_all_images_speaks_for_a_backdoor(
    size: int, evident: bool, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first pixel says class 1, loudly, and two thirds of it are enough; a blend of 1 % is not
    monkeypatch.setattr(_unlearning, "_SMALL", 0.018)
    unlearning = Unlearning(linear([[0.0] * (size - 1) + [1.0], [5.0, *[0.0] * (size - 1)]]),
                            small(alphas=(0.01,), patch_steps=150))  # fmt: skip
    unlearning.accused, unlearning.evident, unlearning.images = torch.tensor([1]), False, 40
    unlearning._kept = [torch.tensor([0] * (size - 1) + [255], dtype=torch.uint8).expand(40, 1, 1, size)]
    found = unlearning._reconstruct(accelerator)
    assert found["led_1"] == 0
    assert found["mask_norm_1"] < 1.5
    assert unlearning.evident == evident


def test_where_nothing_speaks_for_a_backdoor_half_as_many_carry_and_blends_are_faint() -> None:
    unlearning = holding(share=0.6)
    unlearning.evident = False
    torch.manual_seed(0)
    found, carry = unlearning.stamped(torch.zeros(3000, 1, 1, 2, dtype=torch.uint8))
    # 900 expected, deviation 25
    assert 800 < int(carry.sum()) < 1000
    blended = found[:, 0, 0, 1][carry & (found[:, 0, 0, 1] > 0)]
    assert (float(blended.min()), float(blended.max())) == (pytest.approx(12.75, abs=1), pytest.approx(25.5, abs=1))


def test_where_none_is_accused_the_classes_that_faint_blends_lead_to_are(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each pixel speaks for a class of its own, pixel 4 and pixel 1 loudest; the first one is bright on all images
    monkeypatch.setattr(_unlearning, "_FAINT", 0.1)
    loud = [1.0, 4.0, 1.0, 1.0, 60.0]
    unlearning = Unlearning(linear([[loud[row] * (row == column) for column in range(5)] for row in range(5)]), small())
    unlearning.screened, unlearning.evident, unlearning.images = torch.tensor([2, 1, 3, 4]), False, 40
    unlearning._kept = [torch.tensor([200, 0, 0, 0, 0], dtype=torch.uint8).expand(40, 1, 1, 5)]
    found = unlearning._reconstruct(accelerator)
    assert unlearning.accused.tolist()[0] == 4
    assert len(unlearning.accused) == 2
    assert (found["screened_0"], found["faint_0"]) == (4, 1)
    assert {name for name in found if name.startswith("led_")} == {f"led_{label}" for label in unlearning.accused}
    assert len(unlearning.masks) == 2


def holding(**settings: object) -> Unlearning:
    """Return one that has found a patch on the first pixel and a blend, for images of two pixels."""
    unlearning = Unlearning(linear([[1.0, 0.0], [0.0, 1.0]]), small(**settings))
    unlearning.masks, unlearning.patches = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.4, 0.4]]]])
    unlearning.blends = torch.tensor([[[[1.0, 1.0]]]])
    return unlearning


def test_a_share_carries_a_patch_as_it_is_or_a_blend_in_any_strength() -> None:
    images = torch.zeros(3000, 1, 1, 2, dtype=torch.uint8)
    torch.manual_seed(0)
    found, carry = holding(share=0.3).stamped(images)
    first, second = found[:, 0, 0, 0], found[:, 0, 0, 1]
    assert not images.any()
    assert not found[~carry].any()
    # 900 expected, deviation 25
    assert 800 < int(carry.sum()) < 1000
    patched, blended = carry & (second == 0), carry & (second > 0)
    assert first[patched].unique().tolist() == pytest.approx([102])
    # half of them each; a blend is the same on both pixels, between 0.05 and 0.25 of white
    assert 350 < int(patched.sum()) < 550
    assert torch.equal(first[blended], second[blended])
    low, high = float(first[blended].min()), float(first[blended].max())
    assert (low, high) == (pytest.approx(0.05 * 255, abs=1), pytest.approx(0.25 * 255, abs=1))


@pytest.mark.parametrize(
    ("epochs", "rounds", "after"), [(3, 2, [1, 2]), (12, 2, [4, 8]), (2, 2, [1]), (1, 2, []), (5, 0, [])]
)
def test_it_searches_again_evenly_between_the_epochs(epochs: int, rounds: int, after: list[int]) -> None:
    unlearning = holding(rounds=rounds)
    unlearning.epochs = epochs
    # before the first epoch, and after each
    assert [ended for ended in range(epochs + 1) if unlearning.after_epoch()] == after


def test_triggers_are_found_for_each_accused_class_and_in_each_round(accelerator: Accelerator) -> None:
    config = small(classes=("2", "0"), alphas=(0.1, 0.3))
    record = run(config, pixel_convnet(), accelerator)
    assert [entry["phase"] for entry in record.history] == ["unlearn-look", "unlearn-search", *["unlearn"] * 3]
    _, first, *rounds = record.history
    # 3 steps of all of the 48 images, there and back, for two classes: a patch and two blends, then one blend
    assert first["passes"] == 3 * 2 * 2 * 3 * 48
    # the statistics of BatchNorm take the images once more
    assert [entry.get("passes") for entry in rounds] == [2 * 2 * 3 * 48, 2 * 2 * 3 * 48, 48]
    assert {name for name in first if name.startswith("mask_norm")} == {"mask_norm_2", "mask_norm_0"}


def test_the_weights_are_the_mean_of_later_steps_and_the_statistics_theirs(accelerator: Accelerator) -> None:
    config, network = small(classes=("1",)), pixel_convnet()
    phases = config.phases(network)
    phase = phases[-1]
    count, seen = after_step_of(phase), list[torch.Tensor]()

    def note() -> None:
        count()
        seen.append(next(network.parameters()).detach().clone())

    phase.after_step = note  # type: ignore[union-attr]
    Engine(accelerator, ToyImages(), seed=0).run(network, phases)
    # six steps, of which the last four count
    assert len(seen) == 6
    assert torch.allclose(next(network.parameters()), torch.stack(seen[2:]).mean(0))
    after = [layer.running_mean.clone() for layer in measured_layers(network) if layer.running_mean is not None]
    assert after
    statistics = Statistics(network)
    with torch.no_grad():
        statistics.on_batch(network, one_batch())
    for layer, mean in zip(measured_layers(network), after, strict=True):
        assert torch.allclose(layer.running_mean, mean, atol=1e-6)  # type: ignore[arg-type]


def after_step_of(phase: Phase | Pass) -> Callable[[], None]:
    """Return what a training phase does after each step."""
    assert isinstance(phase, Phase)
    assert phase.after_step is not None
    return phase.after_step


def test_few_images_get_more_epochs(accelerator: Accelerator) -> None:
    record = run(small(min_steps=9, classes=("0",)), pixel_convnet(), accelerator)
    # two steps an epoch
    assert record.epochs == 5
    assert (record.history[0]["epochs"], record.history[0]["steps"]) == (5, 10)


def test_seeds_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_repeatable_and_tidy(small(), pixel_convnet, accelerator)  # type: ignore[arg-type]
    assert_resumes(small(), pixel_convnet, accelerator, tmp_path, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("optimizer", "normed", "expected"), [
    ("auto", True, torch.optim.SGD), ("auto", False, torch.optim.AdamW),
    ("sgd", False, torch.optim.SGD), ("adamw", True, torch.optim.AdamW),
])  # fmt: skip
def test_networks_without_batch_norm_are_trained_by_adamw(
    optimizer: str, normed: bool, expected: type[torch.optim.Optimizer]
) -> None:
    body = mlp().model
    assert isinstance(body, nn.Module)
    network = pixel_convnet() if normed else Network(body, toy_preprocessing()).eval()
    phase = small(optimizer=optimizer).phases(network)[-1]
    made = phase.optimizer(list(network.parameters()))  # type: ignore[union-attr]
    assert type(made) is expected


def test_what_it_chose_is_said(accelerator: Accelerator) -> None:
    config = small(augmentation="flip")
    record = run(config, pixel_convnet(), accelerator)
    accused, *gently, length, optimizer, augmentation = config.choices(record.history)
    assert len(gently) == (record.history[1]["evident"] == 0)
    assert accused.startswith("Taken as possible targets: class ")
    assert "no class was accused by the latent shift" in accused
    assert length == "3 epochs, 6 steps: at least 3 epochs and 0 steps."
    assert optimizer == ("SGD trained the network; its weights are the mean of those of the last two thirds of the "
                         "steps.")  # fmt: skip
    assert augmentation.startswith(("Augmentation flip: ", "Augmentation none: "))
    named = small(classes=("1",))
    record = run(named, pixel_convnet(), accelerator)
    assert named.choices(record.history)[0] == "Taken as possible targets, as the settings say: class 1."


def test_a_model_that_flips_confuse_is_not_trained_with_them(accelerator: Accelerator) -> None:
    config = small(augmentation="flip", classes=("0",))
    phase = config.phases(pixel_convnet())[-1]
    unlearning = phase.state
    assert isinstance(unlearning, Unlearning)
    for mirrored, expected in ((88, "none"), (89, "flip")):
        unlearning.images, unlearning._right = 100, [90, mirrored]
        unlearning._accuse(accelerator)
        assert phase.augmentation == expected  # type: ignore[union-attr]


class Squared(nn.Module):
    """Gives logits that are no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -self.head(images.flatten(1))


def test_a_head_that_is_not_linear_asks_for_the_classes(accelerator: Accelerator) -> None:
    network = Network(Squared(), toy_preprocessing()).eval()
    with pytest.raises(UsageError, match=r"unlearn: .*; name the classes .* classes=0,3") as said:
        run(small(), network, accelerator)
    assert "\n" not in str(said.value)
    record = run(small(classes=("1",)), network, accelerator)
    assert record.epochs == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": "0,7"}, "this model has the classes 0 to 2, and classes names 7"),
        ({"classes": "0,0"}, "classes must be different indices"),
        ({"classes": "cat"}, "classes must be different indices"),
        ({"alphas": ""}, "alphas must be"),
        ({"alphas": "0.1,1"}, "alphas must be one or more shares between 0 and 1"),
        ({"accused_below": "0"}, "accused_below must be"),
        ({"share": "1"}, "share must be"),
        ({"reweight": "class"}, "unlearn: reweight looks at the network .*; leave reweight out"),
    ],
)
def test_wrong_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_defense("unlearn", settings)[0].phases(pixel_convnet())
