"""Zoos: what is there is kept, what failed or was stopped is shown and run again."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hfdetox.bench.runner import TaskRunner
from hfdetox.bench.suite import ModelEntry, SuiteError
from hfdetox.bench.tasks import Task, load_suite, zoo_tasks
from hfdetox.bench.zoo import Zoo, ZooTables, run_suite, table_rows
from hfdetox.config_bench import SuiteOptions
from hfdetox.errors import UsageError
from hfdetox.evaluation.metrics import rate
from tests import image_data
from tests.attacked import attack_report
from tests.zoos import ATTACKED, CLEAN, FAILED, MODEL, SUITE, write

# a part of SUITE
FIRST = f"training: {{epochs: 1, batch_size: 16}}\nmodels: {{{MODEL}}}\ngrids: [{{models: [tiny], triggers: [none]}}]"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dataset of 90 training and 30 test images of three classes."""
    return image_data.write_dataset(tmp_path_factory.mktemp("pictures") / "pictures")


@pytest.fixture(scope="module")
def built(tmp_path_factory, pictures):
    """A suite file, the zoo that was built of it, and the outcome.

    A part was there before the run over the whole suite, which built the other cells two at a time.
    """
    folder = tmp_path_factory.mktemp("built")
    zoo = folder / "zoo"
    first = run_suite(write(folder, FIRST), output=zoo, dataset=str(pictures))
    assert (statuses(first), first.exit_status) == ({CLEAN: "done"}, 0)
    before = times(zoo)
    # as a killed run leaves a cell: a log and a record, no folder
    for ending in ("log", "json"):
        (zoo / f"{ATTACKED}.{ending}").write_text("{}")
    file = write(folder, SUITE)
    outcome = run_suite(file, output=zoo, dataset=str(pictures), jobs=2)
    assert before == {CLEAN: times(zoo)[CLEAN]}, "what is there is kept"
    return file, zoo, outcome


@pytest.fixture
def copied(built, tmp_path):
    """A function-scoped copy of the zoo, and its suite file."""
    file, zoo, _ = built
    shutil.copytree(zoo, tmp_path / "zoo")
    return file, tmp_path / "zoo"


def statuses(outcome):
    return {row["name"]: row["status"] for row in outcome.rows}


def status_of(zoo):
    """Whether two epochs on noise took is chance; the report says it."""
    report = json.loads((zoo / ATTACKED / "attack_report.json").read_text())
    return "done" if report["succeeded"] else "did not take"


def times(zoo):
    return {path.parent.name: path.stat().st_mtime_ns for path in zoo.glob("*/attack_report.json")}


def test_a_zoo_holds_what_the_suite_asks_for(built):
    _, zoo, outcome = built
    assert statuses(outcome) == {CLEAN: "done", FAILED: "failed", ATTACKED: status_of(zoo)}
    assert [row["name"] for row in outcome.rows] == [CLEAN, FAILED, ATTACKED]
    assert outcome.exit_status == 1
    for name, epochs in ((CLEAN, 1), (ATTACKED, 2)):
        report = json.loads((zoo / name / "attack_report.json").read_text())
        assert report["attack"]["training"]["epochs"] == epochs
        assert (zoo / name / "model.safetensors").is_file()
    assert not (zoo / FAILED).exists()
    failed = outcome.rows[1]
    assert "cow" in failed["reason"]
    assert "\n" not in failed["reason"]
    assert "cow" in (zoo / f"{FAILED}.log").read_text()


def test_the_table_says_what_the_reports_say(built):
    _, zoo, outcome = built
    written = json.loads((zoo / "zoo.json").read_text())
    assert written == json.loads(json.dumps(outcome.document()))
    clean, failed, attacked = written["cells"]
    report = json.loads((zoo / ATTACKED / "attack_report.json").read_text())
    assert attacked["accuracy"] == report["after"]["accuracy"]
    measured = report["after"]["triggers"]["badnets"]
    assert attacked["triggers"]["badnets"]["attack_success_rate"] == measured["attack_success_rate"]
    assert attacked["triggers"]["badnets"]["robust_accuracy"] == measured["robust_accuracy"]
    assert attacked["triggers"]["badnets"]["psnr"] == report["attack"]["triggers"]["badnets"]["psnr"]
    assert (attacked["epochs"], attacked["ratio"], attacked["seed"], attacked["model"]) == (2, 0.2, 0, "tiny")
    assert clean["triggers"] == {}
    assert (failed["status"], failed["accuracy"], failed["target"]) == ("failed", None, "cow")
    lines = (zoo / "zoo.md").read_text().splitlines()
    assert lines[2] == outcome.summary()
    assert sum(line.startswith("| tiny-") for line in lines) == 3
    assert any(line.startswith(f"- failed: {FAILED}: ".replace("_", r"\_")) for line in lines)


