"""The card against a report written by hand: every number read back, every condition of its words, hostile strings."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from hfdetox.errors import UsageError
from hfdetox.evaluation.results import ClassAccuracies, Rate, Rating
from hfdetox.evaluation.verdict import run_verdict
from hfdetox.hub.cards import check_card
from hfdetox.reporting.card import CardError, build_card, retarget_card, split_card, validate_card
from hfdetox.reporting.markdown import empty_sections
from hfdetox.reporting.report import OutputInfo
from tests.hub_server.cards import check
from tests.hub_server.server import HubServer
from tests.written_report import DATA_COMMIT, MODEL_COMMIT, SOURCE, card_of, written_report


def own_words(card: str) -> str:
    return split_card(card)[1].partition("## Card of the source model")[0]


def table_row(card: str, name: str) -> list[str]:
    rows = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1
    return [part.strip() for part in rows[0].strip("|").split(" | ")][1:]


def test_every_number_is_read_back_from_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_of(written_report(), SOURCE), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("someone/net", "finetune")
    assert (data.license, data.license_name, data.license_link) == ("other", "house-licence", "LICENSE")
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("timm", "image-classification", ["org/pictures"])
    assert data.tags == ["hfdetox", "backdoor-defense", "d3", "timm"]
    assert data.model_name == "net-detoxed"
    found = {(r.metric_type, r.metric_config): r.metric_value for r in data.eval_results}
    assert found == {
        ("accuracy", None): 0.915,
        ("attack_success_rate", "badnets"): 0.0125,
        ("robust_accuracy", "badnets"): 0.9,
        ("attack_success_rate", "blended"): 0.35,
        ("robust_accuracy", "blended"): 0.6,
    }
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("org/pictures", "plain", "test")
        assert result.dataset_revision == DATA_COMMIT
    assert data.eval_results[1].metric_args == {"trigger": "badnets:size=3", "mode": "native", "target": 2}


def test_the_worst_class_has_a_row_where_it_is_known() -> None:
    report = written_report()
    assert "worst class |" not in card_of(report)
    worse, worst = (ClassAccuracies([0.9, low], 1, Rate(low, low_count, 50, (low - 0.1, low + 0.1)), 0.1)
                    for low, low_count in ((0.6, 30), (0.4, 20)))  # fmt: skip
    assert report.before is not None
    assert report.after is not None
    before, after = replace(report.before, classes=worse), replace(report.after, classes=worst)
    row = ["60.0 % (30 of 50; 50.0–70.0)", "40.0 % (20 of 50; 30.0–50.0)"]
    assert table_row(card_of(replace(report, before=before, after=after)), "Accuracy of the worst class") == row


def test_every_number_is_read_back_from_the_table() -> None:
    card = card_of(written_report())
    assert table_row(card, "Accuracy (ACC)") == ["93.5 % (561 of 600; 91.2–95.3)", "91.5 % (549 of 600; 89.0–93.6)"]
    assert table_row(card, "Loss (mean cross-entropy)") == ["0.211", "0.255"]
    assert table_row(card, "ASR of `badnets`") == ["95.5 % (382 of 400; 93.0–97.3)", "1.2 % (5 of 400; 0.4–2.9)"]
    assert table_row(card, "RA of `badnets`") == ["4.2 % (17 of 400; 2.5–6.7)", "90.0 % (360 of 400; 86.6–92.8)"]
    assert table_row(card, "DER of `badnets`") == ["–", "96.1 % (94.4–97.7)"]
    assert table_row(card, "ASR of `blended`") == ["80.0 % (320 of 400; 75.7–83.8)", "35.0 % (140 of 400; 30.3–39.9)"]
    assert table_row(card, "DER of `blended`") == ["–", "71.5 % (68.5–74.4)"]
    assert table_row(card, "DER, mean") == ["–", "83.8 % (82.0–85.6)"]
    assert "Accuracy went from 93.5 % to 91.5 % (−2.0 points)." in card


def test_the_text_says_how_it_was_made() -> None:
    card = card_of(written_report())
    for words in (
        "`someone/net`, commit `" + MODEL_COMMIT,
        "1,250 of split `train`",
        "600 of split `test`",
        "Layers: `fc`",
        "100 epochs, 1,000 steps, 61.2 s at 2041 images per second in `bf16` on `cpu`",
        "| `epsilon` | `0.1` |",
        '| `layers` | `["head"]` |',
        "| `nesterov` | `false` |",
        "preset `paper`",
        "Seed 7;",
        "```bash\nhfdetox someone/net --dataset org/pictures --seed 7\n```",
        f"`--revision {MODEL_COMMIT} --dataset-revision {DATA_COMMIT}`",
        "c4" * 32,
        "e5" * 32,
        "f6" * 32,
        "## What was not measured",
        "## Threat model",
        "(target `bird|nest`, mode `native`",
    ):
        assert words in card
    assert "## Warnings" not in card
    warned = card_of(replace(written_report(), warnings=["the author chose <it> | [x](y)"]))
    assert "## Warnings of the run\n\n- the author chose &lt;it&gt; \\| \\[x\\](y)\n" in warned
    command = replace(written_report().environment, command=f"hfdetox someone/net --revision {MODEL_COMMIT}")
    assert f"add `--dataset-revision {DATA_COMMIT}`" in card_of(replace(written_report(), environment=command))


def test_the_defense_speaks_for_itself() -> None:
    report = written_report()
    assert "fine-tuned the model on 1,250 trusted images while pushing" in card_of(report)
    foreign = card_of(replace(report, defense=replace(report.defense, name="other*", description="")))
    assert "The defense `other*` changed the model with the help of 1,250 trusted images." in foreign
    assert "pushing" not in foreign


def test_what_the_method_chose_is_listed_as_plain_words() -> None:
    report = written_report()
    chosen = replace(report.defense, choices=["ε = 0.3: the *median* | of <it>."])
    assert "- ε = 0.3: the \\*median\\* \\| of &lt;it&gt;.\n- Run: 100 epochs" in card_of(
        replace(report, defense=chosen)
    )


def test_a_run_of_objects_has_no_command() -> None:
    report = written_report()
    card = card_of(replace(report, environment=replace(report.environment, command="")))
    assert "```bash" not in card
    assert "It was run through the Python API with the parameters above." in card


@pytest.mark.parametrize("triggers", [True, False])
def test_no_verdict_says_clean(triggers: bool) -> None:
    words = own_words(card_of(written_report(triggers=triggers), SOURCE)).lower()
    assert "backdoor-free" not in words
    assert "free of backdoors" not in words
    assert not re.search(r"\b(is|are|now|found|verdict:?) \**clean\b", words)


def test_without_triggers_it_says_that_no_backdoor_was_measured() -> None:
    report = written_report(triggers=False)
    card = card_of(report)
    assert run_verdict(report.before, report.after) is None
    assert "**No trigger was known, so no backdoor was measured.**" in card
    assert "**no backdoor was measured, neither before nor after**" in card
    assert "Any trigger at all" in card
    assert not re.search(r"\b(ASR|DER|RA) of\b|itigated", card)
    assert "attack_success_rate" not in card
    assert empty_sections(own_words(card)) == []


def test_pending_cards_are_valid_and_claim_nothing() -> None:
    report = written_report()
    known = card_of(replace(report, after=None, defense_effectiveness_rating=None, output=OutputInfo()), SOURCE)
    assert table_row(known, "Accuracy (ACC)") == ["93.5 % (561 of 600; 91.2–95.3)", "pending"]
    assert table_row(known, "ASR of `badnets`") == ["95.5 % (382 of 400; 93.0–97.3)", "pending"]
    assert known.count("): **pending**") == 2
    assert {result.metric_value for result in ModelCard(known).data.eval_results} == {"pending"}
    unknown = card_of(replace(report, before=None, after=None, defense_effectiveness_rating=None))
    assert table_row(unknown, "Accuracy (ACC)") == ["pending", "pending"]
    for card in (known, unknown):
        assert "**Its numbers are still pending.**" in card
        assert "No trigger was known" not in card
        assert "images per second" not in card


def test_the_licence_is_taken_over_or_left_out_never_guessed() -> None:
    plain = card_of(written_report(), "---\nlicense: mit\n---\nhello")
    assert ModelCard(plain).data.license == "mit"
    assert "The source model's card states `mit`; this model keeps it." in plain
    several = ModelCard(card_of(written_report(), "---\nlicense: [mit, apache-2.0]\n---\n")).data
    assert several.license == ["mit", "apache-2.0"]
    for source in (
        None,
        "# no YAML, but the MIT license is named",
        "---\nlicense: [\n---\nbroken YAML",
        "---\nlicense: 3\n---\n",
        "---\n- a list\n---\n",
        "---\nd: 2026-13-41\n---\n",
        "---\nd: !!bool maybe\n---\n",
        "---\nd: !!timestamp soon\n---\n",
        f"---\nd: {'9' * 5000}\n---\n",
        f"---\nd: {'[' * 3000}\n---\n",
    ):
        card = card_of(written_report(), source)
        assert ModelCard(card).data.license is None
        assert "states no licence that could be read" in card


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("license: agpl-3.0-or-later", ("other", "agpl-3.0-or-later")),
        ("license: MIT", ("mit", None)),
        ("license: [mit, house rules]", ("other", "mit, house rules")),
        ("license: other\nlicense_name: theirs", ("other", "theirs")),
        ("license: nc-only\nlicense_name: theirs", ("other", "theirs")),
        ('license: "a\\e[31m\\nb"', ("other", "a [31m b")),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_other_with_its_name(source: str, found: tuple[str, str]) -> None:
    card = card_of(written_report(), f"---\n{source}\n---\n# net\n")
    data = ModelCard(card).data
    assert (data.license, data.get("license_name")) == found
    assert check(card, "model")[0] == []
    # and it stays so when the card is written for another place
    assert ModelCard(retarget_card(card, written_report(), repo_id="me/x")).data.license == found[0]


def test_the_source_card_is_kept_below_and_never_evaluated() -> None:
    card = card_of(written_report(), SOURCE)
    _, _, kept = card.partition("<!-- hfdetox: card of the source model -->")
    url = f"{constants.ENDPOINT}/someone/net"
    assert kept.strip() == (
        f"### Net\n\nA net, see [the licence]({url}/blob/{MODEL_COMMIT}/LICENSE) and "
        f"![curve]({url}/resolve/{MODEL_COMMIT}/img/curve.png). {{{{ 7 * 7 }}}} {{% raw %}}"
    )
    assert card.count("## Card of the source model") == 1
    assert "## Card of the source model" not in card_of(written_report(), "---\nlicense: mit\n---\n")
    assert "## Card of the source model" not in card_of(written_report(), None)


def test_cards_of_cards_stay_of_bounded_length() -> None:
    card, lengths = SOURCE, []
    for _ in range(5):
        card = card_of(written_report(), card)
        lengths.append(len(card))
        assert card.count("### Net") == 1
        assert card.count("A net, see [the licence]") == 1
        assert card.count("\n## Threat model") == 1
    assert card.count("Threat model") == 2  # its own and the last run's
    assert lengths[1] == lengths[2] == lengths[4]


def test_local_models_and_images_are_not_passed_off_as_repositories() -> None:
    report = written_report()
    report = replace(
        report,
        model=replace(report.model, id="/home/jo/secret/net", revision=None),
        dataset=replace(report.dataset, id="/home/jo/pictures", revision=None, config=None),
    )
    card = build_card(report, source_card="[a](b.md) ![c](d.png)", repo_id=None, labels=None)
    validate_card(card)
    data = ModelCard(card).data
    assert (data.base_model, data.get("base_model_relation"), data.datasets) == (None, None, None)
    assert data.eval_results[0].dataset_type == "imagefolder"
    assert data.eval_results[0].dataset_name == "pictures"
    assert data.model_name == "net-detoxed"
    assert "/home/jo" not in card
    assert "--revision" not in card
    assert "(target `2`" in card
    assert card.rstrip().endswith("a c")  # a relative name would show a file of this repository


def test_an_all_to_all_trigger_is_told_from_one_with_a_target() -> None:
    report = written_report()
    assert report.before
    known = report.before.triggers
    moved = replace(known["badnets"], target="all-to-all", spec="badnets:target=all-to-all")
    report = replace(report, before=replace(report.before, triggers={**known, "badnets": moved}))
    card = card_of(report)
    bullet = "- `badnets` (target every class to the next one, mode `native`, made by `--trigger` `badnets:tar"
    assert bullet in card
    assert "(target `bird|nest`, mode `native`" in card
    rule = "all images are counted, and the target is the class after the true one"
    assert rule in card
    assert rule not in card_of(written_report())
    metrics = [r.metric_args for r in ModelCard(card).data.eval_results if r.metric_config == "badnets"]
    assert {args["target"] for args in metrics} == {"all-to-all"}
    assert retarget_card(card, report, repo_id="me/net-detoxed") == card


HOSTILE = "x`y``|<b>\n## Owned\n[z](http://h) {{ 1 }}"


def test_hostile_names_stay_inside_their_cells() -> None:
    report = written_report()
    assert report.before
    assert report.after
    report = replace(
        report,
        before=replace(report.before, triggers={HOSTILE: report.before.triggers["badnets"]}),
        after=replace(report.after, triggers={HOSTILE: replace(report.after.triggers["badnets"], spec=HOSTILE)}),
        defense_effectiveness_rating={HOSTILE: Rating(0.9, (0.8, 1.0)), "mean": Rating(0.9, (0.8, 1.0))},
        defense=replace(report.defense, parameters={HOSTILE: HOSTILE}, layers=[HOSTILE]),
        warnings=[HOSTILE],
        model=replace(report.model, architecture=HOSTILE),
        environment=replace(report.environment, command=f"hfdetox 'a\n```\n## Owned\n{HOSTILE}'"),
    )
    card = build_card(report, source_card=None, repo_id=None, labels=[HOSTILE] * 3)
    validate_card(card)
    assert ModelCard(card).data.eval_results[1].metric_config == HOSTILE
    body = split_card(card)[1]
    outside = re.sub(r"^````bash\n.*?^````$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert "\n## Owned" in body  # in the fenced command, where it is no heading
    assert "\n## Owned" not in outside
    assert "{{ 1 }}" in outside
    for line in outside.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)  # the cells of a two- or three-column table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("---\n", "+++\n"), "no YAML block"),
        (("base_model: someone/net", "base_model: [broken"), "not valid"),
        (("base_model: someone/net", "base_model: some one/net"), "'some one/net' in the model card is not the id"),
        (("- org/pictures", "- a/b/c"), "'a/b/c' in the model card is not the id"),
        (("pipeline_tag: image-classification", "pipeline_tag: 3"), "field pipeline_tag must be text"),
        (("license: other", "license: 3"), "field license must be a list of texts"),
        (("- d3\n", "- 3\n"), "field tags must be a list of texts"),
        (("value: 0.0125", "value: .nan"), "'attack_success_rate' must be a finite number"),
        (("value: 0.915", "value: true"), "'accuracy' must be a finite number"),
        (("    metrics:\n", "    metric:\n"), "not valid"),
        (("## Threat model\n", "## Threat model\n\n## Other\n"), "section without text: ## Threat model"),
    ],
)
def test_validation_names_what_the_hub_would_refuse(change: tuple[str, str], message: str) -> None:
    card = card_of(written_report(), SOURCE)
    assert change[0] in card
    with pytest.raises(CardError, match=re.escape(message)) as caught:
        validate_card(card.replace(*change))
    assert isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


def test_the_hub_accepts_the_card(hub: HubServer) -> None:
    for report in (written_report(), replace(written_report(), after=None), written_report(library="torch")):
        check_card(card_of(report, SOURCE))
    assert [request.status for request in hub.log if request.path.startswith("/api/validate-yaml")] == [200] * 3


def test_plots_are_shown_where_they_exist() -> None:
    names = ("before_after", "training", "weight_changes", "samples")
    card = card_of(written_report(), plots=[f"plots/{name}.png" for name in names])
    assert re.findall(r"!\[[^\]]+\]\(plots/(\w+)\.png\)", card) == [
        "before_after",
        "samples",
        "training",
        "weight_changes",
    ]
    assert "plots/" not in card_of(written_report(), plots=[])


def test_templates_are_package_data() -> None:
    names = {entry.name for entry in files("hfdetox.cards").iterdir()}
    assert {"model_card.md.jinja", "load_timm.md.jinja", "load_transformers.md.jinja", "load_torch.md.jinja"} <= names
