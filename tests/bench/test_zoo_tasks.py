"""The cells of a zoo: their commands, what they are made of, and processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from hfdetox.bench.runner import TaskRunner, interruption
from hfdetox.bench.suite import SuiteError
from hfdetox.bench.zoo import Zoo, ZooTables
from hfdetox.errors import UsageError
from hfdetox.reporting.report import OutputInfo
from hfdetox.triggers import parse_trigger
from tests.attacked import clean_control
from tests.zoos import ATTACKED, CLEAN, MODEL, SUITE, zoo_of


def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it():
    # the tests themselves may run under nohup
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with interruption() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert interrupted()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interruption() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_cell_is_out_of_reach_of_the_terminal_s_ctrl_c(tmp_path):
    zoo = zoo_of(SUITE, tmp_path)
    (tmp_path / "zoo").mkdir()
    cell = zoo.tasks[ATTACKED]
    running = zoo.start(cell, zoo.claim(cell))
    try:
        assert os.getpgid(running.process.pid) == os.getsid(running.process.pid) == running.process.pid
        assert zoo.claim(cell) is None
    finally:
        running.process.kill()
        running.process.wait()
    running.log.close()
    zoo.claim(cell).close()


def test_a_cell_is_run_by_one_run_at_a_time_and_a_dead_run_holds_nothing(tmp_path):
    zoo = zoo_of(SUITE, tmp_path)
    (tmp_path / "zoo").mkdir()
    cell = zoo.tasks[ATTACKED]
    held = zoo.claim(cell)
    assert zoo.claim(cell) is None
    # a process that got the log holds the lock on, even if the run that started it is killed
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=held)
    held.close()
    assert zoo.claim(cell) is None
    child.kill()
    child.communicate()
    zoo.claim(cell).close()


def finish(zoo, cell, weights="a" * 64):
    """Write a cell by hand, as its process leaves it."""
    folder = zoo.folder / cell
    folder.mkdir(parents=True, exist_ok=True)
    clean_control(output=OutputInfo(weights_sha256=weights)).save(folder)
    zoo.record(zoo.tasks[cell])


def test_a_cell_of_another_trigger_file_or_picture_is_not_kept(tmp_path):
    place, picture = tmp_path / "spot.safetensors", tmp_path / "spot.png"
    parse_trigger("badnets:size=3").save(place)
    Image.new("RGB", (2, 2)).save(picture)
    text = f"models: {{{MODEL}}}\ngrids: [{{models: [tiny], triggers: ['{place}', 'badnets:image={picture}']}}]"
    zoo = zoo_of(text, tmp_path)
    for name, cell in zoo.tasks.items():
        finish(zoo, name)
        source = place if str(place) in cell.specs else picture
        record = json.loads((tmp_path / "zoo" / f"{name}.json").read_text())
        assert record["files"] == [hashlib.sha256(source.read_bytes()).hexdigest()]
    assert {row["status"] for row in zoo_of(text, tmp_path).rows.values()} == {"done"}
    before = place.read_bytes()
    parse_trigger("badnets:size=4").save(place)
    with pytest.raises(UsageError, match=r"spot\.safetensors.* was made with other trigger files .*remove"):
        zoo_of(text, tmp_path)
    place.write_bytes(before)
    Image.new("RGB", (2, 2), "red").save(picture)
    with pytest.raises(UsageError, match="was made with other trigger files"):
        zoo_of(text, tmp_path)


def test_a_cell_made_on_another_clean_model_is_not_kept(tmp_path):
    text = f"models: {{{MODEL}}}\ngrids: [{{models: [tiny], triggers: [lf, none]}}]"
    zoo = zoo_of(text, tmp_path)
    made = "tiny-lf-0.1-s0"
    finish(zoo, CLEAN)
    finish(zoo, made)
    assert zoo_of(text, tmp_path).rows[made]["status"] == "done"
    record = json.loads((tmp_path / "zoo" / f"{made}.json").read_text())
    assert record["surrogate_weights"] == "a" * 64
    finish(zoo, CLEAN, weights="b" * 64)
    with pytest.raises(UsageError, match=f"{made} is a finished model that was made .* on another clean model"):
        zoo_of(text, tmp_path)
    # an earlier version wrote neither; and a clean model that is gone says nothing
    old = {key: record[key] for key in ("schema_version", "command", "surrogate")}
    (tmp_path / "zoo" / f"{made}.json").write_text(json.dumps(old))
    assert zoo_of(text, tmp_path).rows[made]["status"] == "done"
    (tmp_path / "zoo" / f"{made}.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "zoo" / CLEAN)
    assert zoo_of(text, tmp_path).rows[made]["status"] == "done"


def test_the_command_of_a_cell(tmp_path):
    text = """
        dataset: {id: org/pictures, image_column: img, revision: abc, eval_samples: 50}
        training: {epochs: 3}
        models: {m: {model: "timm-arch:resnetv2_50", model_args: {layers: [1, 1], stem_type: ""}, input_size: 32}}
        triggers: {both: {spec: ["badnets:target=0", "sig:target=1"]}}
        grids:
          - {models: [m], triggers: [none, both], ratios: [0.05], seeds: [7], targets: [2], adaptive: ["sam:rho=2"]}
    """
    zoo = zoo_of(text, tmp_path, dataset=None)
    model = [
        "attack", "timm-arch:resnetv2_50", "--dataset", "org/pictures", "--seed", "7", "--image-column", "img",
        "--dataset-revision", "abc", "--eval-samples", "50", "--model-arg", "layers=[1, 1]", "--model-arg",
        'stem_type=""', "--input-size", "32",
    ]  # fmt: skip
    clean, attacked = zoo.tasks.values()
    assert zoo.command(clean) == [*model, "--trigger", "none", "--set", "epochs=3"]
    assert zoo.command(attacked) == [
        *model, "--trigger", "badnets:target=0", "--trigger", "sig:target=1", "--poison-ratio", "0.05", "--target",
        "index:2",
        "--adaptive", "sam:rho=2", "--set", "epochs=3",
    ]  # fmt: skip
    # another dataset has other revisions
    assert "--dataset-revision" not in Zoo(zoo.suite, replace(zoo.settings, dataset="org/other")).command(clean)


@pytest.mark.parametrize("kind", ["lc", "lf", "trojannn"])
def test_a_trigger_made_on_a_clean_model_gets_the_suite_s_own(tmp_path, kind):
    grid = f"models: {{{MODEL}, trained: org/model}}\ngrids: [{{models: [%s], triggers: [%s], seeds: [3]}}]"
    zoo = zoo_of(grid % ("tiny", f"{kind}, 'lf:random', none"), tmp_path)
    assert {name: zoo.needs(cell) for name, cell in zoo.tasks.items()} == {
        "tiny-clean-s3": None, f"tiny-{kind}-0.1-s3": "tiny-clean-s3", "tiny-lf_random-0.1-s3": None,
    }  # fmt: skip
    with pytest.raises(
        SuiteError, match=rf"cell tiny-{kind}-0\.1-s3 is made on a clean model: add the trigger none for model"
    ):
        zoo_of(grid % ("tiny", kind), tmp_path)
    # a trained model is clean before the attack
    alone = zoo_of(grid % ("trained", kind), tmp_path)
    assert alone.needs(alone.tasks[f"trained-{kind}-0.1-s3"]) is None


def test_a_cell_whose_clean_model_failed_is_not_run(tmp_path):
    zoo = zoo_of(f"models: {{{MODEL}}}\ngrids: [{{models: [tiny], triggers: [lf, none]}}]", tmp_path)
    (tmp_path / "zoo").mkdir()
    zoo.rows[CLEAN] = ZooTables.row(zoo.tasks[CLEAN], "failed", reason="no room")
    TaskRunner(zoo).run()
    row = zoo.rows["tiny-lf-0.1-s0"]
    assert (row["status"], row["reason"]) == ("failed", f"its clean model {CLEAN} failed")
    assert not (tmp_path / "zoo" / "tiny-lf-0.1-s0.log").exists()