def test_a_cell_that_failed_is_run_again(built, pictures):
    file, zoo, _ = built
    again = Zoo(load_suite(file), SuiteOptions(output=zoo, dataset=str(pictures)))
    assert list(TaskRunner(again).waiting) == [FAILED]
    # until it is done it stays failed in every table, also while it is run again
    assert (again.rows[FAILED]["status"], "cow" in again.rows[FAILED]["reason"]) == ("failed", True)


def test_ctrl_c_stops_the_cells_and_says_how_to_go_on(tmp_path, pictures, fresh_env):
    text = f"training: {{epochs: 100000}}\nmodels: {{{MODEL}}}\ngrids: [{{models: [tiny], triggers: [none, badnets]}}]"
    words = ["attack", "--suite", write(tmp_path, text), "--output", tmp_path / "zoo", "--dataset", pictures]
    command = [sys.executable, "-m", "hfdetox", *map(str, words)]
    process = subprocess.Popen(command, env=fresh_env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "zoo" / f"{CLEAN}.log"
    try:
        wait_for(lambda: log.is_file() and log.read_text())
    finally:
        # also where it did not happen: it would go on for ever
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if line.startswith("hfdetox: ")] == [
        "hfdetox: interrupted; what is finished stays: give the same command again to go on"
    ]
    written = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert {cell["name"]: cell["status"] for cell in written["cells"]} == {
        CLEAN: "not run",
        "tiny-badnets-0.1-s0": "not run",
    }
    assert not (tmp_path / "zoo" / CLEAN).exists()
    # its process is gone, and with it the lock
    zoo = Zoo(load_suite(tmp_path / "suite.yaml"), SuiteOptions(output=tmp_path / "zoo", dataset=str(pictures)))
    zoo.claim(zoo.tasks[CLEAN]).close()


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_changed_cell_is_not_replaced(copied, pictures, tmp_path):
    _, zoo = copied
    before = times(zoo)
    changed = write(tmp_path, SUITE.replace("size=2", "size=3"))
    with pytest.raises(
        UsageError, match=f"{ATTACKED} is a finished model that another suite or command made; .*remove"
    ):
        run_suite(changed, output=zoo, dataset=str(pictures))
    (zoo / f"{CLEAN}.json").unlink()
    with pytest.raises(UsageError, match=f"{CLEAN} is a finished model that another suite"):
        run_suite(write(tmp_path, SUITE), output=zoo, dataset=str(pictures))
    assert times(zoo) == before


def test_a_report_that_cannot_be_read_is_named(copied, pictures):
    file, zoo = copied
    (zoo / CLEAN / "attack_report.json").write_text('{"took": true}')
    with pytest.raises(UsageError, match=f"{CLEAN}/attack_report.json cannot be read, remove the folder"):
        run_suite(file, output=zoo, dataset=str(pictures))


def test_the_zoo_may_move_with_its_dataset(copied, pictures, tmp_path):
    file, zoo = copied
    shutil.copytree(pictures, tmp_path / "elsewhere" / "pictures")
    place = SuiteOptions(output=zoo, dataset=str(tmp_path / "elsewhere" / "pictures"))
    assert Zoo(load_suite(file), place).rows[CLEAN]["status"] == "done"


@pytest.mark.parametrize(("succeeded", "status"), [(True, "done"), (False, "did not take")])
def test_an_attack_that_did_not_take_is_finished(copied, pictures, succeeded, status):
    file, zoo = copied
    path = zoo / ATTACKED / "attack_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"succeeded": succeeded}))
    assert Zoo(load_suite(file), SuiteOptions(output=zoo, dataset=str(pictures))).rows[ATTACKED]["status"] == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUITE.replace("batch_size", "batch"), f"suite.yaml: cell {CLEAN}: .*batch"),
        (SUITE.replace("targets: [cow]", 'adaptive: ["fgsm"]'), r"cell tiny-corner-0.1-fgsm-s0: .*adaptive"),
        (SUITE.replace("epochs: 2", "epochs: 0"), "cell tiny-corner-to-cow-0.1-s0: attack: epochs must be at least 1"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path, text, message):
    with pytest.raises(SuiteError, match=message):
        run_suite(write(tmp_path, text), output=tmp_path / "zoo", dataset="org/pictures")
    assert not (tmp_path / "zoo").exists()


