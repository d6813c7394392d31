"""The numbers of a bench's tables, by hand: means and intervals over seeds, averages over attacks, what is missing."""

from __future__ import annotations

import csv
import io
import multiprocessing

import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from hfdetox.bench.plots import draw_bench, draw_heatmap, draw_scatter
from hfdetox.bench.summary import MEASURED, BenchTables, averages, results
from hfdetox.errors import UsageError

DONE = {
    "name": "m-a-0.1-s0/ft-s0", "subject": "m-a-0.1-s0", "model": "m", "attack": "a-0.1", "defense": "ft",
    "samples": 0.05, "seed": 0, "clean": False, "status": "done", "reason": None, "method": "ft",
    "settings": {"epochs": 2, "layers": ["head"]}, "accuracy_before": 0.9, "accuracy": 0.8,
    "attack_success_before": 1.0, "attack_success": 0.5, "robust_accuracy_before": 0.0, "robust_accuracy": 0.4,
    "largest_share_before": 1.0, "largest_share": 0.55, "excess_before": 0.95, "excess": 0.45,
    "verdict": "not mitigated", "accuracy_verdict": "inconclusive",
    "der": 0.7, "der_low": 0.6, "der_high": 0.8, "worst_class_before": 0.5, "worst_class": 0.4, "spread_before": 0.1,
    "spread": 0.2, "epochs": 2, "steps": 20, "seconds": 10.0, "images_per_second": 100.0, "peak_memory": 2**30,
    "precision": "bf16", "device": "cpu", "dataset": "pictures", "clean_images": 2500, "eval_images": 10000,
}  # fmt: skip


def row(attack="a", defense="ft", seed=0, **changes):
    """A row of an attack, a defense and a seed, done unless `changes` say otherwise."""
    subject = f"m-{attack}-0.1-s0"
    named = {"name": f"{subject}/{defense}-s{seed}", "subject": subject, "attack": attack, "method": defense}
    return {**DONE, **named, "defense": defense, "seed": seed, **changes}


def undone(status="not run", reason=None, **where):
    """A row without numbers."""
    measured = set(MEASURED) - {"method", "settings"}
    return {**row(**where), **dict.fromkeys(measured), "status": status, "reason": reason}


def texts(lines):
    return {(line.place, line.defense): line.cells() for line in lines}


def test_the_interval_over_seeds():
    one, two, three = (
        results([row(seed=seed, der=value) for seed, value in enumerate(values)])[1].scores["der"]
        for values in ([0.25], [0.4, 0.6], [0.1, 0.2, 0.3])
    )
    assert (one.mean, one.half_width) == (0.25, None)
    # 0.4 and 0.6: mean 0.5, s = 0.1414, s/√2 = 0.1, t(0.975, 1) = 12.706
    assert two.mean == pytest.approx(0.5)
    assert two.half_width == pytest.approx(1.2706, abs=1e-4)
    # 0.1, 0.2, 0.3: s = 0.1, s/√3 = 0.057735, t(0.975, 2) = 4.302653
    assert three.half_width == pytest.approx(0.248414, abs=1e-6)


def test_one_model_with_several_defenses_and_seeds():
    first = row(defense="d3", accuracy=0.7, attack_success=0.1, seconds=30.0)
    second = row(defense="d3", seed=1, accuracy=0.9, attack_success=0.3, seconds=50.0, peak_memory=3 * 2**30)
    rows = [row(seconds=10.0), first, second]
    before, tuned, pushed = results(rows)
    assert before.cells() == ["before", "–", "90.0", "100.0", "0.0", "100.0", "95.0", "–", "50.0", "10.0", "–", "–",
                              "–"]  # fmt: skip
    assert tuned.cells() == ["ft", "1", "80.0", "50.0", "40.0", "55.0", "45.0", "70.0", "40.0", "20.0", "10", "1.0",
                             "1.0 GiB"]  # fmt: skip
    # mean of 0.7 and 0.9, ± 12.706 · 0.1; 40 s are four times 10 s; the most memory is the larger one
    assert pushed.cells() == ["d3", "2", "80.0 ± 127.1", "20.0 ± 127.1", "40.0 ± 0.0", "55.0 ± 0.0", "45.0 ± 0.0",
                              "70.0 ± 0.0", "40.0 ± 0.0", "20.0 ± 0.0", "40", "4.0", "3.0 GiB"]  # fmt: skip
    assert pushed.document()["accuracy"]["mean"] == pytest.approx(0.8)


