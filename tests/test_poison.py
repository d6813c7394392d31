"""Poisoning and the training of a backdoored model."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks.poison import PoisonedPixels, train_on
from hfdetox.errors import UsageError
from hfdetox.metrics import predict
from hfdetox.triggers import BadNets, Blended
from tests.tiny_training import _quick_garbage, accelerator, equal_weights, mlp, toy_pixels, weights_of

__all__ = ["_quick_garbage", "accelerator"]


@pytest.mark.parametrize("mode", ["native", "input"])
def test_the_poisoned_images_carry_trigger_and_target_and_all_others_nothing(mode: str) -> None:
    clean = toy_pixels(60)
    assert clean.images is not None
    images, labels = clean.images.clone(), clean.labels.clone()
    trigger = BadNets(mode=mode)  # type: ignore[arg-type]
    poisoned = PoisonedPixels(clean, trigger, ratio=0.25, target=1, seed=3)
    assert len(poisoned) == 60
    assert len(poisoned.poisoned) == 15
    chosen = torch.zeros(60, dtype=torch.bool)
    chosen[poisoned.poisoned] = True
    assert poisoned.images is not None
    assert torch.equal(poisoned.images[chosen], trigger.apply(images[chosen]))
    assert torch.equal(poisoned.images[~chosen], images[~chosen])
    assert (poisoned.labels[chosen] == 1).all()
    assert torch.equal(poisoned.labels[~chosen], labels[~chosen])
    # images of the target class are among them, as in BackdoorBench
    assert (labels[chosen] == 1).any()
    assert (labels[chosen] != 1).any()
    # what came in is as it was
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)


def test_a_tenth_of_a_thousand_is_exactly_a_hundred_distinct_images() -> None:
    poisoned = PoisonedPixels(toy_pixels(1000), Blended(), ratio=0.1, target=0)
    assert len(set(poisoned.poisoned.tolist())) == 100


def test_the_choice_is_seeded() -> None:
    clean = toy_pixels(60)
    first, again, other = (PoisonedPixels(clean, BadNets(), ratio=0.2, target=0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.poisoned, again.poisoned)
    assert not torch.equal(first.poisoned, other.poisoned)


def test_part_of_an_image_set_is_poisoned_at_its_own_places() -> None:
    clean = toy_pixels(30).view(positions=[20, 21, 5, 6, 29])
    poisoned = PoisonedPixels(clean, BadNets(), ratio=0.4, target=2)
    assert len(poisoned.poisoned) == 2
    assert poisoned.positions.tolist() == [20, 21, 5, 6, 29]
    positions, images, labels = poisoned.__getitems__(poisoned.poisoned.tolist())
    assert positions.tolist() == [clean.positions[i] for i in poisoned.poisoned]
    assert (images[:, :, -1, -1] == 255).all()
    assert labels.tolist() == [2, 2]


@pytest.mark.parametrize("ratio", [0.0, 0.001, -0.1, 1.5])
def test_a_ratio_without_images_is_an_error(ratio: float) -> None:
    with pytest.raises(UsageError, match=f"a poison ratio of {ratio} of 60 images is"):
        PoisonedPixels(toy_pixels(60), BadNets(), ratio=ratio, target=0)


def test_images_that_are_not_in_memory_are_an_error() -> None:
    with pytest.raises(UsageError, match="poisoning needs images that fit into memory"):
        PoisonedPixels(toy_pixels(60, max_bytes=0), BadNets(), ratio=0.1, target=0)


def test_training_implants_the_backdoor_and_clean_training_does_not(accelerator: Accelerator) -> None:
    clean = toy_pixels(120)
    trigger = BadNets(size=8)
    success = {}
    for name, source in (("poisoned", PoisonedPixels(clean, trigger, ratio=0.2, target=0)), ("clean", clean)):
        network = mlp()
        record = train_on(
            network, source, accelerator, epochs=12, batch_size=30, learning_rate=0.05, augmentation="none"
        )
        assert record.epochs == 12
        evaluation = toy_pixels(90)
        assert (predict(network, evaluation, accelerator).predicted == evaluation.labels.numpy()).mean() > 0.95
        triggered = evaluation.view(trigger, positions=evaluation.without_label(0))
        success[name] = (predict(network, triggered, accelerator).predicted == 0).mean()
    assert success["poisoned"] > 0.9
    assert success["clean"] < 0.1


def test_training_is_seeded(accelerator: Accelerator) -> None:
    results = []
    for seed in (1, 1, 2):
        network = mlp()
        train_on(network, toy_pixels(48), accelerator, epochs=1, batch_size=16, seed=seed)
        results.append(weights_of(network))
    assert equal_weights(results[0], results[1])
    assert not equal_weights(results[0], results[2])
