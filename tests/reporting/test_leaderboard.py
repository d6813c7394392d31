"""What goes to a dataset's leaderboard, in the scale that its own words ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import constants, parse_eval_result_entries

from hfdetox.reporting.card import build_card, retarget_card
from hfdetox.reporting.card_data import accuracy_tasks, eval_results
from tests.written_report import DATA_COMMIT, LABELS, card_of, written_report

BENCHMARK = """name: Pictures
description: Accuracy on the test split, reported as {scale}.
evaluation_framework: pictures-eval
tasks:
- id: pictures_accuracy
  config: plain
  split: test
"""


@pytest.mark.parametrize(
    ("scale", "value"),
    [("a fraction", 0.915), ("a number from 0 to 1", 0.915), ("percentages (0-100)", 91.5), ("a percentage", 91.5)],
)
def test_accuracy_goes_to_the_leaderboard_in_its_scale(scale: str, value: float) -> None:
    written = eval_results(written_report(), BENCHMARK.format(scale=scale))
    assert list(written) == [".eval_results/org__pictures.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(written[".eval_results/org__pictures.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (
        "org/pictures",
        "pictures_accuracy",
        DATA_COMMIT,
    )
    assert entry.value == value
    assert "attack" not in written[".eval_results/org__pictures.yaml"]


def test_nothing_goes_to_a_leaderboard_that_does_not_ask_for_this_number() -> None:
    report, fits = written_report(), BENCHMARK.format(scale="a fraction")
    assert eval_results(report, fits)
    assert eval_results(report, None) == {}
    assert eval_results(report, fits, whole_split=False) == {}
    assert eval_results(replace(report, after=None), fits) == {}
    assert eval_results(replace(report, dataset=replace(report.dataset, revision=None)), fits) == {}
    assert eval_results(report, BENCHMARK.format(scale="a number")) == {}  # no scale stated
    assert eval_results(report, BENCHMARK.format(scale="a fraction or a percentage")) == {}
    for old, new in (
        ("split: test", "split: validation"),
        ("config: plain", "config: other"),
        ("_accuracy", "_asr"),
        ("_accuracy", "_robust_accuracy"),
        ("tasks:", "task:"),
        ("name: Pictures", "name: ["),
    ):
        assert old in fits
        assert eval_results(report, fits.replace(old, new)) == {}


def test_tasks_are_chosen_by_their_own_words() -> None:
    several = """
description: Attack success and accuracy.
evaluation_framework: inspect-ai
tasks:
- {id: top1, split: test}
- {id: asr, split: test, metrics: [attack_success_rate]}
- {id: percent, metrics: [{name: accuracy_percent}]}
- {id: plain_name}
- {id: acc-loss, metrics: [loss]}
- 3
"""
    assert accuracy_tasks(several, config=None, split="test") == {"top1": "fraction", "percent": "percent"}
    assert accuracy_tasks(several, config="default", split="train") == {}
    for text in ("[]", "a: 2026-13-41", "a: !!bool maybe", "[" * 3000):
        assert accuracy_tasks(text, config=None, split="test") == {}


def test_the_card_links_the_view_that_shows_the_model() -> None:
    """The default view leaves out models that declare a base model; the address is that of the client's own request."""
    report = written_report()
    view = f"{constants.ENDPOINT}/api/datasets/org/pictures/leaderboard?base_model=false"
    card = card_of(report, on_leaderboard=True)
    assert f"]({view})" in card
    assert 'get_dataset_leaderboard("org/pictures", base_model_only=False)' in card
    assert view not in card_of(report)
    # another place, and a source that speaks of the leaderboard itself
    assert f"]({view})" in retarget_card(card, report, repo_id="me/other")
    assert view not in retarget_card(card_of(report), report, repo_id="me/other")
    quoted = build_card(report, source_card=f"See {view}", repo_id=None, labels=LABELS)
    assert retarget_card(quoted, report, repo_id=None) == quoted
    # one of a local folder declares no base model, and is in the default view
    local = replace(report, model=replace(report.model, revision=None))
    assert "leaderboard of `org/pictures`" in card_of(local, on_leaderboard=True)
    assert view not in card_of(local, on_leaderboard=True)