def test_an_average_is_formed_seed_by_seed():
    """Of seed 0: (0.2 + 0.4) / 2 = 0.3, of seed 1: (0.4 + 0.2) / 2 = 0.3: between the seeds nothing varies."""
    successes = {("a", 0): 0.2, ("b", 0): 0.4, ("a", 1): 0.4, ("b", 1): 0.2}
    rows = [row(attack, seed=seed, attack_success=value) for (attack, seed), value in successes.items()]
    _, line = averages(rows)
    assert line.attacks == ("a", "b")
    assert line.cells()[3] == "30.0 ± 0.0"


def test_averages_compare_defenses_on_the_same_attacks_only():
    rows = [row(attack) for attack in "abc"] + [row(attack, "clp") for attack in "ab"]
    found = texts(averages(rows))
    assert list(found) == [("m: a, b", "before"), ("m: a, b", "ft"), ("m: a, b", "clp"),
                           ("m: a, b, c", "before"), ("m: a, b, c", "ft")]  # fmt: skip


def test_a_failed_run_is_never_left_out_of_an_average():
    rows = [row("a"), row("b"), row("a", "clp"), undone("failed", "no BatchNorm", attack="b", defense="clp")]
    found = texts(averages(rows))
    assert found["m: a, b", "ft"][2] == "80.0"
    assert found["m: a, b", "clp"][1:4] == ["0 of 1", "1 failed", "–"]
    # the other attack keeps its own numbers
    assert texts(results(rows))["m: a", "clp"][2] == "80.0"


def test_a_failed_seed_takes_its_whole_line():
    rows = [row(), undone("failed", "no room", seed=1)]
    assert texts(results(rows))["m: a", "ft"][1:3] == ["1 of 2", "1 failed"]


def test_seeds_that_were_not_run_everywhere_are_counted_and_left_out():
    rows = [row("a"), row("a", seed=1, accuracy=0.1), row("b"), undone(attack="b", seed=1), undone(attack="b", seed=2),
            undone(attack="a", seed=2)]  # fmt: skip
    (_, line) = averages(rows)
    assert line.cells()[1:3] == ["1 of 3", "80.0"]
    assert texts(results(rows))["m: a", "ft"][1] == "2 of 3"
    nothing = averages([undone(attack="a"), undone(attack="b")])
    assert [cells[1:3] for cells in texts(nothing).values()] == [["0 of 1", "2 not run"]]


def test_a_cost_needs_plain_fine_tuning_on_the_same_model_and_images():
    tuned, few = row(seconds=10.0), row(defense="ft-n50", method="ft", samples=50, seconds=2.0)
    other = row(defense="d3-n50", method="d3", samples=50, seconds=3.0)
    lonely = row("b", "d3", seconds=3.0)
    found = texts(results([tuned, few, other, lonely]))
    assert [found[key][11] for key in (("m: a", "d3-n50"), ("m: a", "ft-n50"), ("m: b", "d3"))] == ["1.5", "1.0", "–"]


def test_a_cost_is_against_the_defense_that_is_called_ft() -> None:
    """A variant of the same method, such as with class weights, is no base: 30 s are three times 10 s."""
    rows = [row(seconds=10.0), row(defense="ft-class", method="ft", seconds=30.0)]
    found = texts(results(rows))
    assert [found["m: a", name][11] for name in ("ft", "ft-class")] == ["1.0", "3.0"]


def test_the_cost_on_average_is_the_median_over_attacks() -> None:
    """The machine was busy during one of the runs: 3, 3 and 90 times plain fine-tuning are 3 times."""
    seconds = {("a", "ft"): 10.0, ("b", "ft"): 10.0, ("c", "ft"): 10.0, ("a", "d3"): 30.0, ("b", "d3"): 30.0}
    rows = [row(attack, name, seconds=seconds.get((attack, name), 900.0)) for attack in "abc" for name in ("ft", "d3")]
    assert texts(averages(rows))["m: a, b, c", "d3"][11] == "3.0"


