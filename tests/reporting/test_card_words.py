"""Sentences of the card that a setting could make false: each says what is so."""

from __future__ import annotations

from dataclasses import replace

import yaml
from huggingface_hub import ModelCard

from hfdetox.defenses import parse_defense
from hfdetox.evaluation.results import ClassAccuracies, Rate
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.card_data import eval_results
from hfdetox.reporting.report import Report
from tests.attacked import attack_report
from tests.reporting.test_card import table_row
from tests.reporting.test_leaderboard import BENCHMARK
from tests.written_report import card_of, written_report

NOTHING_CHOSEN = "Nothing in the run was chosen by looking at a known trigger."


def with_defense(**changes: object) -> Report:
    report = written_report()
    return replace(report, defense=replace(report.defense, **changes))  # type: ignore[arg-type]


def test_a_defense_that_was_given_a_trigger_says_so() -> None:
    own = card_of(written_report())
    assert NOTHING_CHOSEN in own
    assert "knows neither trigger nor target" in own
    assert "play no part in the defense" in own
    given = card_of(with_defense(trigger_given=True))
    assert NOTHING_CHOSEN not in given
    assert "**The defense was given a known trigger, the setting `trigger` below, and fitted to it**" in given
    assert "The defender knows the trigger that the settings name" in given
    assert "neither trigger nor target" not in given
    assert "play no part in the defense" not in given


def test_without_a_trigger_to_measure_it_is_not_said_that_none_was_known() -> None:
    report = replace(with_defense(trigger_given=True), defense_effectiveness_rating=None)
    assert report.before
    assert report.after
    report = replace(report, before=replace(report.before, triggers={}), after=replace(report.after, triggers={}))
    card = card_of(report)
    assert "**No trigger was given to measure with, so no backdoor was measured.**" in card
    assert "No trigger was given to measure with, so **no backdoor was measured" in card
    assert "was known" not in card


def test_settings_of_a_persons_own_are_not_called_chosen_without_a_trigger() -> None:
    card = card_of(with_defense(preset=None))
    assert NOTHING_CHOSEN not in card
    assert "The defense was given no trigger; its settings are those of the person who ran it." in card


def test_what_bna_did_is_said_of_each_of_its_routes() -> None:
    for settings, words, given in (
        ({}, ("a trigger that it estimated", "beside the weights, which it did not change"), False),
        ({"trigger": "badnets"}, ("the known trigger that it was given", "beside the weights"), True),
        ({"result": "fold"}, ("a trigger that it estimated", "in the norms' weights"), False),
    ):
        method, _ = parse_defense("bna", settings)
        assert all(part in method.describe("9 trusted images") for part in ("on 9 trusted images", *words))
        assert method.trigger_given is given


def test_descriptions_follow_the_settings() -> None:
    def described(name: str, **settings: str) -> str:
        return parse_defense(name, settings)[0].describe("9 images")

    assert "perturbations" in described("ims")
    assert "perturbations" not in described("ims:no-perturbation")
    assert "held out" not in described("ft")
    assert described("ft", reweight="class").endswith("was held out, and weighted the others (`reweight: class`).")


def test_a_run_that_changed_nothing_says_so() -> None:
    words = "It found nothing that it would change, and returned the model as it came."
    assert words not in card_of(written_report())
    assert words in card_of(replace(written_report(), history=[{"phase": "bna-detection", "unchanged": 1.0}]))


def test_images_that_the_models_author_chose_are_not_called_trusted() -> None:
    report = with_defense(description="")
    assert "with the help of 1,250 trusted images" in card_of(report)
    card = card_of(replace(report, dataset=replace(report.dataset, named_by_card=True)))
    assert "with the help of 1,250 images that the model's author chose" in card
    assert "trusted images" not in card
    assert "**Here the dataset was named by the model's own card" in card


def test_the_number_of_images_is_said_and_not_called_few() -> None:
    card = card_of(written_report())
    assert "1,250 correctly labelled images that the attacker did not touch" in " ".join(card.split())
    assert "a few" not in card


