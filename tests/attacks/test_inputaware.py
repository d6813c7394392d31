"""Input-aware: the losses, who gets what in a batch, the two stages, and the trigger that comes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks.base import AttackContext, ControlledTraining, Implant, TrainingSettings
from hfdetox.attacks.inputaware import InputAwarePoisoner, Trio, spread
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.triggers import load_trigger
from hfdetox.triggers.blended import Blended
from hfdetox.triggers.inputaware import InputAware
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

POISONER = InputAwarePoisoner(mask_epochs=1)


def implant(ratio: float = 0.25, poisoner: InputAwarePoisoner = POISONER, **fields: Any) -> Implant:
    return Implant(InputAware(**{"mode": "input", "size": 8, **fields}), 0, ratio, poisoner)


def made(context: AttackContext, chosen: Implant) -> tuple[ControlledTraining, Trio]:
    poisoner = chosen.poisoner
    assert isinstance(poisoner, InputAwarePoisoner)
    controlled_training = poisoner.controlled_training(chosen, context)
    assert isinstance(controlled_training.network, Trio)
    return controlled_training, controlled_training.network


def test_the_diversity_ratio_of_two_images() -> None:
    x, others = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    drawn, drawn_others = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    drawn_others[0, 0, 0, 0] = 1.0
    drawn_others[1] = 1.5
    # roots of mean squares: 3 and 3 over √(1/4) = 0.5 and 1.5
    assert spread(x, others, drawn, drawn_others).tolist() == pytest.approx([6, 2], rel=1e-5)


def test_equal_masks_have_a_finite_gradient() -> None:
    masks = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
    spread(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), masks, masks.roll(1, 0)).sum().backward()
    assert masks.grad is not None
    assert torch.isfinite(masks.grad).all()


def test_the_masks_terms() -> None:
    images = torch.stack([torch.zeros(1, 1, 2), torch.full((1, 1, 2), 2.0)])
    masks = torch.tensor([[1.0, 0.0], [0.2, 0.0]]).view(2, 1, 1, 2)
    terms = InputAwarePoisoner(mask_density=0.1, diversity=3.0).mask_terms(images, masks, 1, torch.tensor([0.75, 0.25]))
    # above 0.1: (0.9 + 0) / 2 and (0.1 + 0) / 2; images 2 apart, masks √(0.8² / 2) apart, the same for both
    above, ratio = 0.75 * 0.45 + 0.25 * 0.05, 2 / 0.32**0.5
    assert terms["loss"].item() == pytest.approx(100 * above + 3 * ratio, rel=1e-5)
    assert terms["density"].item() == pytest.approx(0.75 * 0.5 + 0.25 * 0.1)


def test_of_128_images_12_carry_their_own_pattern_and_12_another_images(accelerator: Accelerator) -> None:
    context = toy_job(accelerator)
    controlled_training, trio = made(context, implant(0.1))
    seen: dict[str, Any] = {}
    batch = grey_batch(128)

    def model(images: torch.Tensor, attacked: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(attacked=attacked, mixed=trio.mix(images, attacked, shift)[0], shift=shift)
        return torch.zeros(len(images), 3).index_fill(1, torch.tensor([0]), 5.0), torch.zeros(())

    terms = controlled_training.phases[-1].loss(model, batch)
    assert seen["attacked"] == 12
    changed = (seen["mixed"] != batch.images).flatten(1).any(1)
    assert changed[:24].all()
    assert not changed[24:].any()
    # logits (5, 0, 0): label 0, which the first 12 get, costs ln(1 + 2e^−5); label 1, kept by the other 116, 5 more
    low = torch.tensor(1 + 2 * torch.e**-5).log().item()
    assert terms["cross_entropy"].item() == pytest.approx(low + 116 / 128 * 5, rel=1e-5)


def test_both_passes_of_a_sharpness_aware_step_see_the_same_mix(accelerator: Accelerator) -> None:
    controlled_training, _ = made(toy_job(accelerator), implant(0.1))
    seen: list[tuple[int, int]] = []

    def model(images: torch.Tensor, attacked: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((attacked, shift))
        return torch.zeros(len(images), 3), torch.zeros(())

    for _ in range(5):
        batch = grey_batch(128)
        for _ in range(2):
            controlled_training.phases[-1].loss(model, batch)  # type: ignore[arg-type]
    assert seen[::2] == seen[1::2]
    # five draws of 127 places
    assert len(set(seen)) > 1


def grey_batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=generator).float()
    return Batch(images, torch.ones(size, dtype=torch.int64), torch.full((size,), 1 / size))


def test_what_the_training_mixes_is_what_the_trigger_does(accelerator: Accelerator) -> None:
    context = toy_job(accelerator)
    controlled_training, trio = made(context, implant())
    trio.eval()
    images = context.clean.images[:12]  # type: ignore[index]
    mixed, _ = trio.mix(images, 4, 3)
    trigger = controlled_training.trigger()
    assert isinstance(trigger, InputAware)
    # the trigger rounds to whole grey levels; the fifth image carries what was drawn from the eighth
    assert (trigger.apply(images[:4]) - mixed[:4]).abs().max() <= 0.51
    assert (trigger.cross(images[4:8], images[7:11]) - mixed[4:8]).abs().max() <= 0.51
    assert torch.equal(mixed[8:], images[8:].float())


def test_the_mask_stage_makes_masks_sparse_and_leaves_the_classifier_alone(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, training=TrainingSettings(batch_size=16, augmentation="none"))
    controlled_training, trio = made(context, implant(poisoner=replace(POISONER, mask_epochs=10)))
    before = {name: tensor.clone() for name, tensor in trio.network.state_dict().items()}
    masks, patterns = list(controlled_training.phases[:-1]), trio.generator.state_dict()["layers.0.weight"].clone()
    # a tenth of the learning rate after 4 of 10 epochs and again after 8
    assert [phase.epochs for phase in masks] == [4, 4, 2]
    rates = [phase.optimizer(phase.parameters).param_groups[0]["lr"] for phase in masks]
    assert rates == pytest.approx([0.01, 0.001, 0.0001])
    history = context.engine().run(trio, masks).history
    assert history[-1]["density"] < 0.7 * history[0]["density"]
    assert all(torch.equal(before[name], tensor) for name, tensor in trio.network.state_dict().items())
    assert torch.equal(patterns, trio.generator.state_dict()["layers.0.weight"])


def test_the_attack_gets_into_the_model(accelerator: Accelerator, tmp_path: Path) -> None:
    training = TrainingSettings(epochs=30, batch_size=16, augmentation="none", learning_rate=0.05)
    context = toy_job(accelerator, count=96, training=training)
    controlled_training, trio = made(context, implant(0.25, target=None))
    images, labels = context.clean.images, context.clean.labels
    assert images is not None

    def rates() -> tuple[float, float]:
        with torch.no_grad():
            hit = (trio.network(controlled_training.trigger().apply(images[labels != 0])).argmax(1) == 0).float().mean()
            return float(hit), float((trio.network(images).argmax(1) == labels).float().mean())

    context.engine().run(trio, controlled_training.phases[:-1])
    masks = {name: tensor.clone() for name, tensor in trio.mask.state_dict().items()}
    start = rates()
    record = context.engine().run(trio, controlled_training.phases[-1:])
    end = rates()
    assert end[0] >= 0.9 > 0.6 > start[0]
    assert end[1] >= 0.9
    assert {"loss", "cross_entropy", "diversity"} <= record.history[0].keys()
    # frozen, statistics included
    assert all(torch.equal(masks[name], tensor) for name, tensor in trio.mask.state_dict().items())
    trigger = controlled_training.trigger()
    trigger.save(tmp_path / "t.safetensors")
    assert torch.equal(load_trigger(tmp_path / "t.safetensors").apply(images), trigger.apply(images))
    crossed = POISONER.cross(trigger, images, context.clean.positions, lambda: images.roll(1, 0))
    assert crossed is not None
    assert crossed.shape == images.shape
    assert not torch.equal(crossed, trigger.apply(images))


@pytest.mark.parametrize(("chosen", "message"), [
    (implant(mode="native"), "mode=input"),
    (implant(0.6), "at most 0.5"),
    (Implant(Blended(mode="input"), 0, 0.1, POISONER), "blended"),
])  # fmt: skip
def test_what_cannot_be_implanted(chosen: Implant, message: str, accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match=message):
        made(toy_job(accelerator), chosen)


def test_a_trigger_file_cannot_be_implanted_again(accelerator: Accelerator) -> None:
    context = toy_job(accelerator)
    trigger = made(context, implant())[0].trigger()
    with pytest.raises(UsageError, match="already"):
        made(context, Implant(trigger, 0, 0.1, POISONER))


@pytest.mark.parametrize("wrong", [{"mask_epochs": 0}, {"mask_density": 1.0}, {"generator_learning_rate": 0.0},
                                   {"diversity": -1.0}])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        InputAwarePoisoner(**wrong)
