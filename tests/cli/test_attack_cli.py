"""`hfdetox attack`, `push` and `list attacks`: what is printed and refused, and that nothing goes up unmeant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfdetox.cli import app as cli
from hfdetox.cli.options import CommandLine, attack_options, suite_options
from hfdetox.config import AttackConsole, AttackOptions
from hfdetox.errors import UsageError
from hfdetox.hub.client import AccessError
from hfdetox.reporting.card import build_card
from hfdetox.reporting.report import AttackReport
from hfdetox.runs.folder import check_output
from hfdetox.runs.publish import check_push_allowed, push_output
from tests.attacked import LABELS, attack_report, clean_control
from tests.cli.test_cli import probe
from tests.colours import ARCHITECTURE, SIDE, TRAINING, write_colours
from tests.output_folder import WEIGHTS

CONSENT = "--i-know-this-is-backdoored"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours."""
    return write_colours(tmp_path_factory.mktemp("colours"))


def words(dataset: Path, *more: str, **settings: str) -> list[str]:
    """Return the command line of an attack at toy size."""
    pairs = {**TRAINING, **settings}.items()
    return ["attack", ARCHITECTURE, "--input-size", str(SIDE), "--dataset", str(dataset), "--device", "cpu",
            "--precision", "no", "--target", "green", *more,
            *(word for key, value in pairs for word in ("--set", f"{key}={value}"))]  # fmt: skip


def line(**spelled: Any) -> CommandLine:
    """Return a command line of `hfdetox attack` as Typer reads it."""
    left = {"settings": [], "epochs": None, "lr": None, "batch_size": None}
    return CommandLine([AttackOptions, AttackConsole], left | spelled, set(spelled))


