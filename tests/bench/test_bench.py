"""The bench end to end: runs as processes, what is finished stays, what was killed goes on, what failed is shown."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hfdetox.bench.bench import Bench, run_bench
from hfdetox.bench.plots import draw_bench
from hfdetox.bench.runner import TaskRunner
from hfdetox.bench.tasks import load_suite
from hfdetox.bench.zoo import run_suite
from hfdetox.config_bench import BenchOptions
from hfdetox.errors import UsageError
from hfdetox.reporting.report import Report
from hfdetox.triggers import parse_trigger
from tests.colours import write_colours
from tests.test_files import holding

SUITE = """
training: {epochs: 4, batch_size: 16, augmentation: none, learning_rate: 0.05}
dataset: {eval_samples: 30}
models: {tiny: {model: "timm-arch:test_resnet", input_size: 16}}
grids: [{models: [tiny], triggers: [badnets, blended, none], ratios: [0.2]}]
defenses:
  ft: {defense: ft, settings: {epochs: 1, batch_size: 16}}
  long: {defense: ft, settings: {epochs: 100000, batch_size: 16}}
  broken: {defense: ft, settings: {epochs: 1, batch_size: 16, learning_rate: 1.0e+30}}
bench:
  - {models: [tiny], triggers: [badnets, blended], ratios: [0.2], defenses: [ft], samples: [40]}
  - {models: [tiny], triggers: [none], ratios: [0.2], defenses: [bn], samples: [40]}
  - {models: [tiny], triggers: [badnets], ratios: [0.2], defenses: [broken], samples: [40]}
"""
BADNETS, BLENDED, CLEAN = "tiny-badnets-0.2-s0", "tiny-blended-0.2-s0", "tiny-clean-s0"
BROKEN = f"{BADNETS}/broken-n40-s0"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A dataset of easy images, a suite file and the zoo that was built of it."""
    folder = tmp_path_factory.mktemp("bench")
    pictures = write_colours(folder / "pictures")
    file = write(folder, SUITE.replace("[badnets, blended, none], ratios", "[badnets, none], ratios"))
    run_suite(file, output=folder / "zoo", dataset=str(pictures), precision="no")
    return folder / "zoo", pictures


@pytest.fixture(scope="module")
def ran(zoo, tmp_path_factory):
    """A suite, its bench, and the outcome; one model of the suite is not in the zoo."""
    folder = tmp_path_factory.mktemp("ran")
    file = write(folder, SUITE)
    outcome = run_bench(file, output=folder / "bench", zoo=zoo[0], dataset=str(zoo[1]), jobs=2, precision="no")
    return file, folder / "bench", outcome


def write(folder, text):
    file = folder / "suite.yaml"
    file.write_text(text)
    return file


def statuses(outcome):
    return {row["name"]: row["status"] for row in outcome.rows}


def test_every_trial_has_a_row_that_says_what_its_report_says(ran):
    _, bench, outcome = ran
    assert statuses(outcome) == {
        f"{BADNETS}/ft-n40-s0": "done", f"{BLENDED}/ft-n40-s0": "not run", f"{CLEAN}/bn-n40-s0": "done",
        BROKEN: "failed",
    }  # fmt: skip
    assert outcome.exit_status == 1
    done, absent, clean, failed = outcome.rows
    report = Report.load(bench / done["name"])
    assert report.after is not None
    assert report.before is not None
    assert report.defense_effectiveness_rating is not None
    assert (done["accuracy"], done["accuracy_before"]) == (report.after.accuracy.value, report.before.accuracy.value)
    assert done["attack_success"] == report.after.triggers["badnets"].attack_success_rate.value
    assert done["der"] == report.defense_effectiveness_rating["mean"].value
    assert (done["worst_class"], done["seconds"]) == (report.after.classes.worst.value, report.defense.seconds)
    assert done["settings"] == report.defense.parameters
    assert done["settings"]["batch_size"] == 16
    assert report.dataset.clean_samples == 40
    assert done["peak_memory"] > 2**20
    assert absent["reason"] == f"the zoo has no model {BLENDED}"
    assert (clean["attack_success"], clean["der"], clean["attack"]) == (None, None, "clean")
    assert "loss is not finite" in failed["reason"]
    written = json.loads((bench / "bench.json").read_text())
    assert [row["status"] for row in written["trials"]] == ["done", "not run", "done", "failed"]
    assert written["defenses"]["ft-n40"]["epochs"] == 1


def test_cards_and_reports_stay_and_the_weights_go_unless_they_are_kept(ran, zoo, tmp_path):
    _, bench, _ = ran
    folder = bench / BADNETS / "ft-n40-s0"
    assert (folder / "README.md").is_file()
    assert list(folder.glob("*.safetensors")) == []
    assert list((folder / "triggers").glob("*.safetensors"))
    suite = write(tmp_path, SUITE.split("bench:")[0] + "bench: [{models: [tiny], triggers: [none], defenses: [bn]}]")
    run_bench(suite, output=tmp_path / "kept", zoo=zoo[0], dataset=str(zoo[1]), precision="no", keep_models=True)
    assert (tmp_path / "kept" / CLEAN / "bn-s0" / "model.safetensors").is_file()


