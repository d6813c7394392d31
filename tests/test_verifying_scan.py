"""`hfdetox verify` and what was known without a trigger: what is measured again, and what never is."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfdetox import detoxify
from hfdetox.cli import app as cli
from hfdetox.reporting.stated import unchecked
from hfdetox.verifying import Verification, verify
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER
from tests.evidence.made import evidence, scan
from tests.written_report import written_report

_MADE: list[Path] = []
# in place of a value: the field is left out
GONE = "gone"


@pytest.fixture
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that is long enough for the scores that take a few passes, made once."""
    if not _MADE:
        made, output = backdoored.made(tmp_path_factory), tmp_path_factory.mktemp("cleaned") / "out"
        detoxify(made.timm, dataset=str(made.digits), clean_samples=100, eval_samples=120, defense="ft",
                 settings={"epochs": "80", "batch_size": "50", "augmentation": "none"}, triggers=[TRIGGER],
                 target=TARGET, residual=True, output=output, progress=False)  # fmt: skip
        _MADE.append(output)
    return _MADE[0]


def check(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    made = backdoored.made(tmp_path_factory)
    return verify(folder, dataset=str(made.digits), base=str(made.timm), progress=False, device="cpu")


def test_scores_and_grade_are_measured_again_and_the_rest_is_named(
    cleaned: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check(cleaned, tmp_path_factory)
    assert found.verdict == "match", [one for one in found.checks if one.finding == "mismatch"]
    named = {one.what for one in found.checks}
    cheap = {"before: score latent-shift", "before: score odd-images", "before: score head-probe",
             "after: score latent-shift", "after: score odd-images", "after: score scar"}  # fmt: skip
    assert cheap <= named
    assert found.unchecked[0] == "pictures"
    assert found.unchecked[-1] == "residual tests (re-tuning, path, drift)"
    made = backdoored.made(tmp_path_factory)
    assert cli.run(["verify", str(cleaned), "--dataset", str(made.digits), "--base", str(made.timm)]) == 0
    assert "never recomputed: pictures" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "value", "expected"), [
    (("before", "scores", "latent-shift", "statistic"), 0.01, "before: score latent-shift"),
    (("after", "scores", "odd-images", "statistic"), 0.9, "after: score odd-images"),
    (("after", "scores", "scar", "finding"), "unknown", "after: findings of the scores"),
    (("images", "duplicates"), 7, "grade of the clean images"),
    (("images", "bound"), 0.001, "grade of the clean images"),
    (("images", "sure"), 0.123, "clean images that the model is sure of"),
    (("before", "finding"), "no evidence here", "what the scans say"),
    (("before", "why"), "all is well", "what the scans say"),
    (("before", "combined", "models"), 1000, "what the scans say"),
    (("after", "combined", "measured"), None, "what the scans say"),
    (("before", "scores", "patch", "threshold", "value"), 9.0, "what the scans say"),
    (("after", "scores", "latent-shift", "values", 3), 77.0, "after: score latent-shift, each class"),
    (("before", "scores", "head-probe", "label"), "a class of my own", "what the scans say"),
    (("before", "scores", "head-probe"), GONE, "what the scans say"),
    (("shifts", 4, "after"), 0.5, "what the scans say"),
    (("shifts", 0, "name"), "another", "what the scans say"),
    (("after",), None, "what the scans say"),
    (("agreement",), None, "what the scans say"),
    (("agreement", "moved"), [], "classes that are answered otherwise"),
    (("before", "samples"), 5000, "before: clean images looked at"),
])  # fmt: skip
def test_an_edited_scan_is_found(
    cleaned: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, path: tuple[str | int, ...],
    value: Any, expected: str,
) -> None:  # fmt: skip
    folder = tmp_path / "out"
    shutil.copytree(cleaned, folder)
    plain = json.loads((folder / "detox_report.json").read_text())
    held: Any = functools.reduce(operator.getitem, path[:-1], plain["evidence"])
    if value == GONE:
        del held[path[-1]]
    else:
        held[path[-1]] = not held[path[-1]] if path[-1] == "measured" else value
    (folder / "detox_report.json").write_text(json.dumps(plain))
    found = check(folder, tmp_path_factory)
    assert found.status == 1
    assert expected in {one.what for one in found.mismatches}


def test_the_ids_of_the_taxonomies_are_those_of_the_version(
    cleaned: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(cleaned, folder)
    plain = json.loads((folder / "detox_report.json").read_text())
    for version, wrong in ((plain["hfdetox_version"], True), ("0.1.9", False)):
        edited = plain | {"taxonomies": {"MITRE ATLAS, 1999": ["AML.T0000"]}, "hfdetox_version": version}
        (folder / "detox_report.json").write_text(json.dumps(edited))
        found = check(folder, tmp_path_factory)
        # another version has other ids, thresholds and words
        assert ("ids of the taxonomies" in {one.what for one in found.mismatches}) is wrong


def test_scores_that_search_are_named_as_never_recomputed() -> None:
    found = scan()
    searched = replace(found, scores={**found.scores, "patch": found.scores["latent-shift"],
                                      "margin": found.scores["latent-shift"]})  # fmt: skip
    report = replace(written_report(), evidence=replace(evidence(), before=searched))
    named = ["pictures", "seconds and memory of the run"]
    assert unchecked(report) == [*named, "before: score patch", "before: score margin"]
    assert unchecked(written_report()) == named
