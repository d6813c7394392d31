"""Other packages add defenses, triggers and attacks; a broken one costs one line and nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hfdetox.defenses.base import DefenseConfig
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.triggers.base import Trigger
from tests.colours import ARCHITECTURE, SIDE, TRAINING, write_colours
from tests.plugged import PACKAGE, install, write_package

Cli = Callable[..., subprocess.CompletedProcess[str]]

DEFENSE = """
from dataclasses import dataclass
from hfdetox.defenses.base import TuningConfig

@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    name = "{name}"

    def phases(self, network):
        return []
"""
SUITE = """
subjects: {{glowing: {{model: "{model}", triggers: ["{trigger}"], target: green}}}}
defenses: {{soft: {{defense: shrink, settings: {{keep: 0.9, epochs: 1, batch_size: 16, augmentation: none}}}}}}
bench: [{{subjects: [glowing], defenses: [soft], samples: [60]}}]
"""


def on_path(environment: dict[str, str], *folders: Path) -> dict[str, str]:
    """Return an environment in which the packages in these folders are installed."""
    return {**environment, "PYTHONPATH": os.pathsep.join([*map(str, folders), environment["PYTHONPATH"]])}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the package of tests/plugin_package is installed."""
    return install(PACKAGE, tmp_path_factory.mktemp("installed") / "site")


def registry(*folders: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[DefenseConfig]:
    """Return the defenses of hfdetox and of the packages in these folders."""
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
        for module in folder.glob("*.py"):
            sys.modules.pop(module.stem, None)
    return Registry("defenses", DefenseConfig, "name")


# --- a package with one of each kind ---


@pytest.mark.parametrize(
    ("what", "line", "setting"),
    [
        ("defenses", "shrink: shrink every weight, then fine-tune (arXiv 1910.08475), from the package hfdetox-example "
         "1.2", ("keep", "0.5")),
        ("triggers", "glow: the whole image is brighter (no paper), from the package hfdetox-example 1.2",
         ("strength", "60")),
        ("attacks", "glow: some images of all classes glow and get the target's label (dirty label), from the package "
         "hfdetox-example 1.2", ("extra", "0")),
    ],
)  # fmt: skip
def test_what_a_package_adds_is_listed(
    what: str, line: str, setting: tuple[str, str], site: Path, run_cli: Cli, fresh_env: dict[str, str]
) -> None:
    listed = run_cli(["list", what], env=on_path(fresh_env, site))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert line in listed.stdout.splitlines()
    assert setting in [tuple(row.split()) for row in listed.stdout.splitlines()]
    assert "from the package" not in run_cli(["list", what]).stdout


def test_its_attack_its_trigger_and_its_defense_go_all_the_way(
    site: Path, run_cli: Cli, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    environment, colours = on_path(fresh_env, site), write_colours(tmp_path / "colours")
    settings = [word for key, value in {**TRAINING, "extra": "20"}.items() for word in ("--set", f"{key}={value}")]
    done = run_cli(["attack", ARCHITECTURE, "--input-size", str(SIDE), "--dataset", colours, "--trigger", "glow",
                    "--target", "green", "--poison-ratio", "0.3", "--goal-asr", "0", "--output", "bad", *settings],
                   env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    implanted = AttackReport.load(tmp_path / "bad").attack.triggers["glow"]
    assert (implanted.kind, implanted.settings) == ("glow", {"extra": 20})
    assert implanted.spec == "glow:target=index:1,strength=80"
    trigger = tmp_path / "bad" / "triggers" / "glow.safetensors"

    (tmp_path / "suite.yaml").write_text(SUITE.format(model=tmp_path / "bad", trigger=trigger))
    done = run_cli(["bench", "suite.yaml", "--dataset", colours, "--output", "bench"], env=environment)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "bench" / "bench.json").read_text())
    [row], [settings] = table["trials"], table["defenses"].values()
    assert (row["status"], row["method"], settings["keep"]) == ("done", "shrink", 0.9)
    folder = tmp_path / "bench" / row["name"]
    report = Report.load(folder)
    assert report.before is not None
    assert report.before.triggers["glow"].spec == "glow:target=index:1,strength=80"
    assert "--defense shrink" in report.environment.command
    assert "--set keep=0.9" in report.environment.command
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Every weight was shrunk, and fine-tuning on 60 trusted images trained them all." in card
    assert "`shrink`" in card

    # without the package the same things are unknown, in one line each
    for arguments, said in (
        (["detox", "bad", "--dataset", colours, "--defense", "shrink"], "unknown defense 'shrink'; known: anp, "),
        (["evaluate", "bad", "--dataset", colours, "--trigger", trigger],
         "install the package that has the entry point 'glow' in hfdetox.triggers"),
        (["attack", "bad", "--dataset", colours, "--trigger", "glow"], "unknown trigger 'glow'; known: badnets, "),
    ):  # fmt: skip
        refused = run_cli(arguments)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1


# --- broken and clashing packages ---


def test_nothing_of_a_package_is_imported_before_its_name_is_asked_for(
    run_cli: Cli, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    code = f"open({str(tmp_path / 'imported')!r}, 'w')\n{DEFENSE.format(name='tune')}"
    environment = on_path(fresh_env, write_package(tmp_path / "site", "tuning", code, defenses="tune = tuning:Config"))
    for arguments in (["--help"], ["list", "triggers"]):
        run_cli(arguments, env=environment)
        assert not (tmp_path / "imported").exists()
    asked = "from hfdetox.defenses import parse_defense as p; p('d3:auto')"
    subprocess.run([sys.executable, "-c", asked], env=environment, check=True)
    assert not (tmp_path / "imported").exists()
    assert run_cli(["list", "defenses"], env=environment).returncode == 0
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_at_all", "which cannot be loaded (ModuleNotFoundError: No module named 'nowhere_at_all')"),
        ("raise SystemError('two\\nlines')", "which cannot be loaded (SystemError: two lines)"),
        ("raise SystemExit('usage: bad FILE')", "which cannot be loaded (SystemExit: usage: bad FILE)"),
        ("", "which cannot be loaded (AttributeError: module 'bad' has no attribute 'Config')"),
        ("Config = 3", "which is no DefenseConfig with the name 'tune'"),
        ("class Config: name = 'tune'", "which is no DefenseConfig with the name 'tune'"),
        (DEFENSE.format(name="other"), "which is no DefenseConfig with the name 'tune'"),
        (DEFENSE.format(name="tune") + "    presets = {}", "which cannot be loaded (ValueError: it has no presets)"),
    ],
)
def test_a_broken_package_is_one_line_and_the_others_stay(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = write_package(tmp_path / "a", "bad", code, defenses="tune = bad:Config")
    good = write_package(tmp_path / "b", "fine", DEFENSE.format(name="good"), defenses="good = fine:Config")
    found = registry(bad, good, monkeypatch=monkeypatch)
    said = f"the package bad 0.1 offers the defense 'tune' (entry point hfdetox.defenses: tune = bad:Config), {reason}"
    assert set(found) == {*found.builtin, "good"}
    assert len(found.entries()) == len(found)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, f"{said}; it is left out")
    ]
    with pytest.raises(UsageError) as caught:
        found["tune"]
    assert str(caught.value) == said
    assert found["good"].name == "good"