def test_before_is_of_the_same_seeds_as_after() -> None:
    """Where a seed draws other images to measure on: every seed lost five points."""
    rows = [row(seed=seed, accuracy_before=before, accuracy=before - 0.05, spread_before=None)
            for seed, before in enumerate((0.9, 0.8, 0.7))]  # fmt: skip
    before, after = results(rows)
    assert (before.cells()[2], after.cells()[2][:4]) == ("80.0", "75.0")
    assert before.cells()[7] == "–"
    assert after.scores["accuracy_lost"].mean == pytest.approx(0.05)
    assert after.scores["accuracy_lost"].half_width == pytest.approx(0, abs=1e-12)


def test_clean_baselines_have_a_line_and_are_in_no_average():
    measured = ("attack_success_before", "attack_success", "robust_accuracy_before", "robust_accuracy", "der",
                "largest_share_before", "largest_share", "excess_before", "excess", "verdict")  # fmt: skip
    gone = dict.fromkeys(measured)
    rows = [row("a"), row("b"), row("clean-s1", clean=True, **gone)]
    assert [line.attacks for line in averages(rows)] == [("a", "b")] * 2
    assert texts(results(rows))["m: clean-s1", "ft"][2:6] == ["80.0", "–", "–", "–"]


def test_a_rejected_and_a_redirected_run_are_results_with_a_flag(tmp_path):
    """They are in every mean, and in no list of what failed."""
    lost = {"accuracy": 0.2, "accuracy_verdict": "rejected: accuracy", "verdict": "rejected: accuracy"}
    rows = [row("a"), row("b", **lost), row("b", seed=1, verdict="redirected, not mitigated"), row("a", seed=1)]
    outcome = BenchTables(tmp_path, "suite.yaml", rows)
    assert (outcome.exit_status, outcome.problems()) == (0, None)
    assert BenchTables.line(rows[1]).endswith(", 10 s, rejected: accuracy")
    assert BenchTables.line(rows[2]).endswith(", 10 s, redirected, not mitigated")
    (_, average) = averages(rows)
    # seed 0: (0.8 + 0.2) / 2, seed 1: 0.8
    assert average.cells()[2].startswith("65.0 ± ")
    assert average.cells()[2].endswith(" (1 of 4 rejected)")
    assert average.cells()[3] == "50.0 ± 0.0 (1 of 4 redirected)"
    assert "1 of 4 rejected" in outcome.markdown()
    assert "Failed or not run" not in outcome.markdown()
    found = {line["attacks"][0]: line["flags"] for line in outcome.document()["results"] if line["defense"] == "ft"}
    assert found == {"a": {}, "b": {"accuracy": "1 of 2 rejected", "attack_success": "1 of 2 redirected"}}


def test_the_files_say_what_failed_and_what_was_not_run(tmp_path):
    bad = undone("failed", "clp: [red]no BatchNorm[/red] | here", attack="b", defense="clp")
    absent = undone(reason="the zoo has no model m-a-0.1-s0", defense="x")
    outcome = BenchTables(tmp_path, "suite.yaml", [row(), row("b"), bad, absent])
    assert outcome.exit_status == 1
    assert outcome.summary() == "2 done, 1 failed, 1 not run"
    outcome.write()
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.csv", "trials.csv"}
    text = (tmp_path / "bench.md").read_text()
    assert "ft (ft): epochs=2, layers=head" in text.replace("\\", "")
    assert "failed: m-b-0.1-s0/clp-s0: clp: [red]no BatchNorm[/red] | here" in text.replace("\\", "")
    assert "not run: 1 (the zoo has no model m-a-0.1-s0)" in text.replace("\\", "")
    header, first, *_ = (tmp_path / "trials.csv").read_text().splitlines()
    assert header.startswith("name,subject,model,attack,defense,samples,seed,clean,status,reason,method,settings")
    assert first.startswith("m-a-0.1-s0/ft-s0,m-a-0.1-s0,m,a,ft,0.05,0,False,done,,ft,")
    assert BenchTables(tmp_path, "suite.yaml", [row()]).exit_status == 0


def test_a_text_that_a_spreadsheet_would_run_is_text(tmp_path):
    line = BenchTables(tmp_path, "s.yaml", [row(attack="=cmd()")]).texts()["trials.csv"].splitlines()[1]
    assert ",'=cmd()," in line


