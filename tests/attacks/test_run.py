"""Attacks end to end on toy images: what is implanted, by itself and together, and the clean baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from hfdetox.attacks import AttackContext, Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.evaluation.metrics import predict
from hfdetox.models.classifier import load_classifier
from hfdetox.triggers import Trigger, parse_trigger
from hfdetox.triggers.base import Target, attacked_labels
from tests.attacks.toy_jobs import toy_job
from tests.tiny_training import (
    _quick_garbage,
    accelerator,
    equal_weights,
    mlp,
    toy_pixels,
    toy_preprocessing,
    weights_of,
)

__all__ = ["_quick_garbage", "accelerator"]

SETTINGS = TrainingSettings(epochs=14, batch_size=30, optimizer="sgd", learning_rate=0.05, augmentation="none")


def small_job(accelerator: Accelerator, **changes: object) -> AttackContext:
    """Return a job with a network that sees every pixel and learns in a second; weights are of seed 0."""
    classifier = load_classifier(mlp().model, preprocessing=toy_preprocessing(), labels=3)
    values: dict[str, object] = {"count": 120, "classifier": classifier, "training": SETTINGS, **changes}
    return toy_job(accelerator, **values)  # type: ignore[arg-type]


def implant(spec: str, target: Target, ratio: float = 0.2) -> Implant:
    """Return the implant of a trigger specification with its kind's own poisoner."""
    trigger = parse_trigger(spec)
    return Implant(trigger, target, ratio, poisoner_for(trigger.kind, {}))


def accuracy(context: AttackContext) -> float:
    """Return the share of 90 other images classified correctly."""
    clean = toy_pixels(90)
    return float(
        (predict(context.classifier.network, clean, context.accelerator).predicted == clean.labels.numpy()).mean()
    )


def success(context: AttackContext, trigger: Trigger, target: Target) -> float:
    """Return the share of triggered images classified as the attacker wants, without those of the target class."""
    clean = toy_pixels(90)
    chosen = clean.without_label(target) if isinstance(target, int) else clean.positions
    view = clean.view(trigger, positions=chosen)
    wanted = attacked_labels(view.labels, target, context.classes)
    return float((predict(context.classifier.network, view, context.accelerator).predicted == wanted.numpy()).mean())


@pytest.mark.parametrize(("spec", "epochs"), [("badnets:size=8", 14), ("blended:alpha=0.5", 24)])
def test_a_trigger_is_implanted_and_the_clean_control_has_none(
    spec: str, epochs: int, accelerator: Accelerator
) -> None:
    training = replace(SETTINGS, epochs=epochs)
    context, controlled_training = small_job(accelerator, training=training), small_job(accelerator, training=training)
    backdoor = implant(spec, 0)
    done = run_attack(context, [backdoor])
    without = run_attack(controlled_training, [])
    assert done.record.epochs == without.record.epochs == epochs
    # round(0.2 · 120)
    assert done.poisoned == {backdoor.trigger.name: 24}
    assert without.poisoned == {}
    assert without.implants == []
    assert success(context, backdoor.trigger, 0) >= 0.9
    assert success(controlled_training, backdoor.trigger, 0) < 0.3
    assert accuracy(controlled_training) > 0.95
    assert accuracy(context) >= accuracy(controlled_training) - 0.03


def test_several_triggers_with_targets_of_their_own_are_implanted_together(accelerator: Accelerator) -> None:
    context = small_job(accelerator)
    corner, other = implant("badnets:size=8", 0, 0.15), implant("badnets:name=left,size=8,right=24,value=0", 2, 0.15)
    done = run_attack(context, [corner, other])
    assert done.poisoned == {"badnets": 18, "left": 18}
    assert success(context, corner.trigger, 0) >= 0.9
    assert success(context, other.trigger, 2) >= 0.9
    assert accuracy(context) > 0.95


def test_all_to_all_moves_each_class_to_the_next(accelerator: Accelerator) -> None:
    context = small_job(accelerator, training=replace(SETTINGS, epochs=40))
    backdoor = implant("badnets:size=12", "all-to-all", 0.4)
    run_attack(context, [backdoor])
    assert success(context, backdoor.trigger, "all-to-all") >= 0.9
    assert accuracy(context) > 0.9


def test_training_is_seeded(accelerator: Accelerator) -> None:
    results = []
    for seed in (1, 1, 2):
        context = small_job(accelerator, seed=seed, training=replace(SETTINGS, epochs=1))
        run_attack(context, [implant("badnets", 0)])
        results.append(weights_of(context.classifier.network))
    assert equal_weights(results[0], results[1])
    assert not equal_weights(results[0], results[2])


def test_the_monitor_sees_the_triggers_after_each_epoch_and_ends_the_training(accelerator: Accelerator) -> None:
    context, seen = small_job(accelerator), []

    def enough(triggers: Sequence[Trigger]) -> bool:
        seen.append([trigger.name for trigger in triggers])
        return len(seen) == 3

    assert run_attack(context, [implant("badnets", 0)], monitor=enough).record.epochs == 3
    assert seen == [["badnets"]] * 3


def test_a_monitor_that_measures_does_not_change_the_training(accelerator: Accelerator) -> None:
    context, plain = small_job(accelerator), small_job(accelerator)
    rates: list[float] = []

    def measured(triggers: Sequence[Trigger]) -> bool:
        rates.append(success(context, triggers[0], 0))
        return False

    run_attack(context, [implant("badnets:size=8", 0)], monitor=measured)
    run_attack(plain, [implant("badnets:size=8", 0)])
    assert len(rates) == 14
    assert rates[-1] > rates[0]
    assert equal_weights(weights_of(context.classifier.network), weights_of(plain.classifier.network))


def test_an_attack_on_a_trained_model_starts_from_its_weights(accelerator: Accelerator) -> None:
    context = small_job(accelerator)
    run_attack(context, [])
    clean = weights_of(context.classifier.network)
    again = replace(context, from_scratch=False, training=replace(SETTINGS, learning_rate=1e-9, epochs=1))
    run_attack(again, [implant("badnets", 0)])
    for name, weight in weights_of(context.classifier.network).items():
        torch.testing.assert_close(weight, clean[name], rtol=0, atol=1e-6)
