"""What the commands print and where: documents, lines, warnings and errors, and that refusing stays one line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfdetox.cli import app as cli
from hfdetox.config import ConsoleOptions
from hfdetox.errors import HubError, RunError, UsageError

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_warnings_of_the_package_are_lines_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("hfdetox")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli.prepare_console(ConsoleOptions())
    cli.prepare_console(ConsoleOptions())
    logger.warning("class %s has\n3 images", "cat")
    logger.info("not shown")
    assert capsys.readouterr().err == "hfdetox: warning: class cat has 3 images\n"


def test_json_mode_keeps_other_output_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.standard_output(ConsoleOptions(as_json=True)) as out:
        sys.stdout.write("a library's notice\n")
        out.show({"accuracy": 0.5}, ["a line"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"accuracy": 0.5}
    assert printed.err == "a library's notice\n"


NATIVE = """
import os
from hfdetox.cli.app import standard_output
from hfdetox.config import ConsoleOptions

with standard_output(ConsoleOptions(as_json=True)) as out:
    os.write(1, b"a C++ library's notice\\n")
    out.show({"accuracy": 0.5}, [])
print("after")
"""


def test_json_mode_keeps_what_is_written_to_the_descriptor_off_standard_output() -> None:
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, check=True)
    assert done.stdout == '{\n  "accuracy": 0.5\n}\nafter\n'
    assert done.stderr == "a C++ library's notice\n"


@pytest.mark.parametrize(("quiet", "printed"), [(False, "[bold]a line\n"), (True, "")])
def test_lines_are_printed_as_they_are_unless_quiet(
    quiet: bool, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli.standard_output(ConsoleOptions(quiet=quiet)) as out:
        out.show({}, ["[bold]a line"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("error", "status"), [(RunError, 1), (UsageError, 2), (HubError, 3)])
def test_errors_carry_their_status_and_hide_tokens(
    error: type[Exception], status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error("the token hf_abcdefghijklmnopqrstuvwxyz012345\nis not accepted")

    monkeypatch.setattr(cli, "check_torchvision", fail)
    assert cli.run(["list", "triggers"]) == status
    assert capsys.readouterr().err == "hfdetox: error: the token *** is not accepted\n"
    assert cli.run(["list", "triggers", "--debug"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "hf_abc" not in shown


def fake_torchvision(folder: Path, environment: dict[str, str], failure: str) -> dict[str, str]:
    """Return an environment in which importing torchvision raises `failure` (Python source of an exception)."""
    package = folder / "fake" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {failure}\n", encoding="utf-8")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(package.parent), environment["PYTHONPATH"]])}


@pytest.mark.parametrize(
    "failure",
    [
        "RuntimeError('operator torchvision::nms does not exist')",
        "RuntimeError('Detected that PyTorch and torchvision were compiled with different CUDA major versions.')",
        "ImportError('undefined symbol: _ZN3c10')",
    ],
)
def test_torchvision_that_does_not_fit_is_named_in_one_line(
    failure: str, run_cli: Run, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    process = run_cli(["list", "defenses"], env=fake_torchvision(tmp_path, fresh_env, failure))
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert failure.partition("'")[2].rstrip("')") in process.stderr
    assert "pip install torch torchvision" in process.stderr


def test_unforeseen_error_is_one_line_and_a_traceback_with_debug(
    run_cli: Run, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    environment = fake_torchvision(tmp_path, fresh_env, "ZeroDivisionError('by nought')")
    process = run_cli(["list", "defenses"], env=environment)
    assert process.returncode == 1
    assert process.stderr.startswith("hfdetox: error: ZeroDivisionError: by nought")
    assert process.stderr.count("\n") == 1
    assert "Traceback" in run_cli(["list", "defenses", "--debug"], env=environment).stderr


def test_only_the_main_process_prints(run_cli: Run, fresh_env: dict[str, str]) -> None:
    main, other = (run_cli(["list", "triggers"], env={**fresh_env, "RANK": rank}) for rank in "01")
    assert main.returncode == other.returncode == 0
    assert "badnets" in main.stdout
    assert other.stdout == ""