def test_the_csv_has_the_lines_of_the_tables_with_their_intervals(tmp_path):
    rows = [row(), row(seed=1, accuracy=0.9), undone(attack="b")]
    found = list(csv.DictReader(io.StringIO(BenchTables(tmp_path, "s.yaml", rows).texts()["bench.csv"])))
    assert [(line["table"], line["attacks"], line["defense"]) for line in found] == [
        ("average", "a; b", "ft"), ("model", "a", "before"), ("model", "a", "ft"), ("model", "b", "ft"),
    ]  # fmt: skip
    tuned = found[2]
    assert (float(tuned["accuracy"]), tuned["seeds"], tuned["seeds_asked"]) == (pytest.approx(0.85), "2", "2")
    assert float(tuned["accuracy_half_width"]) == pytest.approx(12.706 * 0.05, rel=1e-4)
    assert (found[0]["accuracy"], found[0]["missing"]) == ("", "1 not run")


def test_what_was_measured_is_said(tmp_path):
    outcome = BenchTables(
        tmp_path, "s.yaml", [row(), row(seed=1, precision=""), undone(seed=2), row(seed=3, precision="no")]
    )
    line = "pictures: 2,500 clean images, measured on 10,000; trained in bf16 or float32 on cpu"
    assert outcome.about() == line
    assert line in outcome.markdown()
    assert outcome.document()["measured"]["eval_images"] == [10000]
    assert BenchTables(tmp_path, "s.yaml", [undone()]).about() == "nothing is measured yet"


def test_a_defense_that_is_given_a_trigger_is_named(tmp_path):
    assert "no method sees a trigger" in BenchTables(tmp_path, "s.yaml", [row(settings={"trigger": ""})]).markdown()
    told = BenchTables(tmp_path, "s.yaml", [row(), row(defense="bna", settings={"trigger": "t.safetensors"})])
    assert "given a trigger: bna" in told.markdown()


def test_what_is_not_done_is_said_on_one_line(tmp_path):
    assert BenchTables(tmp_path, "s.yaml", [row()]).problems() is None
    bad = undone("failed", "no room", attack="b")
    assert BenchTables(tmp_path, "s.yaml", [row(), bad, undone(seed=1)]).problems() == (
        "1 done, 1 failed, 1 not run: failed: m-b-0.1-s0/ft-s0: no room; not run: 1 (not run yet)"
    )


# --- the terminal ---


def printed(outcome, width):
    stream = io.StringIO()
    Console(width=width, file=stream).print(outcome)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_cut_on_the_terminal(tmp_path, width):
    names = ("blended-with-a-long-name-0.1", "a-defense-with-a-long-name")
    rows = [row(*names, seed, accuracy=0.7 + seed / 10, method="ft") for seed in (0, 1)]
    text = printed(BenchTables(tmp_path, "s.yaml", rows), width)
    assert "…" not in text
    # 0.7 and 0.8: mean 0.75, ± 12.706 · 0.05
    assert "75.0 ± 63.5" in text
    assert "other than the papers': a-defense-with-a-long-name: epochs=2" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert ("seconds" in text) == (width == 120)


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (80, "defense seeds ACC ASR DER × ft"),
        (110, "defense seeds ACC ASR RA DER seconds × ft"),
        (120, "defense seeds ACC ASR RA largest DER seconds × ft"),
        (160, "defense seeds ACC ASR RA largest DER seconds × ft"),
        (220, "defense seeds ACC ASR RA largest excess DER worst spread seconds × ft memory"),
    ],
)
def test_a_terminal_shows_as_many_columns_as_have_room(tmp_path, width, headings):
    """Every rate has an interval as wide as two seeds can make it; neither a name nor a number is cut."""
    rates = ("accuracy", "attack_success", "robust_accuracy", "largest_share", "excess", "der", "worst_class", "spread")
    rows = [row(defense="d3-wasserstein", method="d3", seed=seed, seconds=12345.0, **dict.fromkeys(rates, 1.0 * seed))
            for seed in (0, 1)]  # fmt: skip
    text = printed(BenchTables(tmp_path, "s.yaml", rows), width)
    (line,) = (line for line in text.splitlines() if "d3-wasserstein " in line and "±" in line)
    # 0 and 1: mean 0.5, ± 12.706 · 0.5
    shown = headings.split()
    assert line.count("50.0 ± 635.3") == sum(
        word in shown for word in ("ACC", "ASR", "RA", "largest", "excess", "DER", "worst", "spread")
    )
    assert " ".join(next(x for x in text.splitlines() if x.strip().startswith("defense")).split()) == headings
    assert ("12,345" in line, "1.0 GiB" in line) == ("seconds" in shown, "memory" in shown)


