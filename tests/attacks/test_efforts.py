"""What an attack says that it will compute, beside what goes through the classifier."""

from __future__ import annotations

from dataclasses import replace

import pytest
from accelerate import Accelerator

from hfdetox.attacks import ATTACKS, Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.runs.estimate import AttackCost, monitored
from hfdetox.training.sharpness import SharpnessAware
from hfdetox.triggers import TRIGGERS, parse_trigger
from tests.attacks.toy_jobs import toy_classifier, toy_job
from tests.defenses.test_efforts import FORWARD, counted
from tests.tiny_training import _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

IMAGES, EPOCHS, RATIO = 96, 6, 0.25
SETTINGS = TrainingSettings(epochs=EPOCHS, batch_size=32, augmentation="none")
# what makes it short, and its own settings
SPECS = {"badnets": "badnets:size=3", "lira": "lira:epsilon=0.2", "trojannn": "trojannn", "lf": "lf"}
SHORT = {"lc": {"steps": "20"}, "trojannn": {"steps": "40"}, "ssba": {"encoder_epochs": "1"},
         "inputaware": {"mask_epochs": "1"}, "lf": {"passes": "2", "steps": "20"}}  # fmt: skip
# what is said not to be counted goes through other networks, but LF's search
KINDS = sorted(set(ATTACKS.builtin) - {"lf"})


def effort(kind: str, *, sharp: bool = False) -> tuple[float, AttackCost]:
    poisoner, trigger = poisoner_for(kind, SHORT.get(kind, {})), parse_trigger(SPECS.get(kind, kind))
    cost = AttackCost(SETTINGS, [(trigger, poisoner)], RATIO, sharp, IMAGES, 0, 0, trained=False)
    return cost.efforts[0], cost


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_computes_what_it_says(kind: str, accelerator: Accelerator) -> None:
    if kind not in TRIGGERS:
        pytest.fail(f"no trigger of the kind {kind}")
    trigger = replace(parse_trigger(SPECS.get(kind, kind)), mode="input")
    context = toy_job(accelerator, count=IMAGES, side=16, training=SETTINGS, surrogate=toy_classifier(16, 1))
    said, _ = effort(kind)
    with counted() as found:
        run_attack(context, [Implant(trigger, 0, RATIO, poisoner_for(kind, SHORT.get(kind, {})))])
    done = found["back"] + FORWARD * (found["forward"] - found["back"])
    assert 0.7 * said <= done <= 1.3 * said, (done, said)


def test_what_is_not_counted_is_said() -> None:
    said = {kind: effort(kind)[1].besides for kind in ATTACKS.builtin}
    assert {kind: text for kind, text in said.items() if text} == {
        "inputaware": "the training of its masks", "lf": "the search of its pattern",
        "lira": "the drawing of its trigger",
        "ssba": "the training of its encoder"}  # fmt: skip
    # a pattern that is there is not searched
    cost = AttackCost(SETTINGS, [(parse_trigger("lf:random"), poisoner_for("lf", {}))], RATIO, False, 96, 0, 0, True)
    assert cost.besides == ""


def test_epochs_looks_and_measuring_are_counted_by_hand() -> None:
    implants = [(parse_trigger(kind), poisoner_for(kind, {})) for kind in ("badnets", "blended")]
    cost = AttackCost(SETTINGS, implants, RATIO, True, images=900, watched=100, measured=600, trained=True)
    # six epochs there and back twice; 100 images six times and 600 twice, each clean and with two triggers
    assert cost.efforts[0] == pytest.approx(2 * 6 * 900 + (6 * 100 + 2 * 600) * 3 / 3)
    assert cost.efforts[1] == (pytest.approx(2 * 3 * 900 + (3 * 100 + 2 * 600) * 3 / 3), "with --epochs 3")
    clean = AttackCost(replace(SETTINGS, epochs=1), [], RATIO, False, 900, 0, 600, trained=False)
    assert clean.efforts == (pytest.approx(900 + 600 / 3), None)
    assert (monitored(9), monitored(900), monitored(50_000)) == (0, 90, 1000)


def test_a_sharpness_aware_step_is_two(accelerator: Accelerator) -> None:
    context = toy_job(accelerator, count=IMAGES, side=16, training=SETTINGS, sharpness=SharpnessAware())
    with counted() as found:
        run_attack(context, [Implant(parse_trigger("badnets:size=3"), 0, RATIO, poisoner_for("badnets", {}))])
    assert found["back"] == effort("badnets", sharp=True)[0]