def test_a_run_that_is_rejected_for_its_accuracy_is_a_result(zoo, tmp_path):
    """Its process ends with status 1, and the bench is done all the same."""
    lost = "defenses: {lost: {defense: ft, settings: {epochs: 1, batch_size: 16, momentum: 0, weight_decay: 100}}}"
    entry = "bench: [{models: [tiny], triggers: [badnets], ratios: [0.2], defenses: [lost], samples: [40]}]"
    suite = write(tmp_path, f"{SUITE.split('defenses:')[0]}{lost}\n{entry}\n")
    outcome = run_bench(suite, output=tmp_path / "bench", zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    name = f"{BADNETS}/lost-n40-s0"
    assert (statuses(outcome), outcome.exit_status) == ({name: "done"}, 0), outcome.problems()
    (row,) = outcome.rows
    assert row["accuracy_verdict"] == "rejected: accuracy"
    assert Report.load(tmp_path / "bench" / name).rejected
    assert list((tmp_path / "bench" / name).glob("*.safetensors")) == []
    assert "(1 of 1 rejected)" in (tmp_path / "bench" / "bench.md").read_text()
    # it is there, and is not run again
    again = run_bench(suite, output=tmp_path / "bench", zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    assert again.rows == outcome.rows


def test_the_pictures_are_drawn(ran, tmp_path):
    _, bench, outcome = ran
    sizes = [Image.open(bench / "plots" / f"{kind}-tiny.png").size for kind in ("heatmap", "scatter")]
    assert all(width == 1300 for width, _ in sizes)
    # nothing that is done, nothing to draw
    assert draw_bench(replace(outcome, folder=tmp_path, rows=outcome.rows[1:2])) == []


def test_a_finished_trial_is_never_run_again_and_a_failed_one_is(ran, zoo):
    file, bench, _ = ran
    again = Bench(load_suite(file), BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no"))
    assert list(TaskRunner(again).waiting) == [BROKEN]
    # until it is done it stays failed in every table, also while it is run again
    assert (again.rows[BROKEN]["status"], "loss is not finite" in again.rows[BROKEN]["reason"]) == ("failed", True)
    broken = again.tasks[BROKEN]
    kept = again.beside(broken, "json").read_text()
    again.record(broken)
    assert again.row(broken)["status"] == "failed"
    assert again.beside(broken, "json").read_text() == kept


def test_a_run_that_failed_goes_on_from_where_it_was_as_its_message_says(ran, zoo):
    file, bench, _ = ran
    again = Bench(load_suite(file), BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no"))
    run = bench / f"{BROKEN}.run"
    assert (run / "run.json").is_file()
    assert again.argv(again.tasks[BROKEN]) == ["detox", "--resume", str(run)]


def test_a_run_that_cannot_go_on_is_begun_anew(ran, zoo, tmp_path):
    """As where another version of hfdetox wrote the checkpoints: exit status 2."""
    bench = shutil.copytree(ran[1], tmp_path / "bench")
    again = Bench(load_suite(ran[0]), BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no"))
    broken = again.tasks[BROKEN]
    # somebody goes on with it by hand: that it is in use is exit status 2 as well
    by_hand = holding(bench / f"{BROKEN}.run", 600)
    again.tidy(broken, 2)
    by_hand.kill()
    by_hand.wait()
    assert (bench / f"{BROKEN}.run" / "run.json").is_file()
    for status, kept in ((1, True), (3, True), (130, True), (-9, True), (2, False)):
        again.tidy(broken, status)
        assert (bench / f"{BROKEN}.run").exists() == kept, status
    assert "--output" in again.argv(broken)


def test_a_run_killed_while_it_began_is_begun_anew(ran, zoo, tmp_path):
    file, bench = ran[0], shutil.copytree(ran[1], tmp_path / "bench")
    place = BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    again = Bench(load_suite(file), place)
    run = bench / f"{BROKEN}.run"
    # its folder is there, and nothing is recorded in it
    (run / "run.json").unlink()
    assert "--output" in again.argv(again.tasks[BROKEN])
    assert not run.exists()


def test_weights_left_by_a_stopped_bench_are_put_in_order(ran, zoo):
    file, bench, _ = ran
    again = Bench(load_suite(file), BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no"))
    left = bench / BADNETS / "ft-n40-s0" / "model.safetensors"
    left.write_bytes(b"x")
    again.finish()
    assert not left.exists()


def test_the_bench_of_another_suite_is_not_overwritten(ran, zoo, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(SUITE)
    bench = tmp_path / "bench"
    shutil.copytree(ran[1], bench)
    place = {"output": bench, "zoo": zoo[0], "dataset": str(zoo[1]), "precision": "no"}
    with pytest.raises(
        UsageError, match=r"is the bench of suite\.yaml; choose another folder, or remove its bench\.json"
    ):
        run_bench(other, **place)
    # what the message says can be done
    (bench / "bench.json").unlink()
    assert statuses(run_bench(other, **place)) == statuses(ran[2])
    assert json.loads((bench / "bench.json").read_text())["suite"] == "other.yaml"
    (bench / "thesis.tex").write_text("x")
    (bench / "bench.json").unlink()
    with pytest.raises(UsageError, match=r"something else than this bench \(thesis\.tex, and no bench\.json\)"):
        run_bench(other, **place)


def test_another_command_s_results_are_not_taken_for_this_suite_s(ran, zoo, tmp_path):
    _, bench, _ = ran
    other = write(
        tmp_path, SUITE.replace("ft: {defense: ft, settings: {epochs: 1,", "ft: {defense: ft, settings: {epochs: 2,")
    )
    with pytest.raises(
        UsageError, match="is a finished run of another suite, command, model or version; it is not replaced"
    ):
        run_bench(other, output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    shutil.copytree(zoo[0], tmp_path / "zoo")
    # another dataset of the same last name
    elsewhere = shutil.copytree(zoo[1], tmp_path / zoo[1].name)
    (elsewhere / "data" / "train-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="is a finished run of another suite, command, model or version"):
        run_bench(ran[0], output=bench, zoo=zoo[0], dataset=str(elsewhere), precision="no")
    report = tmp_path / "zoo" / BADNETS / "attack_report.json"
    content = json.loads(report.read_text())
    content["output"]["weights_sha256"] = "0" * 64
    report.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is a finished run of another suite, command, model or version"):
        run_bench(ran[0], output=bench, zoo=tmp_path / "zoo", dataset=str(zoo[1]), precision="no")


def test_a_run_with_other_defaults_is_not_taken_for_this_one_s(ran, zoo, tmp_path):
    """A version of hfdetox may change what the command does not name."""
    bench = shutil.copytree(ran[1], tmp_path / "bench")
    place = BenchOptions(output=bench, zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    assert Bench(load_suite(ran[0]), place).rows[f"{BADNETS}/ft-n40-s0"]["status"] == "done"
    file = bench / BADNETS / "ft-n40-s0" / "detox_report.json"
    content = json.loads(file.read_text())
    content["defense"]["parameters"]["momentum"] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="another suite, command, model or version"):
        Bench(load_suite(ran[0]), place)


def test_a_killed_trial_goes_on_from_its_checkpoint(zoo, tmp_path):
    bench = "bench: [{models: [tiny], triggers: [badnets], ratios: [0.2], defenses: [long], samples: [40]}]"
    file = write(tmp_path, SUITE.split("bench:")[0] + bench)
    words = ["bench", file, "--zoo", zoo[0], "--dataset", zoo[1], "--output", tmp_path / "out", "--precision", "no"]
    trial = tmp_path / "out" / BADNETS / "long-n40-s0"
    process = subprocess.Popen([sys.executable, "-m", "hfdetox", *map(str, words)], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    try:
        wait_for(lambda: list(Path(f"{trial}.run").glob("**/*.safetensors")))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "what is finished stays: give the same command again to go on" in said
    place = BenchOptions(output=tmp_path / "out", zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    stopped = Bench(load_suite(file), place)
    (cell,) = stopped.tasks.values()
    assert stopped.rows[cell.name]["status"] == "not run"
    assert stopped.argv(cell) == ["detox", "--resume", f"{trial}.run"]
    # what was begun on another device is begun anew
    elsewhere = Bench(load_suite(file), replace(place, device="cpu"))
    assert elsewhere.row(cell)["status"] == "not run"
    shutil.copytree(f"{trial}.run", tmp_path / "kept")
    assert "--output" in elsewhere.argv(cell)
    shutil.copytree(tmp_path / "kept", f"{trial}.run")
    # so is what was begun by another command
    other = Bench(load_suite(write(tmp_path, file.read_text().replace("epochs: 100000", "epochs: 2"))), place)
    (cell,) = other.tasks.values()
    assert "--output" in other.argv(cell)
    assert not Path(f"{trial}.run").exists()


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zoo": None}, "tries models of a zoo: name its folder with --zoo"),
        ({"dataset": None}, "names no dataset: add one to it, or give --dataset"),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
        ({"dataset": "./nowhere"}, "dataset ./nowhere: no such folder"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path, zoo, changes, message):
    with pytest.raises(UsageError, match=message):
        run_bench(write(tmp_path, SUITE), **{"output": tmp_path / "out", "zoo": zoo[0], "dataset": "x", **changes})
    assert not (tmp_path / "out").exists()


def test_a_model_of_this_machine_must_be_there(tmp_path):
    text = "dataset: org/i\nsubjects: {x: ./no/model}\nbench: [{subjects: [x], defenses: [ft]}]"
    with pytest.raises(UsageError, match=r"subject x: model \./no/model: no such folder"):
        run_bench(write(tmp_path, text), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trial_that_another_run_saw_fail_is_not_run_again(ran, zoo, tmp_path):
    """It waited for the other run's lock; what had failed before this run began is tried again."""
    file, _, _ = ran
    place = BenchOptions(output=tmp_path / "out", zoo=zoo[0], dataset=str(zoo[1]), precision="no")
    place.output.mkdir()
    bench = Bench(load_suite(file), place)
    cell = bench.tasks[BROKEN]
    runner = TaskRunner(bench)
    with bench.claim(cell):
        assert not runner._advance(cell)
    bench.record(cell, "boom after three hours")
    assert runner._advance(cell)
    assert (bench.rows[BROKEN]["status"], bench.rows[BROKEN]["reason"]) == ("failed", "boom after three hours")
    assert runner.running == {}
    assert bench.rows[BROKEN]["name"] in TaskRunner(bench).waiting


def test_a_trial_given_another_trigger_file_is_another(tmp_path):
    trigger = tmp_path / "mine.safetensors"
    text = (
        "dataset: org/i\nsubjects: {x: org/x}\ndefenses: {known: {defense: bna, settings: {trigger: " + str(trigger)
        + "}}}\nbench: [{subjects: [x], defenses: [known]}]"
    )  # fmt: skip
    records = []
    for size in (2, 3):
        parse_trigger(f"badnets:size={size}").save(trigger)
        bench = Bench(load_suite(write(tmp_path, text)), BenchOptions(output=tmp_path / "out"))
        records += [bench.recorded(trial) for trial in bench.tasks.values()]
    assert records[0]["command"] == records[1]["command"]
    assert len(records[0]["triggers"]) == 1
    assert records[0]["triggers"] != records[1]["triggers"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, zoo):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds something else than this bench"):
        run_bench(write(tmp_path, SUITE), output=tmp_path / "out", zoo=zoo[0], dataset="x")


def test_the_commands_of_models_of_the_hub(tmp_path):
    text = """
dataset: {id: org/pictures, revision: abc, image_column: img, eval_samples: 100}
subjects: {hub: {model: org/there, triggers: ["badnets:size=2"], target: cat, revision: v1}}
bench: [{subjects: [hub], defenses: [{}], samples: [500], seeds: [3]}]
""".replace("{}", "'d3:code'")
    bench = Bench(load_suite(write(tmp_path, text)), BenchOptions(output=tmp_path / "out", device="cpu"))
    (trial,) = bench.tasks.values()
    assert bench.command(trial) == [
        "detox", "org/there", "--dataset", "org/pictures", "--image-column", "img", "--dataset-revision", "abc",
        "--eval-samples", "100", "--defense", "d3:code", "--seed", "3", "--trigger", "badnets:size=2",
        "--target", "cat", "--revision", "v1", "--samples", "500", "--no-scan",
    ]  # fmt: skip
    assert bench.argv(trial)[-4:] == ["--output", str(tmp_path / "out" / "hub" / "d3_code-n500-s3"), "--device", "cpu"]


def test_a_bench_is_published_and_a_place_that_is_taken_is_said_first(ran, zoo, hub, hub_token, repo_name, tmp_path):
    file, bench, _ = ran
    taken, free = repo_name("bench"), repo_name("bench")
    hub.create_repo(taken, "dataset")
    hub.commit(taken, {"train.csv": "theirs"}, repo_type="dataset")
    options = {"zoo": zoo[0], "dataset": str(zoo[1]), "precision": "no"}
    with pytest.raises(UsageError, match="name the repository with --push-to"):
        run_bench(file, output=tmp_path / "never", private=True, **options)
    with pytest.raises(UsageError, match="was not made by hfdetox"):
        run_bench(file, output=tmp_path / "never", push_to=taken, **options)
    assert not (tmp_path / "never").exists()
    outcome = run_bench(file, output=bench, push_to=free, private=True, **options)
    assert outcome.pushed.repo_id == free
    assert hub.repo(free, "dataset").private
    files = hub.files(free, repo_type="dataset")
    assert {path.split("/")[0] for path in files} == {
        ".gitattributes", "README.md", "bench.json", "data", "plots", "runs",
    }  # fmt: skip
    everything = b"".join(content for path, content in files.items() if path.endswith((".json", ".md")))
    assert str(bench.parent).encode() not in everything
    assert str(zoo[1]).encode() not in everything
