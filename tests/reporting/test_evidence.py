"""What was found without the attacker's trigger, in the report, on the card, in the model-index and on the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from hfdetox.cli.findings import error_cells, evidence_lines
from hfdetox.errors import UsageError
from hfdetox.evaluation.metrics import rate
from hfdetox.evidence.results import Agreement, Moved
from hfdetox.reporting.card import signed
from hfdetox.reporting.plots import draw_before_after, house_style
from hfdetox.reporting.report import SCHEMA_VERSION, Report
from tests.evidence.made import evidence, residual, scan
from tests.written_report import card_of, written_report


def report(*, triggers: bool = True, finished: bool = True) -> Report:
    return replace(written_report(triggers=triggers), evidence=evidence(finished=finished))


def test_a_report_with_evidence_is_read_again_as_it_was(tmp_path: Path) -> None:
    given = report()
    given.save(tmp_path)
    assert Report.load(tmp_path) == given
    plain = json.loads((tmp_path / Report.NAME).read_text())
    assert plain["schema_version"] == SCHEMA_VERSION == 4
    assert plain["evidence"]["before"]["scores"]["latent-shift"]["statistic"] == 7.25


def test_a_report_of_schema_3_is_read_and_has_none(tmp_path: Path) -> None:
    plain = written_report().to_dict() | {"schema_version": 3}
    del plain["evidence"]
    assert Report.from_dict(plain).evidence is None
    with pytest.raises(UsageError, match="schema version 5"):
        Report.from_dict(plain | {"schema_version": 5})


@pytest.mark.parametrize("triggers", [True, False])
def test_the_card_says_what_was_found_and_with_which_errors(triggers: bool) -> None:
    card = card_of(report(triggers=triggers))
    section = card.partition("## Without the attacker's trigger")[2].partition("\n## ")[0]
    assert "**None of them says that the model has no backdoor**" in section
    assert "Before: **suspicious**, class `bird|nest`; patch and blend are above." in section
    assert "After: **no evidence found**; " in section
    assert "false alarms 1 of 20 (0.1–24.9 %), found 18 of 20 (68.3–98.8 %)" in section
    assert "Scar: `bird|nest` is harder to reach" in section
    assert "97.2 % (389 of 400; 95.1–98.6)" in section
    assert "1.8 % (7 of 400; 0.7–3.6)" in section
    assert "no failure in as many would bound a rate at 0.73 % at best; 3 exact duplicates" in section
    assert "every class after cleaning" in section
    assert "`plane` −0.3 (+0.1), `car` ∞ (−0.2), `bird|nest` +9.0 (−7.2)." in section
    assert "does not show that a backdoor is gone" in section
    assert "`car`, 10.0 % (20 of 200; 6.2–15.0), most of them now `plane`." in section
    # a threshold that was not measured claims no rate
    line = next(line for line in section.splitlines() if line.startswith("| `scar`, after"))
    assert "error rates not measured" in line
    assert " clean model" not in section


def test_the_first_lines_of_the_card_say_what_the_scores_found_and_what_woke_up() -> None:
    given = report(triggers=False)
    tested = replace(evidence(), residual={"reconstructed-patch-2": residual()})
    top = card_of(replace(given, evidence=tested)).partition("## Results")[0]
    said = (
        "Without one, scores say of the model as it came **suspicious** (class `bird|nest`), of this one **no evidence"
    )
    assert said in top
    assert "Tuning the cleaned model again raised the success of a trigger from 4.0 % to 64.0 %." in top
    guessed = replace(scan("no evidence found", after=True), combined=None)
    top = card_of(replace(given, evidence=replace(tested, after=guessed, residual={}))).partition("## Results")[0]
    assert "**no evidence found**, by thresholds whose errors were not measured" in top
    assert "Tuning" not in top
    # of a known trigger its verdict stands there
    assert "scores say" not in card_of(report()).partition("## Results")[0]
    # and what is not known is no contradiction to what was reconstructed
    assert "Any trigger that an attacker made: no attack success rate is known" in card_of(given)


def test_images_that_are_now_answered_rightly_are_no_move_to_their_own_class() -> None:
    right = Moved(1, "car", rate(20, 200), 1, "car")
    given = replace(evidence(), agreement=Agreement(rate(576, 600), [right]))
    card = card_of(replace(report(), evidence=given))
    assert "`car`, 10.0 % (20 of 200; 6.2–15.0), most of them now rightly so called." in card


def test_a_residual_test_of_a_reconstructed_trigger_names_its_class() -> None:
    given = replace(evidence(), residual={"reconstructed-patch-2": residual(), "badnets": residual()})
    card = card_of(replace(report(), evidence=given))
    assert "| `reconstructed patch for 'bird\\|nest'` | 4.0 % → " in card
    assert "| `badnets` | 4.0 % → " in card
    lines = [line for line in evidence_lines(given) if isinstance(line, str)]
    assert any(line.startswith("gone or asleep, reconstructed patch for 'bird|nest': 4.0 % →") for line in lines)


def test_numbers_have_their_sign_and_no_negative_nothing() -> None:
    assert [signed(one) for one in (-5.26, -0.04, 0.0, 7.31, None)] == ["−5.3", "+0.0", "+0.0", "+7.3", "∞"]


def test_how_often_a_threshold_is_wrong_stands_beside_it() -> None:
    found = scan(after=True).scores
    assert error_cells(found["latent-shift"]) == ("1/20, 0–25 %", "18/20, 68–99 %")
    assert error_cells(found["odd-images"]) == ("", "")
    assert error_cells(found["scar"]) == ("not measured", "not measured")


def test_what_was_reconstructed_is_no_known_trigger() -> None:
    card = card_of(report(triggers=False))
    results = card.partition("## Results")[2].partition("\n## ")[0]
    assert "reconstructed" not in results
    assert "**no backdoor was measured, neither before nor after**" in results
    rows = [one for one in ModelCard(card).data.eval_results if one.metric_type != "accuracy"]
    # who looks for a known trigger's rate must not find this one
    assert [one.metric_type for one in rows] == ["reconstructed_attack_success_rate"]
    assert [one.metric_name for one in rows] == ["Attack success rate, reconstructed patch for 'bird|nest'"]
    assert rows[0].metric_value == 0.0175
    assert rows[0].metric_args["reconstructed"] is True


def test_the_card_says_where_the_defense_was_taught_what_it_is_judged_by() -> None:
    given, said = report(), "in these rows it is judged by what it was taught"
    assert said not in card_of(given)
    unlearnt = [{"phase": "unlearn-search", "epoch": 1}, {"phase": "unlearn", "epoch": 1, "clean_loss": 0.1}]
    assert said in card_of(replace(given, history=unlearnt))
    assert said not in card_of(replace(given, history=unlearnt[:1])), "a search alone teaches nothing"


def test_a_card_that_is_checked_before_the_training_has_what_is_known_then() -> None:
    card = card_of(replace(report(finished=False), after=None))
    assert "Before: **suspicious**" in card
    assert "After: **" not in card
    rows = [one for one in ModelCard(card).data.eval_results if "reconstructed" in one.metric_name]
    assert [one.metric_value for one in rows] == ["pending"]


def test_a_card_without_evidence_has_no_such_section() -> None:
    assert "Without the attacker's trigger" not in card_of(written_report())


def test_the_picture_of_before_and_after_has_a_panel_for_what_was_reconstructed() -> None:
    with house_style():
        figure = draw_before_after(report())
        assert figure is not None
        titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[-1] == "reconstructed patch for 'bird|nest' (no known trigger)"


def test_the_terminal_says_it_in_a_line_each() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in evidence_lines(report().evidence):
        console.print(line, markup=False, soft_wrap=isinstance(line, str))
    said = console.export_text()
    assert "scan before: suspicious, 'bird|nest': patch and blend are above (false alarms 1 of 20" in said
    assert "scan after: no evidence found: " in said
    assert "reconstructed patch for 'bird|nest': 97.2 % → 1.8 % of 400 images (95.1–98.6 → 0.7–3.6)" in said
    assert "scar: 'bird|nest' is harder to reach" in said
    assert "answers as before: 96.0 % (94.1–97.4)" in said
    assert "no scan can say that a model has no backdoor" in said
    assert evidence_lines(None) == []
    grade = evidence().images
    assert grade is not None
    assert grade.described == (
        "500 clean images: no failure in as many would bound a rate at 0.73 % at best; 3 exact duplicates; 160 to 170 "
        "images a class; the model is right and sure of 64.0 %, and 1.2 % lie further from their class in its features "
        "than 99 % of those do"
    )
    assert replace(grade, sure=None, far=None).described.endswith("160 to 170 images a class")