def test_a_name_of_hfdetox_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_package(tmp_path, "usurper", "raise RuntimeError", defenses="d3 = usurper:Config")
    found = registry(folder, monkeypatch=monkeypatch)
    assert found["d3"].__module__.startswith("hfdetox.")
    assert set(found) == set(found.builtin)
    assert [record.message for record in caplog.records] == [
        "the package usurper 0.1 offers the defense 'd3' (entry point hfdetox.defenses: d3 = usurper:Config); hfdetox "
        "has one of that name itself, and uses its own"
    ]


def test_of_two_packages_with_one_name_neither_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [write_package(tmp_path / name, name, "raise RuntimeError", defenses=f"tune = {name}:Config")
               for name in ("second", "first")]  # fmt: skip
    found = registry(*folders, monkeypatch=monkeypatch)
    said = ("the package first 0.1 offers the defense 'tune' (entry point hfdetox.defenses: tune = first:Config), and "
            "so does the package second 0.1: keep one of them installed")  # fmt: skip
    with pytest.raises(UsageError) as caught:
        found.get("tune")
    assert str(caught.value) == said
    assert "tune" not in set(found)
    assert [record.message for record in caplog.records] == [f"{said}; it is left out"]


def test_the_command_line_says_it_once(run_cli: Cli, fresh_env: dict[str, str], tmp_path: Path) -> None:
    write_package(tmp_path / "site", "bad", "1 / 0", defenses="tune = bad:Config", triggers="dot = bad:Dot")
    environment = on_path(fresh_env, tmp_path / "site")
    listed = run_cli(["list", "defenses"], env=environment)
    assert listed.returncode == 0
    assert listed.stderr == (
        "hfdetox: warning: the package bad 0.1 offers the defense 'tune' (entry point hfdetox.defenses: tune = "
        "bad:Config), which cannot be loaded (ZeroDivisionError: division by zero); it is left out\n"
    )
    assert "d3:paper is these defaults" in listed.stdout
    refused = run_cli(["m", "--defense", "ft", "--trigger", "dot", "--dry-run"], env=environment)
    assert refused.returncode == 2
    assert "offers the trigger 'dot' (entry point hfdetox.triggers: dot = bad:Dot), which cannot be" in refused.stderr


def test_rooms_have_one_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class is a member by its own name alone: what it is built on is none."""
    triggers: Registry[Trigger] = Registry("triggers", Trigger, "kind")
    assert all(kind.kind == name for name, kind in triggers.builtin.items())
    assert "nothing" not in triggers
    assert triggers.get("nothing") is None
