"""Training control: what WaNet, BPP and Blind do to a batch and to the loss, and that it implants their triggers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.attacks import Implant, TrainingSettings, parse_attack_settings, poisoner_for, run_attack
from hfdetox.attacks.base import TrainingPoisoner, share, taken
from hfdetox.attacks.blind import BlindPoisoner, Switch
from hfdetox.attacks.bpp import BppPoisoner
from hfdetox.attacks.wanet import WaNetPoisoner
from hfdetox.data.cache import Pixels
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import CrossImages
from hfdetox.training.batches import Batch
from hfdetox.triggers import parse_trigger
from hfdetox.triggers.base import Target
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, equal_weights, toy_pixels, weights_of

__all__ = ["_quick_garbage", "accelerator"]

CPU = torch.device("cpu")


def implant(spec: str, target: Target = 0, ratio: float = 0.1, **settings: str) -> Implant:
    """Return the implant of a trigger specification, put on what the model sees, with its kind's poisoner."""
    kind = spec.partition(":")[0]
    return Implant(parse_trigger(f"{spec}{',' if ':' in spec else ':'}mode=input"), target, ratio,
                   poisoner_for(kind, settings))  # fmt: skip


def batch_of(count: int = 128, label: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` 16×16 images, all of one class."""
    images = ToyImages(count, 16).images
    assert images is not None
    return images, torch.full((count,), label)


def mixed(backdoor: Implant, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch as the poisoner changes it, for a model of three classes."""
    assert isinstance(backdoor.poisoner, WaNetPoisoner | BppPoisoner)
    return backdoor.poisoner.mixed(backdoor, images, labels, 3, range(len(labels)))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the places of the images that are not as before."""
    return (before != after).flatten(1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize(("kind", "attacked", "others"), [("wanet", 12, 24), ("bpp", 12, 12)])
def test_a_batch_of_128_at_a_tenth(kind: str, attacked: int, others: int) -> None:
    """WaNet 12 attacked, 24 by noise, 92 clean; BPP 12 attacked, 12 negatives, 104 clean: ⌊0.1 · 128⌋ = 12."""
    images, labels = batch_of()
    backdoor, kept = implant(kind), images.clone()
    after, names = mixed(backdoor, images, labels)
    assert torch.equal(images, kept)
    assert after.dtype == torch.uint8
    assert names.tolist() == [0] * attacked + [1] * (128 - attacked)
    assert torch.equal(after[:attacked], backdoor.trigger.apply(images[:attacked]))
    assert changed(images, after) == list(range(attacked + others))
    assert changed(backdoor.trigger.apply(images)[: attacked + others], after[: attacked + others]) == list(
        range(attacked, attacked + others)
    )


@pytest.mark.parametrize("kind", ["wanet", "bpp"])
def test_all_to_all_moves_the_attacked_labels_to_the_next(kind: str) -> None:
    images, _ = batch_of(20)
    labels = torch.arange(20) % 3
    _, names = mixed(implant(kind, "all-to-all", 0.25), images, labels)
    # images 0 to 4 are of classes 0 1 2 0 1
    assert names.tolist() == [1, 2, 0, 1, 2, *labels[5:].tolist()]


def test_negatives_carry_the_error_of_another_image_and_saturate() -> None:
    # 100 at 8 levels: 100 / 255 · 7 = 2.745, rounded 3, that is 3 / 7 · 255 = 109.3, 109: an error of 9
    images = torch.full((4, 3, 2, 2), 100, dtype=torch.uint8)
    after, names = mixed(implant("bpp", ratio=0.25, neg_ratio="0.5"), images, torch.ones(4, dtype=torch.int64))
    assert [int(image.max()) for image in after] == [109, 109, 109, 100]
    assert names.tolist() == [0, 1, 1, 1]
    # the error of 100 on 250 is 259, clipped; that of 250 on 100: 250 / 255 · 7 = 6.86, 7, that is 255: an error of 5
    pair = torch.tensor([100, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    crossed = poisoner_for("bpp", {}).cross(
        parse_trigger("bpp:mode=input"), pair, torch.arange(2), lambda: pair.flip(0)
    )
    assert crossed is not None
    assert [int(image.max()) for image in crossed] == [105, 255]


def test_the_noise_of_wanet_is_fresh_in_a_step_and_the_same_when_it_is_measured() -> None:
    images, labels = batch_of()
    backdoor = implant("wanet")
    first, again = (mixed(backdoor, images, labels)[0] for _ in range(2))
    assert changed(first, again) == list(range(12, 36))
    crossed = [cross_of(backdoor, toy_pixels(20, 16), size) for size in (20, 20, 7, 1)]
    assert all(torch.equal(crossed[0], other) for other in crossed[1:])
    assert not torch.equal(crossed[0], backdoor.trigger.apply(toy_pixels(20, 16).images))  # type: ignore[arg-type]
    # every image has a warp of its own: of equal images each comes out otherwise
    same = images[:1].expand(5, -1, -1, -1)
    warped = backdoor.poisoner.cross(backdoor.trigger, same, torch.arange(5), lambda: same)
    assert warped is not None
    assert len(warped.flatten(1).unique(dim=0)) == 5


def cross_of(backdoor: Implant, clean: Pixels, size: int) -> torch.Tensor:
    """Return what the cross accuracy is measured on, in batches of `size`."""
    source = CrossImages(clean, backdoor.poisoner, backdoor.trigger)
    return torch.cat([source.__getitems__(range(20)[begin : begin + size])[1] for begin in range(0, 20, size)])


def test_the_other_image_of_each_is_the_one_before_it_however_they_are_split() -> None:
    backdoor, clean = implant("bpp"), toy_pixels(20, 16)
    assert clean.images is not None
    expected = backdoor.poisoner.cross(backdoor.trigger, clean.images, clean.positions, lambda: clean.images.roll(1, 0))
    assert all(torch.equal(cross_of(backdoor, clean, size), expected) for size in (20, 7, 1))
    # a lone image has its mirror image
    (one, other), lone = clean.images[:2], toy_pixels(1, 16)
    assert not torch.equal(one, other)
    mirrored = CrossImages(lone, backdoor.poisoner, backdoor.trigger).__getitems__([0])[1]
    assert torch.equal(mirrored, backdoor.poisoner.cross(backdoor.trigger, one[None], torch.zeros(1),
                                                       lambda: one[None].flip(-1)))  # fmt: skip


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, [64, 64, 0]), (0.25, [32, 64, 32]), (1.0, [128, 0, 0])])
def test_wanets_noise_takes_the_room_there_is(ratio: float, expected: list[int]) -> None:
    images, labels = batch_of()
    backdoor = implant("wanet", ratio=ratio)
    after, names = mixed(backdoor, images, labels)
    warped = len(images) - len(changed(backdoor.trigger.apply(images), after))
    clean = len(images) - len(changed(images, after))
    assert [warped, len(images) - warped - clean, clean] == expected
    assert int((names == 0).sum()) == expected[0]


def test_a_share_is_a_floor_or_one_image_by_chance() -> None:
    # 0.29 · 100 is 28.999999999999996 in floating point
    assert [share(0.1, 128), share(0.29, 100), share(0.5, 7), share(1.0, 9), share(0.1, 10)] == [12, 29, 3, 9, 1]
    torch.manual_seed(0)
    drawn = [share(0.001, 128) for _ in range(4000)]
    assert set(drawn) == {0, 1}
    # 0.128 of 4,000 is 512, with a standard deviation of 21
    assert abs(sum(drawn) - 512) < 4 * 21
    assert share(0.0, 128) == 0


@pytest.mark.parametrize(("kind", "others"), [("wanet", 24), ("bpp", 12)])
def test_eight_processes_share_what_one_would_take(kind: str, others: int) -> None:
    """Of 128 images each sees 16 and ⌊0.1 · 16⌋ is 1, but ⌊0.1 · 128⌋ is 12: four of them take two."""
    images, labels = batch_of()
    backdoor = implant(kind)
    assert isinstance(backdoor.poisoner, WaNetPoisoner | BppPoisoner)
    attacked, touched = [], 0
    for process in range(8):
        part = images[process::8]
        after, names = backdoor.poisoner.mixed(backdoor, part, labels[process::8], 3, range(128)[process::8])
        attacked.append(int((names == 0).sum()))
        touched += len(changed(part, after))
    assert attacked == [2, 2, 2, 2, 1, 1, 1, 1]
    assert touched == 12 + others


def test_an_uneven_step_is_shared_out_too() -> None:
    # rows 0 3 6 9, 1 4 7 and 2 5 8 of 10; the first 5 are 0 to 4
    assert [taken(range(10)[process::3], 5) for process in range(3)] == [2, 2, 1]
    assert [taken(range(10)[process::3], 99) for process in range(3)] == [4, 3, 3]
    assert taken(range(10)[2::3], 0) == 0


def test_a_batch_without_an_attacked_image_is_clean() -> None:
    images, labels = batch_of(4)
    torch.manual_seed(0)
    after, names = mixed(implant("wanet", ratio=1e-6), images, labels)
    assert torch.equal(after, images)
    assert torch.equal(names, labels)


def test_the_switch_is_the_mean_of_the_last_losses_and_stays_on() -> None:
    switch = Switch(1.0, 3, CPU)
    states = []
    for loss in (2.0, 1.5, 0.5, 0.8, 9.0):
        states.append(float(switch.seen(torch.tensor(loss))))
    # means 2, 1.75, 4 / 3, 2.8 / 3, then 10.3 / 3
    assert states == [0, 0, 0, 1, 1]


def test_a_second_pass_over_a_batch_does_not_count_for_the_switch(accelerator: Accelerator) -> None:
    """Also where the step after the passes is left out, as fp16 does with one that overflows: no step is told of."""
    backdoor, switch = implant("blind"), Switch(1.0, 3, CPU)
    assert isinstance(backdoor.poisoner, BlindPoisoner)
    loss = backdoor.poisoner.loss(backdoor, toy_job(accelerator, side=32), switch)
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        batch = Batch(images, labels, torch.full((2,), 0.5))
        for _ in range(2):
            loss(Bright(), batch)
    # black images have three equal logits
    assert switch.steps == 2
    assert switch.losses.tolist() == pytest.approx([math.log(3), math.log(3), 0])


class Bright(nn.Module):
    """Logits that are three means of an image: its own brightness, that of its upper right and 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        corner = images[..., :16, 16:].mean((1, 2, 3))
        return torch.stack([images.mean((1, 2, 3)), corner, torch.zeros_like(corner)], 1)


@pytest.mark.parametrize("floats", [False, True])
def test_blinds_loss_adds_the_whole_batch_with_the_trigger_once_it_is_switched(
    floats: bool, accelerator: Accelerator
) -> None:
    context = toy_job(accelerator, side=32)
    backdoor = implant("blind", "all-to-all")
    assert isinstance(backdoor.poisoner, BlindPoisoner)
    pixels = ToyImages(4, 32).images
    assert pixels is not None
    labels, weights = torch.tensor([0, 1, 2, 0]), torch.full((4,), 0.25)
    batch = Batch(pixels.float() if floats else pixels, labels, weights)
    network = Bright()
    clean = cross_entropy(network(pixels), labels)
    backdoored = cross_entropy(network(backdoor.trigger.apply(pixels)), torch.tensor([1, 2, 0, 1]))
    off = backdoor.poisoner.loss(backdoor, context, Switch(1e-6, 1000, CPU))(network, batch)
    on = backdoor.poisoner.loss(backdoor, context, Switch(1e6, 1000, CPU))(network, replace(batch))
    assert (float(off["switched"]), float(on["switched"])) == (0, 1)
    torch.testing.assert_close(off["loss"], clean)
    torch.testing.assert_close(on["loss"], clean + 0.9 * backdoored)
    torch.testing.assert_close(on["backdoor_loss"], backdoored)


@pytest.mark.parametrize("kind", ["wanet", "bpp", "blind"])
def test_a_training_under_control_is_seeded_and_records_what_it_did(kind: str, accelerator: Accelerator) -> None:
    results = []
    for seed in (1, 1, 2):
        training = TrainingSettings(epochs=2, batch_size=24)
        context = toy_job(accelerator, side=32, seed=seed, training=training)
        done = run_attack(context, [implant(kind, ratio=0.25)])
        assert done.record.epochs == 2
        # which images carry the trigger differs from epoch to epoch
        assert done.poisoned == {}
        results.append(weights_of(context.classifier.network))
    assert equal_weights(results[0], results[1])
    assert not equal_weights(results[0], results[2])


def test_blind_implants_its_trigger(accelerator: Accelerator) -> None:
    training = TrainingSettings(epochs=25, batch_size=24, learning_rate=0.05, augmentation="none")
    context = toy_job(accelerator, side=32, training=training)
    done = run_attack(context, [implant("blind", 1, threshold="0.9")])
    history = done.record.history
    assert history[0]["switched"] == 0
    assert history[-1]["switched"] == 1
    assert history[-1]["backdoor_loss"] < 0.5 * history[0]["backdoor_loss"]


@pytest.mark.parametrize("kind", ["wanet", "bpp", "blind"])
def test_a_native_trigger_cannot_be_put_on_within_a_training(kind: str, accelerator: Accelerator) -> None:
    poisoner = poisoner_for(kind, {})
    assert isinstance(poisoner, TrainingPoisoner)
    with pytest.raises(UsageError, match=f"trigger {kind}: {kind} is put on images within the training.*mode=input"):
        poisoner.controlled_training(Implant(parse_trigger(kind), 0, 0.1, poisoner), toy_job(accelerator, side=32))


def test_a_controlled_training_has_one_trigger(accelerator: Accelerator) -> None:
    backdoors = [implant("wanet"), Implant(parse_trigger("badnets"), 0, 0.1, poisoner_for("badnets", {}))]
    with pytest.raises(UsageError, match="wanet controls the training itself and cannot share it"):
        run_attack(toy_job(accelerator), backdoors)


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("wanet", {"cross_ratio": "-1"}, "wanet: cross_ratio must be at least 0"),
        ("wanet", {"cross_ratio": "inf"}, "wanet: cross_ratio must be at least 0 and finite"),
        ("wanet", {"neg_ratio": "0.1"}, "attack has no setting neg_ratio; it has epochs, .*cross_ratio"),
        ("bpp", {"neg_ratio": "1.5"}, r"bpp: neg_ratio must be in \[0, 1\]"),
        ("blind", {"window": "0"}, "blind: window must be at least 1, got 0"),
        ("blind", {"backdoor_weight": "0"}, "blind: backdoor_weight must be positive and finite, got 0.0"),
    ],
)
def test_a_wrong_setting_of_a_poisoner_is_one_line(kind: str, texts: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_attack_settings([kind], texts)
