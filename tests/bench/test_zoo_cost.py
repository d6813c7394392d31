"""What the models of a suite will take, said before any of their processes starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfdetox.bench.tasks import load_suite
from hfdetox.bench.zoo import Zoo, run_suite
from hfdetox.cli import app as cli
from hfdetox.config_bench import SuiteOptions
from tests import backdoored

SUITE = """
dataset: {{id: {digits}, samples: 200, eval_samples: 300}}
training: {{epochs: 4, batch_size: 50}}
models:
  new: {{model: "timm-arch:test_resnet", input_size: 32}}
  known: {{model: {timm}, settings: {{epochs: 6}}}}
triggers: {{twice: {{spec: ["badnets:size=3", "blended"], settings: {{epochs: 8}}}}}}
grids:
  - {{models: [new, known], triggers: [none, twice], ratios: [0.1, 0.2]}}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, folder = backdoored.made(tmp_path_factory), tmp_path_factory.mktemp("suite")
    (folder / "suite.yaml").write_text(SUITE.format(digits=made.digits, timm=made.timm))
    return folder / "suite.yaml"


def effort() -> float:
    """The models of the suite, counted by hand."""
    clean = 4 * 200 + 300 / 3
    # of a trained one too, before and after
    clean_again = 6 * 200 + 2 * 300 / 3
    attacked = 2 * (8 * 200 + 300 * 3 / 3)
    # a tenth is looked at after each epoch, clean and with both triggers
    attacked_again = 2 * (8 * 180 + (8 * 20 + 2 * 300) * 3 / 3)
    return clean + clean_again + attacked + attacked_again


def test_a_dry_run_counts_what_is_to_be_built_and_writes_nothing(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[object] = []
    monkeypatch.setattr("hfdetox.runs.estimate.speed_of", lambda *_: timed.append(0) or 10.0)
    words = ["attack", "--suite", str(suite), "--output", str(tmp_path / "zoo"), "--dry-run"]
    assert cli.run([*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["models"][:2] == ["new-clean-s0", "known-clean-s0"]
    assert len(planned["models"]) == 6
    assert planned["minutes"] == [pytest.approx(effort() / 10 / 60, abs=0.01)] * 2
    # one model of each row
    assert len(timed) == 2
    assert cli.run(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"time: 6 models: about {round(effort() / 600)} minutes" in shown
    assert list(tmp_path.iterdir()) == []
    assert cli.run([*words, "--epochs", "3"]) == 2
    assert "leave out --epochs" in capsys.readouterr().err


def test_what_cannot_be_timed_has_no_minutes_and_stops_no_zoo(suite: Path, tmp_path: Path) -> None:
    zoo = Zoo(load_suite(suite), SuiteOptions(suite, output=tmp_path / "zoo", dataset=str(tmp_path)))
    assert zoo.minutes is None
    assert zoo.describe_cost() == "6 models: how long is not known"


def test_a_suite_says_it_before_the_first_process(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    said: list[str] = []

    def never(zoo: Zoo) -> None:
        said.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    monkeypatch.setattr("hfdetox.bench.zoo.run_tasks", never)
    for progress in (True, False):
        with pytest.raises(KeyboardInterrupt):
            run_suite(suite, output=tmp_path / "zoo", progress=progress)
    assert said[0].startswith("6 models: about ")
    assert said[1] == ""
