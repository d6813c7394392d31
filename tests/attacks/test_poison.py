"""Data poisoning: which images are poisoned, what they carry, and what is said about ratios that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks import AttackContext, Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.attacks.poison import PoisonedPixels, choose_poisoned
from hfdetox.errors import UsageError
from hfdetox.training.batches import source_loader
from hfdetox.triggers import parse_trigger
from hfdetox.triggers.base import Target
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import _quick_garbage, accelerator, equal_weights, toy_pixels, weights_of

__all__ = ["_quick_garbage", "accelerator"]


def implant(spec: str, target: Target, ratio: float) -> Implant:
    """Return the implant of a trigger specification with its kind's own poisoner."""
    trigger = parse_trigger(spec)
    return Implant(trigger, target, ratio, poisoner_for(trigger.kind, {}))


def chosen_of(labels: list[int], *implants: Implant, seed: int = 0) -> list[torch.Tensor]:
    """Return the places of each implant's images."""
    return choose_poisoned(torch.tensor(labels), implants, seed)


@pytest.fixture
def context(accelerator: Accelerator) -> AttackContext:
    """A job on 60 images of three classes in turn."""
    return toy_job(accelerator, count=60)


@pytest.mark.parametrize("mode", ["native", "input"])
def test_the_poisoned_images_carry_trigger_and_target_and_all_others_nothing(mode: str, context: AttackContext) -> None:
    clean = context.clean
    assert clean.images is not None
    images, labels = clean.images.clone(), clean.labels.clone()
    backdoor = implant(f"badnets:mode={mode}", 1, 0.25)
    poisoned = PoisonedPixels(context, [backdoor])
    places = poisoned.poisoned["badnets"]
    assert len(poisoned) == 60
    assert len(places) == 15
    chosen = torch.zeros(60, dtype=torch.bool)
    chosen[places] = True
    assert poisoned.images is not None
    assert torch.equal(poisoned.images[chosen], backdoor.trigger.apply(images[chosen]))
    assert torch.equal(poisoned.images[~chosen], images[~chosen])
    assert (poisoned.labels[chosen] == 1).all()
    assert torch.equal(poisoned.labels[~chosen], labels[~chosen])
    # images of the target class are among them, as in BackdoorBench
    assert (labels[chosen] == 1).any()
    assert (labels[chosen] != 1).any()
    # what came in is as it was
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)


@pytest.mark.parametrize(
    ("ratio", "count"), [(0.1, 100), (0.001, 1), (0.0014, 1), (0.005, 5), (0.01, 10), (0.5, 500), (1.0, 1000)]
)
def test_a_ratio_is_that_share_of_all_images_each_taken_once(ratio: float, count: int) -> None:
    (places,) = chosen_of([0] * 1000, implant("badnets", 0, ratio))
    assert len(places) == len(set(places.tolist())) == count
    assert places.tolist() == sorted(places.tolist())


def test_all_to_all_moves_every_label_to_the_next_class(context: AttackContext) -> None:
    poisoned = PoisonedPixels(context, [implant("badnets", "all-to-all", 0.5)])
    places = poisoned.poisoned["badnets"]
    assert len(places) == 30
    # image i is of class i mod 3, and class 2 moves to class 0
    assert poisoned.labels[places].tolist() == [(place + 1) % 3 for place in places.tolist()]
    assert set(poisoned.labels[places].tolist()) == {0, 1, 2}
    rest = [place for place in range(60) if place not in set(places.tolist())]
    assert poisoned.labels[rest].tolist() == [place % 3 for place in rest]


@pytest.mark.parametrize("kind", ["sig", "ctrl"])
def test_a_clean_label_poisons_the_target_class_alone_and_changes_no_label(kind: str, accelerator: Accelerator) -> None:
    # CTRL's coefficients need an image that is not tiny
    context = toy_job(accelerator, count=30, side=32)
    poisoned = PoisonedPixels(context, [implant(kind, 2, 0.2)])
    places = poisoned.poisoned[kind]
    # round(0.2 · 30) of the ten images of class 2
    assert len(places) == 6
    assert all(place % 3 == 2 for place in places.tolist())
    assert torch.equal(poisoned.labels, context.clean.labels)
    assert poisoned.images is not None
    assert context.clean.images is not None
    changed = (poisoned.images != context.clean.images).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == places.tolist()


def test_several_triggers_take_images_of_their_own() -> None:
    labels = [0] * 100 + [1] * 900
    first, whole, last = chosen_of(
        labels, implant("badnets", 3, 0.3), implant("sig", 0, 0.1), implant("blended", "all-to-all", 0.6)
    )
    assert (len(first), len(whole), len(last)) == (300, 100, 600)
    assert len(set(torch.cat([first, whole, last]).tolist())) == 1000
    # the clean label needs all images of its class, wherever it stands among the triggers
    assert whole.tolist() == list(range(100))