def test_a_bench_of_one_attack_has_a_table_too(tmp_path):
    text = printed(BenchTables(tmp_path, "s.yaml", [row(), undone("failed", "[red]no[/red]", defense="clp")]), 80)
    assert "m: a" in text
    assert [line.split() for line in text.splitlines() if line.split()[:1] == ["ft"]] == [
        ["ft", "1", "80.0", "50.0", "40.0", "55.0", "70.0", "10", "1.0"]
    ]
    assert "1 failed" in text
    assert "[red]no[/red]" in text


# --- the pictures ---


def test_a_mean_mark_needs_every_attack():
    rows = [row("a"), row("b"), row("a", "clp"), undone("failed", "x", attack="b", defense="clp"), row("a", "nad")]
    rows += [row("b", "d3"), row("a", "d3")]
    figure = draw_scatter(results(rows), averages(rows))
    legend = figure.axes[0].get_legend()
    assert legend.get_title().get_text() == "mean over 2 attacks"
    assert [text.get_text() for text in legend.get_texts()] == ["ft", "clp: failed", "nad: incomplete", "d3"]
    points = [len(shown.get_offsets()) for shown in figure.axes[0].collections]
    # small ones, then the mark
    assert points == [2, 1, 1, 0, 1, 0, 2, 1]


def test_the_heat_map_stars_what_is_of_some_seeds_and_averages_what_is_whole():
    rows = [
        row("a"),
        row("b", attack_success=0.3),
        row("a", "clp"),
        row("b", "clp"),
        undone(attack="b", defense="clp", seed=1),
    ]
    rows += [undone(attack="a", defense="nad"), row("b", "nad")]
    figure = draw_heatmap(results(rows), averages(rows))
    texts_of = [text.get_text() for text in figure.axes[0].texts]
    assert [texts_of[at : at + 3] for at in range(0, 12, 3)] == [
        ["100.0", "100.0", "100.0"], ["50.0", "30.0", "40.0"], ["50.0", "50.0*", "50.0*"],
        ["not run", "50.0", "not run"],
    ]  # fmt: skip


def test_the_numbers_of_the_heat_map_can_be_read():
    """Between yellow and dark red a number has at least 3.5 times the contrast of its cell, as WCAG counts it."""
    rows = [row(f"a{asr}", attack_success=asr / 100) for asr in (0, 30, 61, 66, 68, 100)]
    figure = draw_heatmap(results(rows), [])
    axes = figure.axes[0]
    contrasts = []
    for text, value in zip(axes.texts, axes.images[0].get_array().filled(0).ravel(), strict=True):
        both = [luminance(colour) for colour in (to_rgb(text.get_color()), axes.images[0].cmap(value / 100)[:3])]
        contrasts.append((max(both) + 0.05) / (min(both) + 0.05))
    assert min(contrasts[:-1]) > 3.5


def luminance(colour):
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_benches_that_end_together_draw_side_by_side(tmp_path):
    outcome = BenchTables(tmp_path, "s.yaml", [row("a"), row("b")])
    processes = [multiprocessing.get_context("spawn").Process(target=draw_bench, args=(outcome,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["heatmap-m.png", "scatter-m.png"]


def test_another_suite_of_the_same_name_keeps_its_tables(tmp_path):
    outcome = BenchTables(tmp_path, "s.yaml", [row(), undone(seed=1)])
    outcome.write()
    again = BenchTables(tmp_path, "s.yaml", [])
    again.check_place({outcome.rows[0]["name"], "other/ft-s0"})
    with pytest.raises(UsageError, match=r"is the bench of another s\.yaml; choose another folder"):
        again.check_place({"other/ft-s0"})
    # nothing was finished: there is nothing to lose
    BenchTables(tmp_path, "s.yaml", [undone()]).write()
    again.check_place({"other/ft-s0"})
