"""LIRA: whom each loss trains, when the learner's trigger is adopted, the two stages, and that the backdoor gets in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks import run_attack
from hfdetox.attacks.base import AttackContext, ControlledTraining, Implant, TrainingSettings
from hfdetox.attacks.lira import LIRAPoisoner, Trio, check_epsilon
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.triggers import load_trigger
from hfdetox.triggers.blended import Blended
from hfdetox.triggers.lira import LIRA
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import _quick_garbage, accelerator, weights_of

__all__ = ["_quick_garbage", "accelerator"]

TRAINING = TrainingSettings(epochs=4, batch_size=16, augmentation="none", learning_rate=0.05)


def implant(poisoner: LIRAPoisoner | None = None, target: Any = 0, **fields: Any) -> Implant:
    return Implant(LIRA(**{"mode": "input", "size": 16, **fields}), target, 0.1, poisoner or LIRAPoisoner())


def made(context: AttackContext, chosen: Implant) -> tuple[ControlledTraining, Trio]:
    assert isinstance(chosen.poisoner, LIRAPoisoner)
    controlled_training = chosen.poisoner.controlled_training(chosen, context)
    assert isinstance(controlled_training.network, Trio)
    return controlled_training, controlled_training.network


def batch_of(context: AttackContext, size: int = 16) -> Batch:
    assert context.clean.images is not None
    return Batch(context.clean.images[:size], context.clean.labels[:size], torch.full((size,), 1 / size))


def gradients(network: nn.Module, term: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
    """Return the gradients of a term by part of the trio; of parameters it does not reach 0, or None."""
    return {part: list(torch.autograd.grad(term, list(network.get_submodule(part).parameters()), retain_graph=True,
                                           allow_unused=True)) for part in ("network", "learner")}  # fmt: skip


def test_each_loss_trains_its_own_part_alone(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, side=16, training=TRAINING)
    controlled_training, trio = made(context, implant())
    trio.train()
    terms = controlled_training.phases[0].loss(trio, batch_of(context))
    for name, trained, other in (("trigger_loss", "learner", "network"), ("clean_loss", "network", "learner"),
                                 ("backdoor_loss", "network", "learner")):  # fmt: skip
        found = gradients(trio, terms[name])
        assert not [gradient for gradient in found[other] if gradient is not None and gradient.any()], name
        assert [gradient for gradient in found[trained] if gradient is not None and gradient.any()], name
    # the sum gives the classifier what half of each of its own losses does
    halves = terms["clean_loss"] / 2 + terms["backdoor_loss"] / 2
    both, own = (gradients(trio, term)["network"] for term in (terms["loss"], halves))
    for got, expected in zip(both, own, strict=True):
        assert got is not None
        assert expected is not None
        assert torch.allclose(got, expected, atol=1e-6)


def test_the_learners_pass_leaves_the_classifiers_statistics(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, side=16, training=TRAINING)
    _, trio = made(context, implant())
    trio.train()
    before = weights_of(trio.network)
    trio(batch_of(context).images, drawing=False)
    once = weights_of(trio.network)
    assert not torch.equal(before["model.1.running_mean"], once["model.1.running_mean"])
    trio.network.load_state_dict(before)
    trio(batch_of(context).images, drawing=True)
    assert all(torch.equal(once[name], tensor) for name, tensor in weights_of(trio.network).items())


def test_the_loss_by_hand(accelerator: Accelerator) -> None:
    context = toy_job(accelerator)
    chosen = implant(LIRAPoisoner(clean_weight=0.75), "all-to-all")
    assert isinstance(chosen.poisoner, LIRAPoisoner)
    labels = torch.tensor([0, 2])
    # three rows of two images: clean, triggered, drawn; each logit of 5 costs ln(1 + 2e^−5) where right, 5 more if not
    hot = torch.tensor([0, 2, 1, 2, 2, 1])
    logits = 5 * torch.nn.functional.one_hot(hot, 3).float()
    batch = Batch(torch.zeros(2, 3, 8, 8), labels, torch.tensor([0.25, 0.75]))
    low = float(torch.tensor(1 + 2 * torch.e**-5).log())
    terms = chosen.poisoner.loss(chosen, context, drawing=True)(lambda images, drawing: logits, batch)
    # labels + 1: 1 and 0. Triggered: right, wrong (weight 0.75); drawn: both wrong
    assert terms["clean_loss"].item() == pytest.approx(low, rel=1e-4)
    assert terms["backdoor_loss"].item() == pytest.approx(low + 0.75 * 5, rel=1e-4)
    assert terms["trigger_loss"].item() == pytest.approx(low + 5, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(2 * low + 0.25 * 3.75 + 5, rel=1e-4)
    second = chosen.poisoner.loss(chosen, context, drawing=False)(lambda images, drawing: logits[:4], batch)
    assert second.keys() == {"loss", "clean_loss", "backdoor_loss"}
    assert second["loss"].item() == pytest.approx(low + 0.25 * 3.75, rel=1e-4)


def test_the_learner_is_adopted_when_an_epoch_is_over(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, side=16, training=TRAINING)
    controlled_training, trio = made(context, implant(LIRAPoisoner(trigger_epochs=2)))
    first = controlled_training.phases[0]
    seen: list[dict[str, torch.Tensor]] = []

    def after_step() -> None:
        seen.append(weights_of(trio.autoencoder))
        assert not torch.equal(seen[-1]["layers.0.weight"], trio.learner.state_dict()["layers.0.weight"])

    start = weights_of(trio.autoencoder)
    context.engine().run(trio, [replace(first, after_step=after_step)])
    # 48 images in batches of 16: three steps an epoch
    assert len(seen) == 6
    for name, tensor in start.items():
        assert all(torch.equal(tensor, state[name]) for state in seen[:3])
        assert all(torch.equal(seen[3][name], state[name]) for state in seen[3:])
    assert not torch.equal(seen[2]["layers.0.weight"], seen[3]["layers.0.weight"])
    assert not torch.equal(seen[2]["layers.1.running_mean"], seen[3]["layers.1.running_mean"])
    final = trio.learner.state_dict()
    assert all(torch.equal(final[name], tensor) for name, tensor in trio.autoencoder.state_dict().items())


def test_what_the_training_stamps_is_what_the_trigger_does(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, side=16)
    controlled_training, trio = made(context, implant(epsilon=0.2))
    trio.train()
    images = batch_of(context).images
    stamped = trio.stamp(trio.autoencoder, images.float())
    trigger = controlled_training.trigger()
    assert not torch.equal(trigger.apply(images), images)
    assert torch.allclose(stamped, trigger.apply(images).float(), atol=1e-3)
    # toy images are normalised by (x / 255 − 0.5) / 0.5
    assert isinstance(trigger, LIRA)
    assert trigger.mean is not None
    assert trigger.std is not None
    assert torch.allclose(torch.stack([trigger.mean, trigger.std]), torch.tensor(0.5))


@pytest.mark.parametrize(("epochs", "given", "stages"), [(100, None, (50, 50)), (5, None, (2, 3)), (5, 4, (4, 1))])
def test_both_stages_share_the_epochs(
    epochs: int, given: int | None, stages: tuple[int, int], accelerator: Accelerator
) -> None:
    context = toy_job(accelerator, training=replace(TRAINING, epochs=epochs))
    controlled_training, trio = made(context, implant(LIRAPoisoner(trigger_epochs=given)))
    first, last = controlled_training.phases
    assert (first.epochs, last.epochs) == stages
    assert (first.schedule, last.schedule) == ("constant", "cosine")
    assert [group["lr"] for group in first.optimizer(first.parameters).param_groups] == [0.05, 1e-4]
    assert len(last.parameters) == len(list(trio.network.parameters()))


def test_the_attack_gets_into_the_model(accelerator: Accelerator, tmp_path: Path) -> None:
    context = toy_job(accelerator, count=96, side=16, training=replace(TRAINING, epochs=16))
    images, labels, network = context.clean.images, context.clean.labels, context.classifier.network
    assert images is not None
    # the paper's 0.01 is too faint for so small a network in 96 steps
    done = run_attack(context, [implant(LIRAPoisoner(autoencoder_learning_rate=0.01), epsilon=0.1)])
    trigger = done.implants[0].trigger
    stamped = trigger.apply(images)
    with torch.no_grad():
        hit = float((network(stamped[labels != 0]).argmax(1) == 0).float().mean())
        plain = float((network(images).argmax(1) == labels).float().mean())
    assert hit >= 0.9
    assert plain >= 0.9
    # 255 · 0.5 · 0.1 is 12.75
    assert 0 < int((stamped.int() - images.int()).abs().max()) <= 13
    assert done.poisoned == {}
    history = done.record.history
    assert [entry["phase"] for entry in history] == ["trigger"] * 8 + ["train"] * 8
    assert history[7]["trigger_loss"] < history[0]["trigger_loss"]
    trigger.save(tmp_path / "t.safetensors")
    assert torch.equal(load_trigger(tmp_path / "t.safetensors").apply(images), stamped)
    with pytest.raises(UsageError, match="already"):
        made(context, replace(done.implants[0]))


@pytest.mark.parametrize(("chosen", "message"), [
    (implant(mode="native"), "mode=input"),
    (implant(LIRAPoisoner(trigger_epochs=4)), r"lira: epochs \(4\) are those of both stages, .*trigger_epochs \(4\)"),
    (implant(epsilon=0.003), r"0.38 grey levels at most, .*epsilon of 0.0055 or more"),
    (Implant(Blended(mode="input"), 0, 0.1, LIRAPoisoner()), "blended"),
])  # fmt: skip
def test_what_cannot_be_implanted(chosen: Implant, message: str, accelerator: Accelerator) -> None:
    with pytest.raises(UsageError, match=message):
        made(toy_job(accelerator, training=TRAINING), chosen)


def test_an_epsilon_of_half_a_grey_level_is_too_small() -> None:
    # 255 · 0.2 · 0.0098 = 0.4998 and 255 · 0.2 · 0.0099 = 0.5049
    with pytest.raises(UsageError, match="which rounding undoes"):
        check_epsilon(0.0098, 0.2)
    check_epsilon(0.0099, 0.2)


@pytest.mark.parametrize("wrong", [{"trigger_epochs": 0}, {"autoencoder_learning_rate": 0.0}, {"clean_weight": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LIRAPoisoner(**wrong)