def test_parts_of_one_split_are_said() -> None:
    words = "disjoint parts of one split"
    report = written_report()
    assert words not in card_of(report)
    assert words in card_of(replace(report, dataset=replace(report.dataset, eval_split="train")))


def test_several_processes_are_part_of_how_to_repeat_it() -> None:
    assert "accelerate launch" not in card_of(written_report())
    assert "put `accelerate launch --num_processes 2 -m` before it" in card_of(with_defense(devices=["cpu", "cpu"]))


def test_a_command_with_shortened_paths_says_so() -> None:
    words = "Of local paths only the last part is shown"
    report = written_report()
    for command, said in (("hfdetox org/model --dataset org/data", False), ("hfdetox ./model --dataset ./data", True)):
        shown = card_of(replace(report, environment=replace(report.environment, command=command)))
        assert command in shown
        assert (words in shown) == said


def test_every_class_is_in_the_report_only_where_it_is() -> None:
    report, words = written_report(), "beyond the worst class"
    assert words not in card_of(report)
    assert report.before
    classes = ClassAccuracies([0.9, 0.5], 1, Rate(0.5, 5, 10, (0.2, 0.8)), 0.2)
    assert words in card_of(replace(report, before=replace(report.before, classes=classes)))


# --- a correction, which hfdetox alone applies ---


def corrected() -> Report:
    """Return a report of which the model without its correction is 93.0 % right, and falls for every trigger."""
    report = written_report()
    assert report.before
    return replace(report, uncorrected=replace(report.before, accuracy=Rate(0.93, 558, 600, (0.9066, 0.9491))))


def test_published_numbers_are_those_of_the_models_own_library() -> None:
    report = corrected()
    card = card_of(report)
    found = {(r.metric_type, r.metric_config): r.metric_value for r in ModelCard(card).data.eval_results}
    assert found == {
        ("accuracy", None): 0.93,
        ("attack_success_rate", "badnets"): 0.955,
        ("robust_accuracy", "badnets"): 0.0425,
        ("attack_success_rate", "blended"): 0.8,
        ("robust_accuracy", "blended"): 0.19,
    }
    [text] = eval_results(report, BENCHMARK.format(scale="a fraction")).values()
    assert [entry["value"] for entry in yaml.safe_load(text)] == [0.93]


def test_the_corrected_numbers_stand_beside_them_by_name() -> None:
    card = card_of(corrected())
    assert "| | Before | After, uncorrected | After, with hfdetox |" in card
    accuracy = ["93.5 % (561 of 600; 91.2–95.3)", "93.0 % (558 of 600; 90.7–94.9)", "91.5 % (549 of 600; 89.0–93.6)"]
    assert table_row(card, "Accuracy (ACC)") == accuracy
    assert [part[:6] for part in table_row(card, "ASR of `badnets`")] == ["95.5 %", "95.5 %", "1.2 % "]
    assert table_row(card, "DER of `badnets`") == ["–", "–", "96.1 % (94.4–97.7)"]
    assert "Loaded with its own library: **Not mitigated** for at least one" in card
    assert "Loaded with hfdetox, which applies a correction: **Reduced, not mitigated**" in card
    assert "): **not mitigated** without the correction, **mitigated** with it" in card
    assert "Loaded with timm or transformers alone, the model is the uncorrected one" in card
    assert 'load_classifier("me/net-detoxed")' in card
    assert "uncorrected" not in card_of(written_report())


def test_the_card_of_an_attack_on_a_corrected_model_too() -> None:
    report = attack_report()
    assert report.after
    plain = replace(report.after, accuracy=Rate(0.8, 24, 30, (0.61, 0.92)))
    card = build_card(replace(report, uncorrected=plain), source_card=None, repo_id=None)
    validate_card(card)
    assert ModelCard(card).data.eval_results[0].metric_value == 0.8
    assert "**80.0 % (24 of 30; 61.0–92.0)**, and the card's metadata states the numbers of that" in " ".join(
        card.split()
    )