def output_folder(folder: Path, report: AttackReport) -> Path:
    """Write a report and its card as an attack leaves them."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text(build_card(report, source_card=None, repo_id=None, labels=LABELS))
    report.save(folder)
    return folder


def test_the_help_lists_every_option_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    process = probe("attack", "--help")
    assert process.returncode == 0, process.stderr
    assert CONSENT in process.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attack"], "MODEL is missing"),
        (["attack", "m", "--samples", "0"], "--samples 0 leaves no images"),
        (["attack", "m", "--model-arg", "depth"], "is not KEY=VALUE"),
        (["attack", "m", "--epochs", "3", "--set", "epochs=4"], "epochs is given twice"),
        (["attack", "m", "--init", "zeros"], "--init"),
        (["attack", "m", "--input-size", "0"], "--input-size"),
        (["attack", "--suite", "nowhere.yaml"], "--suite"),
        (["attack", "m", "--trigger", "none", "--private"], "name the repository with --push-to"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_suite_decides_by_itself_what_is_built(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("models: {}")
    suite = {"suite": tmp_path / "s.yaml"}
    assert suite_options(line(**suite, output=tmp_path, jobs=2)).jobs == 2
    with pytest.raises(UsageError, match="leave out MODEL, --trigger"):
        suite_options(line(**suite, model="m", triggers=["badnets"]))
    with pytest.raises(UsageError, match="name it with --output"):
        suite_options(line(**suite))


@pytest.mark.parametrize(
    ("model", "triggers", "name"),
    [
        ("timm-arch:resnet18", ["badnets"], "resnet18-backdoored"),
        ("org/model", ["badnets"], "model-backdoored"),
        ("org/model", ["none"], "model-clean"),
    ],
)
def test_the_output_is_called_after_the_model(model: str, triggers: list[str], name: str) -> None:
    assert attack_options(line(model=model, triggers=triggers)).output == Path(name)


def test_model_arguments_are_numbers_truth_values_lists_and_texts() -> None:
    texts = ["a=1", "b=1e-3", "c=[1,2]", "d=true", "e=avg", "f=[[1,2],[3]]", "g=-0.5"]
    expected = {"a": 1, "b": 0.001, "c": [1, 2], "d": True, "e": "avg", "f": [[1, 2], [3]], "g": -0.5}
    assert line(model_args=texts).options(AttackOptions).model_args == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["depth"], "is not KEY=VALUE"),
        (["a b=1"], "is not KEY=VALUE"),
        (["a=1", "a=2"], "given twice"),
        (["a={b: 1}"], "give a number"),
        (["a="], "give a number"),
        (["a=[1"], "neither JSON nor YAML"),
        (["a=&all [1, *all]"], "give a number"),
    ],
)
def test_model_arguments_of_another_form_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        line(model_args=texts).options(AttackOptions)


def test_json_is_the_report_and_the_status_says_whether_it_took(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(dataset, "--trigger", "badnets:size=8", "--json", "--output", str(tmp_path / "out"), epochs="1")
    assert cli.run([*run, "--goal-asr", "0"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "attack_report.json").read_text())
    assert cli.run([*run, "--goal-asr", "1", "--poison-ratio", "0.01", "--overwrite"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["succeeded"] is False
    assert "hfdetox: warning: the attack did not succeed: trigger badnets succeeds on" in err


def test_the_screen_says_that_it_did_not_succeed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(dataset, "--trigger", "badnets:size=8", "--output", str(tmp_path / "out"), epochs="1")
    assert cli.run([*run, "--goal-asr", "1", "--poison-ratio", "0.01"]) == 1
    out = capsys.readouterr().out
    assert "THE ATTACK DID NOT SUCCEED: trigger badnets succeeds on" in out
    assert "PSNR" in out


def test_list_attacks_names_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "attacks"]) == 0
    out = capsys.readouterr().out
    assert "badnets: " in out
    assert "learning_rate" in out


def test_an_interrupt_leaves_nothing_and_is_one_line(dataset: Path, tmp_path: Path, fresh_env: dict[str, str]) -> None:
    run = words(dataset, "--trigger", "badnets:size=8", "--output", "out", epochs="5000")
    # the bar says when the training has begun
    shown = {name: value for name, value in fresh_env.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    with subprocess.Popen([sys.executable, "-m", "hfdetox", *run], cwd=tmp_path, env=shown, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            os.set_blocking(process.stderr.fileno(), False)
            seen, end = b"", time.monotonic() + 100
            while b"train" not in seen and time.monotonic() < end:
                seen += process.stderr.read() or b""
                time.sleep(0.1)
            assert b"train" in seen
            process.send_signal(signal.SIGINT)
            os.set_blocking(process.stderr.fileno(), True)
            _, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"hfdetox: interrupted; nothing was written" in err
    assert b"Traceback" not in err
    assert list(tmp_path.glob("*out*")) == []


# --- publishing ---


@pytest.mark.parametrize("way", ["output", "command"])
def test_a_backdoored_model_never_goes_up_without_the_flag(
    way: str, hub: Any, repo_name: Callable[..., str], hub_token: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, name = output_folder(tmp_path / "out", attack_report()), repo_name()
    if way == "command":
        assert cli.run(["push", str(folder), name]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert CONSENT in err
    else:
        with pytest.raises(UsageError, match=CONSENT):
            push_output(folder, name)
    assert not hub.exists(name)


def test_with_the_flag_it_goes_to_a_private_repository_under_its_own_name(
    hub: Any, repo_name: Callable[..., str], hub_token: str, tmp_path: Path
) -> None:
    folder, name = output_folder(tmp_path / "out", attack_report()), repo_name()
    pushed = push_output(folder, name, i_know_this_is_backdoored=True)
    assert hub.repo(name).private
    assert hub.history(name)[0].title.startswith("Upload a deliberately backdoored model, for research only")
    files = hub.files(name)
    assert files["README.md"].decode().split("---\n\n")[1].startswith("**This model is deliberately backdoored")
    assert name in files["README.md"].decode()
    assert json.loads(files["attack_report.json"])["output"]["pushed_to"] == name
    assert AttackReport.load(folder).output.commit == pushed.commit
    # the same again finds everything there
    assert push_output(folder, name, i_know_this_is_backdoored=True).repo_id == name


def test_a_public_repository_is_refused_unless_asked_for(
    hub: Any, repo_name: Callable[..., str], hub_token: str, tmp_path: Path
) -> None:
    folder, name = output_folder(tmp_path / "out", attack_report()), repo_name()
    hub.create_repo(name)
    head = hub.head(name)
    for call in (
        lambda: check_push_allowed(name, backdoored=True, i_know_this_is_backdoored=True),
        lambda: push_output(folder, name, i_know_this_is_backdoored=True),
        lambda: push_output(folder, name, i_know_this_is_backdoored=True, create_pr=True),
    ):
        with pytest.raises(UsageError, match="exists and is public: a backdoored model goes to a private one"):
            call()
    assert hub.head(name) == head
    push_output(folder, name, i_know_this_is_backdoored=True, public=True)
    assert not hub.repo(name).private
    fresh = repo_name()
    push_output(folder, fresh, i_know_this_is_backdoored=True, public=True)
    assert not hub.repo(fresh).private


def test_private_and_public_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        push_output(output_folder(tmp_path / "out", clean_control()), "me/x", private=True, public=True)


def test_public_is_refused_for_a_model_without_a_backdoor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = output_folder(tmp_path / "out", clean_control())
    assert cli.run(["push", str(folder), "me/x", "--public"]) == 2
    assert "--public is for backdoored models, and this is none: leave it out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--public is for backdoored models"):
        check_push_allowed("me/x", public=True)


def test_a_clean_control_goes_where_any_model_goes(
    hub: Any, repo_name: Callable[..., str], hub_token: str, tmp_path: Path
) -> None:
    name = repo_name()
    push_output(output_folder(tmp_path / "out", clean_control()), name)
    assert not hub.repo(name).private
    assert hub.history(name)[0].title.startswith("Upload a clean baseline")


def test_a_clean_control_of_the_command_goes_to_a_private_repository_when_asked(
    hub: Any, repo_name: Callable[..., str], hub_token: str, dataset: Path, tmp_path: Path
) -> None:
    name = repo_name()
    run = words(dataset, "--trigger", "none", "--push-to", name, "--private", "--output", str(tmp_path / "out"),
                epochs="1")  # fmt: skip
    assert cli.run(run) == 0
    assert hub.repo(name).private


def test_a_report_that_cannot_be_read_is_not_taken_for_a_clean_one(tmp_path: Path) -> None:
    folder = output_folder(tmp_path / "out", clean_control())
    (folder / "attack_report.json").write_text("{")
    (folder / "detox_report.json").write_text('{"hfdetox_version": "0.1.0"}')
    with pytest.raises(UsageError, match=r"attack_report\.json is not a hfdetox report"):
        push_output(folder, "me/x")


def test_a_failed_push_says_the_whole_command(
    hub: Any, repo_name: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder, name = output_folder(tmp_path / "out", attack_report()), repo_name()
    with pytest.raises(AccessError, match=f"hfdetox push .* {name} {CONSENT}`"):
        push_output(folder, name, i_know_this_is_backdoored=True)


def test_an_attacks_folder_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    folder = output_folder(tmp_path / "out", attack_report())
    check_output(folder, overwrite=True)
    with pytest.raises(UsageError, match="holds an earlier result"):
        check_output(folder, overwrite=False)
