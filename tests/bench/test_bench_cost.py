"""What a bench will take, said before any of its processes starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfdetox.bench.bench import Bench, run_bench
from hfdetox.bench.tasks import load_suite
from hfdetox.cli import app as cli
from hfdetox.config_bench import BenchOptions
from hfdetox.runs.estimate import Timed
from tests import backdoored

SUITE = """
dataset: {{id: {digits}, eval_samples: 300}}
models: {{tiny: "timm-arch:test_resnet"}}
grids: [{{models: [tiny], triggers: [badnets], ratios: [0.1]}}]
defenses:
  ft: {{defense: ft, settings: {{epochs: 5, batch_size: 50}}}}
  slow: {{defense: ft-sam, settings: {{epochs: 5}}}}
subjects:
  one: {{model: {timm}, triggers: ["badnets:size=3", "blended"], target: 3}}
  other: {{model: {transformers}}}
bench:
  - {{subjects: [one, other], defenses: [ft, slow], samples: [100, 200], seeds: [0, 1]}}
  - {{models: [tiny], triggers: [badnets], ratios: [0.1], defenses: [ft], samples: [100]}}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, folder = backdoored.made(tmp_path_factory), tmp_path_factory.mktemp("suite")
    text = SUITE.format(digits=made.digits, timm=made.timm, transformers=made.transformers)
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"


def seconds() -> float:
    """The runs of the suite, counted by hand, at 100 images a second of the one model and at 50 of the other."""
    total = 0.0
    for speed, triggers in ((100, 2), (50, 0)):
        for times in (1, 2):
            for images in (100, 200):
                total += 2 * (times * 5 * images + 2 * 300 * (1 + triggers) / 3) / speed
    return total


def test_a_dry_run_counts_what_is_to_be_run_and_writes_nothing(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[str] = []

    def time_like(options):
        timed.append(options.model)
        return Timed(100.0 if len(timed) % 2 else 50.0, "this CPU", 10, True)

    monkeypatch.setattr("hfdetox.bench.bench.time_like", time_like)
    words = ["bench", str(suite), "--output", str(tmp_path / "bench"), "--zoo", str(tmp_path), "--dry-run"]
    assert cli.run([*words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["runs"]) == 16
    assert planned["runs"][0] == "one/ft-n100-s0"
    assert planned["cannot be run"] == {"tiny-badnets-0.1-s0/ft-n100-s0": "the zoo has no model tiny-badnets-0.1-s0"}
    assert planned["minutes"] == [pytest.approx(seconds() / 60, abs=0.01)] * 2
    # one model of each row, not one of each run
    assert len(timed) == 2
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert "time: 16 runs: about 6 minutes" in " ".join(shown.split())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_timed_has_no_minutes_and_stops_no_bench(suite: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    bench = Bench(
        load_suite(suite), BenchOptions(suite, output=tmp_path / "bench", zoo=tmp_path, dataset=str(pictures))
    )
    assert bench.minutes is None
    assert bench.describe_cost() == "16 runs: how long is not known"


def test_a_bench_says_it_before_the_first_process(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    said: list[str] = []

    def never(bench: Bench) -> None:
        said.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    monkeypatch.setattr("hfdetox.bench.bench.run_tasks", never)
    for progress in (True, False):
        with pytest.raises(KeyboardInterrupt):
            run_bench(suite, output=tmp_path / "bench", zoo=tmp_path, progress=progress)
    # on this machine, with the models themselves
    assert said[0].startswith("16 runs: about ")
    assert said[1] == ""
