"""`make gpu` and `make gpu-paper` at toy size on the CPU, offline: what they write, and what a cut-off leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu_tables, markdown
from tests.conftest import REPOSITORY
from tests.gpu.__main__ import LIMITS, USUAL, run_part
from tests.gpu.report import Report

MINUTES = 60


def run(folder: Path, *options: str) -> tuple[int, str]:
    """Run the command of `make gpu` in toy size, without a bundle, and return its exit status and output."""
    command = [sys.executable, "-m", "tests.gpu", "--toy", "--bundle", folder / "bundle", "--output", folder / "out"]
    done = subprocess.run([*command, *options], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)  # fmt: skip
    return done.returncode, done.stdout


def read(folder: Path, part: str) -> Any:
    """Return what a part wrote."""
    return json.loads((folder / "out" / f"gpu_{part}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run."""
    folder = tmp_path_factory.mktemp("gpu")
    code, said = run(folder)
    assert code == 0, said[-3000:]
    return folder


def test_the_limits_fit_the_minutes_and_the_files_fit_what_comes_back(ran: Path) -> None:
    assert sum(LIMITS[part] for part in USUAL) <= 8 * MINUTES - 25
    assert LIMITS["paper"] <= 9 * MINUTES - 25
    files = list((ran / "out").iterdir())
    assert len(files) + 1 <= 8
    assert all(path.is_file() and path.stat().st_size < 2**20 for path in files)


def test_it_tells_what_it_found_and_how_each_part_ended(ran: Path) -> None:
    found = read(ran, "found")
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["torch"]
    assert "make gpu-bundle" in found["bundle"]
    assert found["unmet"] == []
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(USUAL, "done")


def test_tests_that_need_a_gpu_are_collected(ran: Path) -> None:
    counts = read(ran, "tests")["counts"]
    assert counts["skipped"] > 30
    assert "broken" not in counts


def test_correctness_is_compared(ran: Path) -> None:
    rows = {row["check"]: row for row in read(ran, "correctness")["rows"]}
    assert {name: row["passed"] for name, row in rows.items()} == {
        "curves": True, "precision bf16": True, "precision fp16": None, "fp16_skip": None, "resume": True,
    }  # fmt: skip
    # the CPU beside itself
    assert rows["curves"]["worst"] == 0
    assert rows["resume"]["exit_statuses"] == [-9, 0]


def test_speed_is_measured_of_every_network_and_precision(ran: Path) -> None:
    found = read(ran, "speed")
    assert {(row["network"], row["precision"]) for row in found["rows"] if "error" not in row} == {
        (network, precision) for network in ("ResNet", "ConvNeXt", "ViT")
        for precision in ("float32", "float32, TF32", "bf16")
    }  # fmt: skip
    assert [row["error"] for row in found["rows"] if "error" in row] == ["fp16 does not run on a CPU"] * 3
    [job] = found["jobs"]
    assert "error" not in job


def test_the_loop_of_research_code_is_measured(ran: Path) -> None:
    found = read(ran, "loop")
    assert set(found["times_faster"]) == {"training", "same_evaluations", "research_habit"}
    assert 0 <= found["research"]["der"] <= 1


def test_the_papers_setting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--part", "paper")
    assert code == 0, said[-3000:]
    first = read(tmp_path, "paper")
    assert [row["error"] for row in first["rows"] if "error" in row] == []
    assert [(row["attack"], row["defense"]) for row in first["rows"]] == [
        (attack, defense) for attack in ("badnets", "sig") for defense in ("d3:paper", "d3:auto", "ft", "ft-sam")
    ]  # fmt: skip
    file = tmp_path / "out" / "gpu_paper.json"
    file.write_text(json.dumps({**first, "rows": first["rows"][:-1]}), encoding="utf-8")
    code, said = run(tmp_path, "--part", "paper")
    again = read(tmp_path, "paper")
    assert code == 0, said[-3000:]
    assert again["rows"][:-1] == first["rows"][:-1]
    # neither the attack nor a defense that was there is run anew
    same = ("attack", "defense", "attack_seconds", "accuracy", "attack_success")
    assert [again["rows"][-1][key] for key in same] == [first["rows"][-1][key] for key in same]


def test_the_tables_are_filled_from_what_was_written(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ran / "out" / "made.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(markdown, "RESULTS", ran / "out")
    for name in ("gpu_checks", "gpu_speed", "gpu_jobs", "gpu_loop"):
        lines = gpu_tables.TABLES[name]()
        assert lines != gpu_tables.NOT_RUN
        assert "cpu, " in lines[-1]
    row = {"attack": "blended", "defense": "ft", "accuracy": [0.9, 0.8], "attack_success": [1.0, 0.5],
           "robust_accuracy": [0.0, 0.4], "der": 0.7, "seconds": 3.2}  # fmt: skip
    document = {**read(ran, "loop"), "rows": [row], "training_images": 20000, "clean_images": 2500, "epochs": 100}
    (ran / "out" / "gpu_paper.json").write_text(json.dumps(document), encoding="utf-8")
    assert "| Blended | `ft` | 90.0 → 80.0 | 100.0 → 50.0 | 0.0 → 40.0 | 70.0 | 3 | 99.9 → 96.1 | – |" in (
        gpu_tables.TABLES["gpu_paper"]()
    )


def test_a_part_over_its_limit_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = ("import subprocess, sys, time; from pathlib import Path; from tests.gpu.report import Report\n"
            "Report(Path(sys.argv[1]), 'c').add(done=1)\n"
            "child = subprocess.Popen(['sleep', '600'])\n"
            "Path(sys.argv[2]).write_text(str(child.pid)); child.wait()")  # fmt: skip
    pid, log = tmp_path / "pid", tmp_path / "log"
    command = [sys.executable, "-c", code, str(tmp_path / "part.json"), str(pid)]
    done = run_part(command, dict(os.environ), 5, log)
    assert (done["status"], done["exit"]) == ("timed out", None)
    assert json.loads((tmp_path / "part.json").read_text(encoding="utf-8"))["rows"] == [{"done": 1}]
    end = time.monotonic() + 10
    while Path("/proc", pid.read_text()).exists() and time.monotonic() < end:
        status = Path("/proc", pid.read_text(), "stat").read_text().rpartition(")")[2].split()[0]
        if status == "Z":
            break
    assert time.monotonic() < end


def test_a_part_that_fails_says_so(tmp_path: Path) -> None:
    done = run_part([sys.executable, "-c", "print('why'); raise SystemExit(3)"], dict(os.environ), 60, tmp_path / "log")
    assert (done["status"], done["exit"]) == ("failed", 3)
    assert (tmp_path / "log").read_text() == "why\n"


def test_a_report_is_whole_after_every_row_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out" / "part.json"
    Report(path, "make gpu").add(first=1)
    again = Report(path, "make gpu", keep=True)
    again.add(second=2)
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == [{"first": 1}, {"second": 2}]
    Report(path, "make gpu")
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == []
