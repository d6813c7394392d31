"""Two runs with one output, and runs that are resumed with other inputs than they began with."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.errors import UsageError
from hfdetox.files import locked
from hfdetox.models.classifier import load_classifier
from hfdetox.runs.folder import FINGERPRINT_FILE, RunFolder
from tests.runs.test_result import result_of
from tests.test_files import holding
from tests.tiny_models import timm_model


@pytest.mark.parametrize("command", ["detox", "resume", "attack"])
def test_a_second_run_with_the_same_output_is_told_who_is_at_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holding(tmp_path / "out.run", 60)
    words = {
        "detox": ["org/x", "--dataset", "org/d", "--output", str(tmp_path / "out")],
        "resume": ["--resume", str(tmp_path / "out.run")],
        "attack": ["attack", "org/x", "--dataset", "org/d", "--trigger", "badnets", "--output", str(tmp_path / "out")],
    }
    try:
        assert cli.run(words[command]) == 2
        assert f"is in use by process {process.pid} on " in capsys.readouterr().err
        if command == "detox":
            with pytest.raises(UsageError, match=f"in use by process {process.pid}"):
                result_of(load_classifier(timm_model())).save(tmp_path / "out")
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    # the dead holder is in nobody's way
    result_of(load_classifier(timm_model())).save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_begun_holds_its_folder_and_only_the_lock_is_no_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out.run")
    with locked(run.path, "it"):
        run.refuse_existing()
        run.record_fingerprint({"x": "1"})
        run.remove()
    assert not run.path.exists()
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.remove()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.check_fingerprint({"model weights": "new"})
    began = {"hfdetox version": "1.0", "model weights": "a" * 64, "clean images": None}
    run.record_fingerprint(began)
    run.check_fingerprint(began)
    run.record_fingerprint({"model weights": "later"})
    for name in began:
        with pytest.raises(UsageError, match=rf"began with other inputs: {name} \(.*, now other\) changed since"):
            run.check_fingerprint({**began, name: "other"})
    (tmp_path / FINGERPRINT_FILE).write_text("{")
    with pytest.raises(UsageError, match=f"{FINGERPRINT_FILE} is not valid JSON"):
        run.check_fingerprint(began)
