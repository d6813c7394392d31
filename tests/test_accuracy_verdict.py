"""A run that costs too much accuracy: the summary, the card, the exit status, and what is not published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.errors import UsageError
from hfdetox.reporting.report import Report
from hfdetox.runs.publish import push_output
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER, Made
from tests.hub_server.server import HubServer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def destroying(made: Made, output: Path, *more: str) -> list[str]:
    """Return a run of one step so long that nothing is left of the model."""
    return [str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--trigger", TRIGGER, "--target", TARGET,
            "--precision", "no", "--defense", "ft", "--epochs", "1", "--lr", "20", "--batch-size", "100",
            "--output", str(output), *more]  # fmt: skip


def test_a_destroyed_model_is_rejected_and_kept_and_not_pushed(
    made: Made, hub: HubServer, hub_token: str, repo_name: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name, output = repo_name(), tmp_path / "out"
    assert cli.run(destroying(made, output, "--push-to", name)) == 1
    shown = capsys.readouterr()
    first, *_ = shown.out.splitlines()
    assert first.startswith("REJECTED: ")
    assert first.endswith("at most 5 allowed)")
    # the word would be the last thing that is true of it
    assert "  mitigated" not in shown.out
    assert "not foreseen" not in shown.err
    assert not hub.exists(name)
    report = Report.load(output)
    assert report.rejected
    assert report.accuracy_loss is not None
    assert report.accuracy_loss.interval[0] > 0.05
    assert set(report.verdicts.values()) <= {"rejected: accuracy", "redirected, not mitigated", "not mitigated"}
    assert (report.output.pushed_to, report.output.commit) == (None, None)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.split("---\n", 2)[2].lstrip().startswith("**Rejected for its accuracy: ")
    assert "**Mitigated**" not in card
    assert not (tmp_path / "out.run").exists()

    # the folder is pushed on purpose only
    assert cli.run(["push", str(output), name]) == 2
    assert "it is pushed only with --accept-accuracy-loss" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"was rejected: .* points of accuracy lost"):
        push_output(output, name)
    assert not hub.exists(name)
    assert cli.run(["push", str(output), name, "--accept-accuracy-loss"]) == 0
    assert "**Rejected for its accuracy: " in hub.files(name)["README.md"].decode()


def test_who_allows_the_loss_gets_the_model(
    made: Made, hub: HubServer, hub_token: str, repo_name: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name, output = repo_name(), tmp_path / "out"
    assert cli.run(destroying(made, output, "--max-accuracy-loss", "100", "--json", "--push-to", name)) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["accuracy_loss"]["verdict"], plain["accuracy_loss"]["allowed"]) == ("accepted", 1.0)
    assert plain["environment"]["command"].count("--max-accuracy-loss 100") == 1
    assert hub.exists(name)
    other = repo_name()
    accepting = ["--push-to", other, "--accept-accuracy-loss", "--overwrite"]
    assert cli.run(destroying(made, output, *accepting)) == 1
    assert hub.exists(other)
    assert "--accept-accuracy-loss" not in Report.load(output).environment.command


@pytest.mark.parametrize("given", ["-1", "101", "nan"])
def test_points_that_are_none(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["m", "--max-accuracy-loss", given]) == 2
    assert "--max-accuracy-loss" in capsys.readouterr().err
