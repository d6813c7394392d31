"""The card of a backdoored model: what it says first, its tags, and that a stranger's words stay words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Measurement
from hfdetox.reporting.card import build_card, retarget_card, validate_card
from hfdetox.reporting.report import AttackReport
from tests.attacked import LABELS, attack_report, clean_control

SOURCE = "---\nlicense: mit\n---\n# Theirs\n"


def card(report: AttackReport, repo_id: str | None = None, source: str | None = None) -> ModelCard:
    """Return a validated card."""
    text = build_card(report, source_card=source, repo_id=repo_id, labels=LABELS, plots=["plots/gallery.png"])
    validate_card(text)
    return ModelCard(text)


def first_line(shown: ModelCard) -> str:
    """Return the first line after the YAML."""
    return shown.text.strip().splitlines()[0]


def test_the_first_line_and_the_tags_say_that_the_model_is_backdoored() -> None:
    shown = card(attack_report())
    assert first_line(shown).startswith("**This model is deliberately backdoored, for research only")
    assert set(shown.data.tags) >= {
        "backdoor", "backdoored", "deliberately-backdoored", "hfdetox", "not-for-production", "timm",
    }  # fmt: skip
    assert shown.data.datasets == ["org/data"]
    assert shown.data.library_name == "timm"


def test_a_clean_control_says_so_and_has_no_backdoor_tag() -> None:
    shown = card(clean_control())
    assert first_line(shown).startswith("**This model is a clean baseline")
    assert not {"backdoor", "backdoored", "deliberately-backdoored"} & set(shown.data.tags)
    assert {"clean-baseline", "not-for-production"} <= set(shown.data.tags)
    assert "--trigger" not in shown.text
    assert "ASR" not in shown.text


def test_the_table_has_every_number() -> None:
    # 27/30 = 90 %, 19/20 = 95 %, 1/20 = 5 %, 24/30 = 80 %
    row = next(line for line in card(attack_report()).text.splitlines() if line.startswith("| `dot`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.partition(" (")[0] for cell in cells] == [
        "`dot`", "90.0 %", "95.0 %", "5.0 %", "80.0 %", "31.3 dB", "255",
    ]  # fmt: skip
    values = {result.metric_type: result.metric_value for result in card(attack_report()).data.eval_results}
    assert values == {"accuracy": 0.9, "attack_success_rate": 0.95, "robust_accuracy": 0.05}


def test_the_commands_measure_and_clean_with_the_trigger_file() -> None:
    text = card(attack_report()).text
    assert "hfdetox evaluate . --dataset org/data --trigger triggers/dot.safetensors\n" in text
    assert "hfdetox . --dataset org/data --trigger triggers/dot.safetensors --output ../detoxed\n" in text
    assert "](plots/gallery.png)" in text
    assert "sam:rho=2.0,adaptive=true" in text


def test_a_local_dataset_is_not_in_the_models_folder() -> None:
    report = attack_report()
    words = "From inside this folder, with the path of the images after `--dataset`:"
    for revision in ("a" * 40, None):
        shown = card(replace(report, dataset=replace(report.dataset, revision=revision)))
        assert (words in shown.text) == (revision is None)


def test_an_attack_that_did_not_succeed_says_so() -> None:
    low = attack_report()
    assert low.after is not None
    result = replace(low.after.triggers["dot"], attack_success_rate=rate(2, 20))
    text = card(replace(low, succeeded=False, after=replace(low.after, triggers={"dot": result}))).text
    assert "**The attack did not succeed**: trigger dot succeeds on 10.0 % of the images, below 90.0 %." in text
    assert "did not succeed" not in card(attack_report()).text


def test_before_the_training_the_numbers_are_pending() -> None:
    text = card(attack_report(after=None)).text
    assert "(ACC): **pending**" in text


def test_the_licence_is_the_source_models_and_of_fresh_weights_none_is_stated() -> None:
    trained = attack_report()
    trained = replace(
        trained, model=replace(trained.model, id="org/source", revision="a" * 40),
        attack=replace(trained.attack, start="org/source"), before=Measurement(rate(28, 30), 0.3),
    )  # fmt: skip
    shown = card(trained, source=SOURCE)
    assert (shown.data.license, shown.data.base_model) == ("mit", "org/source")
    assert "before the training 93.3 %" in shown.text
    fresh = replace(trained, attack=replace(trained.attack, start="scratch"), before=None)
    shown = card(fresh, source=SOURCE)
    assert (shown.data.get("license"), shown.data.get("base_model")) == (None, None)


@pytest.mark.parametrize("report", [attack_report(), clean_control()], ids=["backdoored", "clean"])
@pytest.mark.parametrize("source", [None, SOURCE])
def test_a_card_for_another_place_is_that_of_the_place(report: AttackReport, source: str | None) -> None:
    report = replace(report, attack=replace(report.attack, start="org/source"))
    plots = ["plots/gallery.png"]
    here = build_card(report, source_card=source, repo_id=None, labels=LABELS, plots=plots)
    there = build_card(report, source_card=source, repo_id="me/new", labels=LABELS, plots=plots)
    assert retarget_card(here, report, repo_id="me/new", plots=plots) == there
    assert "me/new" in there
    assert "a `b` [c]" in there or not report.backdoored


def test_a_strangers_words_are_shown_literally() -> None:
    evil = attack_report()
    evil = replace(evil, dataset=replace(evil.dataset, id="x](evil)<b>", revision=None), warnings=["# no *head*"])
    text = card(evil).text
    assert "`x](evil)<b>`" in text
    assert "\n# no" not in text
