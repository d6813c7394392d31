"""Messages and progress bars, as a person who uses hfdetox as a library sets them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hfdetox.logging as talk
from hfdetox import progress
from hfdetox.config import DetoxOptions
from hfdetox.data.cache import Pixels
from hfdetox.data.load import pull_images
from hfdetox.models.classifier import load_classifier
from hfdetox.training.devices import make_accelerator
from tests.conftest import REPOSITORY
from tests.image_data import write_dataset
from tests.tiny_models import timm_model
from tests.tiny_training import toy_preprocessing, toy_set

BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
Said = Callable[..., tuple[str, str]]


@pytest.fixture
def said(fresh_env: dict[str, str]) -> Said:
    """A function that runs code in a process of its own, and returns its standard output and error."""

    def run(code: str, **variables: str) -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", code], env={**fresh_env, **variables}, cwd=REPOSITORY,
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout, done.stderr

    return run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    level = talk.get_verbosity()
    yield
    talk.set_verbosity(level)
    talk.enable_progress_bars()


ALL = """import logging, hfdetox
logger = logging.getLogger("hfdetox.runs.publish")
for level in ("debug", "info", "warning", "error", "critical"): getattr(logger, level)("so %s", level)
"""


def test_warnings_go_to_standard_error_once_and_not_to_the_root(said: Said) -> None:
    lines = "hfdetox: warning: so warning\nhfdetox: error: so error\nhfdetox: critical: so critical\n"
    assert said(ALL) == ("", lines)
    # a root handler of the user's does not repeat them
    assert said("import logging; logging.basicConfig()\n" + ALL) == ("", lines)


@pytest.mark.parametrize(("name", "shown"), [("debug", 5), ("INFO", 4), ("warning", 3), ("error", 2), ("critical", 1)])
def test_the_variable_names_the_least_level(name: str, shown: int, said: Said) -> None:
    _, error = said(ALL, HFDETOX_VERBOSITY=name)
    assert len(error.splitlines()) == shown


def test_an_unknown_level_is_said_and_the_default_holds(said: Said) -> None:
    _, error = said(ALL, HFDETOX_VERBOSITY="loud")
    assert error.startswith("hfdetox: warning: unknown HFDETOX_VERBOSITY 'loud'; known: debug, info, warning, error")
    assert len(error.splitlines()) == 4


def test_a_logger_that_the_user_has_configured_stays_as_it_is(said: Said) -> None:
    code = """import logging, sys
logger = logging.getLogger("hfdetox")
logger.addHandler(logging.StreamHandler(sys.stdout)); logger.setLevel("ERROR")
"""
    assert said(code + ALL) == ("so error\nso critical\n", "")


@pytest.mark.parametrize("name", ["debug", "info", "warning", "error"])
def test_functions_set_the_level(name: str) -> None:
    getattr(talk, f"set_verbosity_{name}")()
    level = getattr(logging, name.upper())
    assert talk.get_verbosity() == level
    assert logging.getLogger("hfdetox.defenses.d3").isEnabledFor(level)
    assert not logging.getLogger("hfdetox.defenses.d3").isEnabledFor(level - 1)


@pytest.mark.parametrize(
    ("variable", "disabled", "off"),
    [("", False, False), ("", True, True), ("1", False, True), ("TRUE", False, True), ("0", True, False)],
)
def test_the_hubs_variable_wins_over_the_functions(
    variable: str, disabled: bool, off: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(BARS, variable)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    (talk.disable_progress_bars if disabled else talk.enable_progress_bars)()
    assert talk.are_progress_bars_disabled() is off
    with progress.progress_bar("look", 3, "image", shown=True, keep=True) as bar:
        bar.update(3)
    assert ("look: 100%" in capsys.readouterr().err) is not off
    with progress.progress_bar("look", 3, "image", shown=False, keep=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_only_the_main_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BARS)
    monkeypatch.setenv("RANK", "1")
    assert progress.progress_bar("look", 3, "image", shown=True).disable


def test_decoding_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Both times: when a set is read to find broken images and duplicates, and when it is prepared for a model."""
    monkeypatch.delenv(BARS)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    options = DetoxOptions("m", dataset=str(write_dataset(tmp_path / "photos")))
    make_accelerator("cpu", "no")
    pull_images(options, None, load_classifier(timm_model(num_classes=3)), print, progress=True)
    shown = capsys.readouterr().err
    # a bar is not always drawn once more at its end
    assert re.search(r"read images: +[1-9]\d*%", shown)
    with progress.progress_bar("decode", None, "image", shown=True) as bar:
        Pixels(toy_set(12), toy_preprocessing(), progress=progress.updates(bar))
        assert (bar.n, bar.total) == (12, 12)


def test_a_message_stands_above_the_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(BARS)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with progress.progress_bar("look", 3, "image", shown=True):
        capsys.readouterr()
        talk.write_line("hfdetox: warning: stop")
    assert "\rhfdetox: warning: stop\n" in capsys.readouterr().err