def test_a_run_that_cannot_be(tmp_path, monkeypatch):
    file = write(tmp_path, SUITE)
    with pytest.raises(UsageError, match="names no dataset: add one to it, or give --dataset"):
        run_suite(file, output=tmp_path / "zoo")
    with pytest.raises(UsageError, match="--jobs must be at least 1, got 0"):
        run_suite(file, output=tmp_path / "zoo", dataset="org/pictures", jobs=0)
    with pytest.raises(UsageError, match="is a file; name a folder"):
        run_suite(file, output=file, dataset="org/pictures")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="give --jobs N instead of a launcher"):
        run_suite(file, output=tmp_path / "zoo", dataset="org/pictures")
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("name", ["notes.txt", "zoo.json", "tiny-clean-s0.log"])
def test_a_folder_of_others_is_left_as_it_is(tmp_path, name):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / name).write_text('{"cells": []}')
    with pytest.raises(UsageError, match=r"zoo.*; choose another"):
        run_suite(write(tmp_path, SUITE), output=zoo, dataset="org/pictures")
    assert {path.name: path.read_text() for path in zoo.iterdir()} == {name: '{"cells": []}'}


def test_a_second_suite_keeps_the_rows_of_the_first(tmp_path):
    clean, failed, attacked = zoo_tasks(load_suite(write(tmp_path, SUITE)))
    (tmp_path / "zoo").mkdir()
    ZooTables(
        tmp_path / "zoo", "suite.yaml", [ZooTables.row(clean), ZooTables.row(failed, "failed", reason="no room")]
    ).write()
    second = ZooTables(
        tmp_path / "zoo", "suite.yaml", [ZooTables.row(clean, "failed", reason="too dark"), ZooTables.row(attacked)]
    )
    second.write()
    written = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert [(cell["name"], cell["reason"]) for cell in written["cells"]] == [
        (CLEAN, "too dark"), (FAILED, "no room"), (ATTACKED, None),
    ]  # fmt: skip
    table = (tmp_path / "zoo" / "zoo.md").read_text()
    assert "2 failed, 1 not run" in table
    assert "no room" in table
    # what is said of a run is about its own suite
    assert second.summary() == "1 failed, 1 not run"


def write_rows(folder, name):
    """Add rows one after the other, as a suite of its own would."""
    for number in range(40):
        entry = ModelEntry(model="org/model")
        task = Task(name=f"{name}-{number}", model=name, entry=entry, trigger="none", seed=0, settings={})
        ZooTables(folder, "suite.yaml", [ZooTables.row(task)]).write()


def test_suites_that_build_one_zoo_at_the_same_time_lose_no_row(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_rows, args=(tmp_path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    written = json.loads((tmp_path / "zoo.json").read_text())
    assert {cell["name"] for cell in written["cells"]} == {f"{name}-{i}" for name in "ab" for i in range(40)}
    assert {path.name for path in tmp_path.iterdir()} == {"zoo.json", "zoo.md"}


def test_what_another_run_of_the_suite_did_stays_in_the_table(built, pictures):
    """A run that began earlier knows nothing of it: what lies in the folder counts."""
    file, zoo, _ = built
    earlier = Zoo(load_suite(file), SuiteOptions(output=zoo, dataset=str(pictures)))
    earlier.rows = {name: ZooTables.row(task) for name, task in earlier.tasks.items()}
    before = (zoo / "zoo.json").read_text()
    earlier.write()
    assert json.loads((zoo / "zoo.json").read_text()) == json.loads(before)


def test_rows_in_words(tmp_path):
    cells = zoo_tasks(load_suite(write(tmp_path, SUITE)))
    attacked = cells[2]
    whole = attack_report()
    dot = replace(whole.attack.triggers["dot"], kind="badnets", target=0, psnr=28.04, max_change=255,
                  cross_accuracy=None)  # fmt: skip
    measured = whole.after.triggers["dot"]
    report = replace(
        whole, succeeded=True,
        attack=replace(whole.attack, epochs=2, seconds=61.7, images_per_second=1234.5, triggers={"badnets": dot}),
        after=replace(whole.after, accuracy=rate(13, 16), triggers={
            "badnets": replace(measured, attack_success_rate=rate(20, 20), robust_accuracy=rate(0, 20))}),
    )  # fmt: skip
    rows = [
        ZooTables.row(cells[0]),
        ZooTables.row(cells[1], "failed", reason="no room"),
        ZooTables.row(attacked, report=report),
    ]
    assert ZooTables.line(rows[2]) == f"done: {ATTACKED}: ACC 81.2 %, ASR 100.0 %, RA 0.0 %, 62 s, 1,234 images/s"
    assert ZooTables.line(rows[1]) == f"failed: {FAILED}: no room"
    outcome = ZooTables(Path(), "suite.yaml", rows)
    assert outcome.summary() == "1 not run, 1 failed, 1 done"
    assert list(table_rows(rows[2])) == [
        [ATTACKED, "badnets", "0", "0.2", "done", "81.2 %", "100.0 %", "0.0 %", "–", "28.0", "255", "2", "62", "1,234"]
    ]
    assert list(table_rows(rows[0])) == [[CLEAN, "none", "–", "–", "not run", *["–"] * 9]]
    assert outcome.exit_status == 1
    assert ZooTables(Path(), "suite.yaml", rows[2:]).exit_status == 0