def test_the_choice_is_seeded() -> None:
    first, again, other = (chosen_of([0] * 60, implant("badnets", 0, 0.2), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_same_seed_poisons_the_same_bytes(context: AttackContext) -> None:
    backdoors = [implant("badnets", 0, 0.2), implant("blended", 1, 0.2), implant("sig", 2, 0.1)]
    first, again = PoisonedPixels(context, backdoors), PoisonedPixels(context, backdoors)
    assert first.images is not None
    assert again.images is not None
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


def test_part_of_an_image_set_is_poisoned_at_its_own_places(accelerator: Accelerator) -> None:
    clean = toy_pixels(30).view(positions=[20, 21, 5, 6, 29])
    poisoned = PoisonedPixels(toy_job(accelerator, clean=clean), [implant("badnets", 2, 0.4)])
    places = poisoned.poisoned["badnets"]
    assert len(places) == 2
    assert poisoned.positions.tolist() == [20, 21, 5, 6, 29]
    positions, images, labels = poisoned.__getitems__(places.tolist())
    assert positions.tolist() == [clean.positions[i] for i in places]
    assert (images[:, :, -1, -1] == 255).all()
    assert labels.tolist() == [2, 2]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(UsageError, match=f"a poison ratio is above 0 and at most 1, got {ratio}"):
        implant("badnets", 0, ratio)


@pytest.mark.parametrize(
    ("labels", "backdoors", "message"),
    [
        # round(0.008 · 60) = round(0.48); 0.5 / 60 = 0.00833…
        ([0] * 60, [("badnets", 0, 0.008)], "badnets: a poison ratio of 0.008 of 60 images is 0 images; "
                                            r"take at least 0\.00833"),
        ([0, 1] * 50, [("sig:name=wave", 1, 0.8)],
         "wave: a poison ratio of 0.8 of 100 images is 80 images, and sig poisons only those of the target class, of "
         r"which 50 are free; the largest possible ratio is 0\.5$"),
        ([0] * 9, [("sig", 1, 0.5)], "of which 0 are free; choose another target"),
        ([0] * 9, [("sig", "all-to-all", 0.5)], "sig poisons images of one target class; name a label as target"),
        ([0] * 10, [("badnets", 0, 0.7), ("blended", 0, 0.5)],
         "blended: a poison ratio of 0.5 of 10 images is 5 images, and the other triggers leave 3; lower the ratios"),
    ],
)  # fmt: skip
def test_a_ratio_that_cannot_be_is_one_line(labels: list[int], backdoors: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chosen_of(labels, *(implant(*backdoor) for backdoor in backdoors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("total", [7, 60, 333, 999])
def test_the_ratios_that_errors_name_are_possible(total: int) -> None:
    labels = [0] * (total // 3) + [1] * (total - total // 3)
    with pytest.raises(UsageError, match="largest possible ratio is") as caught:
        chosen_of(labels, implant("sig", 0, 1.0))
    (places,) = chosen_of(labels, implant("sig", 0, float(str(caught.value).split()[-1])))
    assert len(places) == total // 3
    with pytest.raises(UsageError, match="take at least") as caught:
        chosen_of(labels, implant("badnets", 0, 0.4 / total))
    (places,) = chosen_of(labels, implant("badnets", 0, float(str(caught.value).split()[-1])))
    assert len(places) == 1


@pytest.mark.parametrize("room", [0, 4000])
def test_images_that_do_not_fit_into_memory_are_poisoned_on_demand(room: int, context: AttackContext) -> None:
    """The cache of all is 60 · 192 = 11,520 bytes, that of the 15 corners 2,880 and of the 24 pictures 4,608."""
    backdoors = [implant("badnets:mode=native", 0, 0.25), implant("blended:mode=input", 1, 0.4)]
    whole = PoisonedPixels(context, backdoors)
    poisoned = PoisonedPixels(replace(context, clean=toy_pixels(60, max_bytes=room)), backdoors)
    assert poisoned.images is None
    assert whole.images is not None
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    positions, images, labels = poisoned.__getitems__(order.tolist())
    assert torch.equal(positions, order)
    assert torch.equal(images, whole.images[order])
    assert torch.equal(labels, whole.labels[order])
    # workers of a DataLoader give the same
    loader = source_loader(poisoned, 16, torch.device("cpu"))
    assert torch.equal(torch.cat([images for _, images, _ in loader]), whole.images)


def test_a_model_is_trained_alike_on_images_that_do_not_fit_into_memory(accelerator: Accelerator) -> None:
    training, found = TrainingSettings(epochs=1, batch_size=20, augmentation="none"), []
    for clean in (toy_pixels(60), toy_pixels(60, max_bytes=0)):
        context = toy_job(accelerator, clean=clean, training=training)
        assert run_attack(context, [implant("badnets", 0, 0.25)]).poisoned == {"badnets": 15}
        found.append(weights_of(context.classifier.network))
    assert equal_weights(*found)
