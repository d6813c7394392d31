"""Run folders, output folders, and the command that repeats a run."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from hfdetox.arguments import options_of
from hfdetox.cli.app import app, with_command
from hfdetox.config import DetoxOptions
from hfdetox.errors import RunError, UsageError
from hfdetox.runs.folder import (
    RecordedOptions,
    RunFolder,
    check_output,
    command_of,
    log_folder,
    open_run,
    publish_folder,
    settle,
)
from hfdetox.triggers import BadNets, Blended, parse_triggers

PLAIN = DetoxOptions("org/model", dataset="org/data")


# --- the command ---


def parsed(command: str) -> dict[str, Any]:
    """Return what the command line reads from a command: its options by name."""
    words = shlex.split(command)
    assert words[0] == "hfdetox"
    name, *rest = with_command(words[1:])
    detox = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return detox.make_context(name, rest).params


GIVEN: dict[str, Any] = {
    "model": "other/model", "dataset": "data folder/of mine", "dataset_config": "plain", "split": "train",
    "eval_split": "test", "image_column": "img", "label_column": "fine label", "clean_samples": 2500,
    "pixel_range": "0,4095", "max_accuracy_loss": 2.5, "eval_samples": 100, "label_map": "map.json",
    "allow_missing_classes": True, "defense": "d3:code",
    "settings": {"lambda": "1.5", "layers": "head,layer4.*"}, "scan": False, "residual": True,
    "triggers": ["badnets:size=5", "blended"], "target": "tench, Tinca tinca", "precision": "no", "seed": 7,
    "device": "cpu", "revision": "a" * 40, "dataset_revision": "b" * 40, "trust_remote_code": True, "output": "out dir",
}  # fmt: skip
REPEATABLE = [name for name, one in options_of(DetoxOptions).items() if one.panel is not None and not one.anew]


@pytest.mark.parametrize("name", REPEATABLE)
def test_the_command_repeats_every_option(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option without a row in GIVEN fails here; one that the command line does not know as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text("{}")
    found = parsed(command_of(replace(PLAIN, **{name: GIVEN[name]})))
    expected = GIVEN[name]
    if name == "settings":
        expected = ["lambda=1.5", "layers=head,layer4.*"]
    # Typer before 0.28 makes paths of texts only when it calls the command
    read = Path(found[name]) if name in ("label_map", "output") else found[name]
    assert (list(read) if isinstance(read, (list, tuple)) else str(read)) == (
        expected if isinstance(expected, list) else str(expected)
    )
    default = parsed(command_of(PLAIN))
    assert found[name] != default[name]
    assert {key for key in found if found[key] != default[key]} == {name}


def test_the_command_leaves_defaults_and_publishing_out() -> None:
    assert command_of(PLAIN) == "hfdetox org/model --dataset org/data"
    pushed = replace(PLAIN, push_to="me/x", private=True, create_pr=True, overwrite=True)
    assert command_of(pushed) == command_of(PLAIN)
    assert pushed.publishing() == {"private": True, "create_pr": True, "overwrite": True, "publish_images": False,
                                   "no_verify_upload": False, "accept_accuracy_loss": False}  # fmt: skip


@pytest.mark.parametrize("samples", [0.05, 0.5, 1.0, 1, 5000])
def test_a_share_keeps_its_point_and_a_count_has_none(samples: float) -> None:
    words = shlex.split(command_of(replace(PLAIN, clean_samples=samples)))
    text = words[words.index("--samples") + 1] if "--samples" in words else "0.05"
    assert ("." in text) == isinstance(samples, float)
    assert float(text) == samples


def test_a_folder_called_like_a_command_is_reached_by_the_long_form() -> None:
    assert parsed(command_of(replace(PLAIN, model="demo")))["model"] == "demo"


@pytest.mark.parametrize("name", ["model", "dataset"])
def test_objects_have_no_command(name: str) -> None:
    assert command_of(replace(PLAIN, **{name: None})) == ""


def test_the_command_does_not_say_where_local_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("secret/net", "secret/pictures", "org/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("secret/map.json", "secret/t.safetensors", "secret/dot.png"):
        (tmp_path / name).write_text("")
    secret = tmp_path / "secret"
    local = replace(
        PLAIN, model=str(secret / "net"), dataset=str(secret / "pictures"), label_map=str(secret / "map.json"),
        triggers=[str(secret / "t.safetensors"), f"badnets:image={secret / 'dot.png'},size=5"],
        output=str(secret / "new" / "out"),
    )  # fmt: skip
    assert shlex.split(command_of(local)) == [
        "hfdetox", "./net", "--dataset", "./pictures", "--label-map", "./map.json", "--trigger", "./t.safetensors",
        "--trigger", "badnets:image=./dot.png,size=5", "--output", "./out",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command_of(PLAIN) == "hfdetox ./model --dataset org/data"
    # an id with its commit is one, whatever lies here
    assert command_of(replace(PLAIN, revision="a" * 40)).startswith("hfdetox org/model --dataset")


def test_a_trigger_with_a_picture_is_recorded_as_its_file() -> None:
    drawn = BadNets(name="dot", image=torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert DetoxOptions(triggers=[drawn]).record()["triggers"] == ["triggers/dot.safetensors"]


def test_texts_and_objects_are_recorded_as_texts() -> None:
    assert DetoxOptions(triggers=["blended", BadNets(size=4), "t.safetensors"]).record()["triggers"] == [
        "blended",
        "badnets:size=4",
        "t.safetensors",
    ]


# --- the run folder ---


def test_a_run_folder_lies_beside_its_output(tmp_path: Path) -> None:
    assert RunFolder.beside(tmp_path / "out").path == tmp_path / "out.run"
    assert RunFolder.beside("a.b").path == Path("a.b.run")


def test_options_are_recorded_and_read_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "out.run")
    options = DetoxOptions(**{**GIVEN, "triggers": []})
    run.begin(options, [])
    threads = torch.get_num_threads()
    assert run.recorded() == RecordedOptions(**options.record(), original_command=command_of(options), threads=threads)
    assert os.listdir(run.path) == ["run.json"]
    expected = {**options.record(), "original_command": command_of(options), "output": str(Path.cwd() / "out dir"),
                "threads": threads}  # fmt: skip
    assert json.loads((run.path / "run.json").read_text()) == expected
    run.begin(replace(run.recorded(), seed=8), [])
    assert run.recorded().seed == 8
    assert command_of(run.recorded()) == command_of(options)
    shares = RunFolder(tmp_path / "b.run")
    shares.begin(replace(options, clean_samples=1.0), [])
    assert isinstance(shares.recorded().clean_samples, float)
    run.remove()
    assert not run.path.exists()


def test_a_run_that_is_there_is_not_begun_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "my out.run")
    run.refuse_existing()
    run.begin(PLAIN, [])
    with pytest.raises(
        UsageError, match=r"holds a run that did not finish: go on with hfdetox --resume '.*my out.run'"
    ):
        run.refuse_existing()


@pytest.mark.parametrize(
    "name", ["checkpoint/model.safetensors", "checkpoint/notes.json", "triggers/mine/a.safetensors",
             "triggers/mine.json", "checkpoint.new/mine/tensors.safetensors"])  # fmt: skip
def test_what_no_run_writes_is_somebodys(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path / "out.run")
    # a run that was killed before it was recorded is none
    for own in ("checkpoint/tensors.safetensors", "checkpoint.old/record.json", "triggers/badnets.safetensors"):
        (run.path / own).parent.mkdir(parents=True)
        (run.path / own).write_bytes(b"")
    run.refuse_existing()
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).write_bytes(b"mine")
    with pytest.raises(UsageError, match="holds a run that did not finish"):
        run.refuse_existing()


@pytest.mark.parametrize(
    "content", [None, b"{", b"[]", b"null", b'{"model": "x"}', b'{"colour": 1}', b"\xff\xfe", b'"text"', b"[" * 100_000,
                b'{"defense": ["d3"]}', b'{"dataset": {"a": 1}}', b'{"settings": {"a": 1}}', b'{"model": 3}',
                b'{"seed": ' + b"9" * 5000 + b"}"]
)  # fmt: skip
def test_what_is_not_a_run_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"is not a run folder of this hfdetox .*name the OUTPUT.run/ folder"
    ) as caught:
        RunFolder(tmp_path).recorded()
    assert "\n" not in str(caught.value)


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write the run folder .*file/out.run: Not a directory"):
        RunFolder(tmp_path / "file" / "out.run").begin(PLAIN, [])


def test_local_paths_are_found_from_every_directory_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"model": "org/model", "dataset": "data", "label_map": "map.json"}
    for name in ("org/model", "data", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "map.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "out.run")
    run.begin(replace(PLAIN, **places, output="out", triggers=["badnets:size=5"]), [BadNets(size=5)])
    local = run.recorded()
    # where the working directory lies is nobody's business
    assert {name: getattr(local, name) for name in places} == places
    assert local.output == "out"
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = run.recorded()
    assert {name: getattr(moved, name) for name in places} == {k: str(tmp_path / v) for k, v in places.items()}
    assert moved.output == str(tmp_path / "out")
    original_command = "hfdetox ./model --dataset ./data --label-map ./map.json --trigger badnets:size=5 --output ./out"
    assert command_of(moved) == command_of(local) == original_command

    monkeypatch.chdir(tmp_path)
    pinned = replace(PLAIN, model="org/model", revision="a" * 40, dataset="org/data")
    run.begin(pinned, [])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (run.recorded().model, run.recorded().dataset) == ("org/model", "org/data")


def test_triggers_survive_with_their_pictures_and_commas(tmp_path: Path) -> None:
    picture = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    triggers = [BadNets(name="mine", target="tench, Tinca tinca", image=picture), Blended(alpha=0.1)]
    run = RunFolder(tmp_path / "out.run")
    run.begin(replace(PLAIN, triggers=triggers).plain(), triggers)
    # a run folder may be moved
    moved = RunFolder((tmp_path / "out.run").rename(tmp_path / "moved.run"))
    for _ in range(2):
        options = moved.recorded()
        again = parse_triggers(options.triggers)
        assert [trigger.file_bytes() for trigger in again] == [trigger.file_bytes() for trigger in triggers]
        assert "--trigger blended:alpha=0.1" in command_of(options)
        moved.begin(options, again)
    assert sorted(os.listdir(moved.path / "triggers")) == ["blended.safetensors", "mine.safetensors"]


def resumed(run: RunFolder, **options: Any) -> DetoxOptions:
    opened, folder = open_run(DetoxOptions(**options, resume=run.path))
    assert folder is not None
    return opened


def test_a_resumed_run_may_be_told_how_to_publish(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out.run")
    run.begin(replace(PLAIN, push_to="me/x", overwrite=True), [])
    none = {"private": False, "create_pr": False, "overwrite": False, "publish_images": False,
            "no_verify_upload": False, "accept_accuracy_loss": False}  # fmt: skip
    assert resumed(run, no_verify_upload=True).publishing()["no_verify_upload"]
    assert resumed(run).publishing() == none | {"overwrite": True}
    assert resumed(run, private=True).publishing() == none | {"private": True, "overwrite": True}
    assert resumed(run, accept_accuracy_loss=True).publishing() == none | {
        "accept_accuracy_loss": True,
        "overwrite": True,
    }
    anew = resumed(run, push_to="me/y", create_pr=True)
    assert (anew.push_to, anew.publishing()) == ("me/y", none | {"create_pr": True})
    run.begin(PLAIN, [])
    assert resumed(run, push_to="me/y", private=True).private
    for name in ("private", "create_pr"):
        with pytest.raises(UsageError, match="name the repository with --push-to"):
            resumed(run, **{name: True})


def test_a_run_is_resumed_for_its_own_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    run = RunFolder(tmp_path / "out.run")
    for recorded, same, others in (
        (replace(PLAIN, revision="a" * 40), ["org/model", "hf_hub:org/model@main"], ["org/other", "models/mine"]),
        (replace(PLAIN, model="models/mine"), ["./models/mine", str(tmp_path / "models" / "mine")], ["org/mine"]),
        (replace(PLAIN, model=None), [], ["org/model"]),
    ):
        run.begin(recorded, [])
        for name in same:
            assert resumed(run, model=name).model == recorded.model
        for name in others:
            with pytest.raises(UsageError, match=f"is a run of .*, not of {name}: leave the model out"):
                resumed(run, model=name)


def test_logs_lie_beside_the_output() -> None:
    assert log_folder("a/out.b") == Path("a/out.b.logs")
    assert log_folder(None) == Path("hfdetox-logs")


# --- the output folder ---


def folder_with(path: Path, *names: str) -> Path:
    """Return a folder with empty files."""
    path.mkdir()
    for name in names:
        (path / name).write_text("")
    return path


def test_nothing_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    for overwrite in (False, True):
        check_output(tmp_path / "none", overwrite=overwrite)
        check_output(tmp_path, overwrite=overwrite)


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    result = folder_with(tmp_path / "out", "detox_report.json")
    with pytest.raises(
        UsageError, match=r"holds an earlier result; choose another --output, or replace it with --overwrite"
    ):
        check_output(result, overwrite=False)
    check_output(result, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_something_else_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "out", "holiday.jpg")
    (tmp_path / "file").write_text("")
    for path in (folder, tmp_path / "file"):
        with pytest.raises(UsageError, match=r"exists and was not written by hfdetox; choose another --output"):
            check_output(path, overwrite=overwrite)


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_an_output_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"has no name of its own"):
        check_output(Path(name), overwrite=True)


@pytest.mark.parametrize("before", ["nothing", "empty", "result", "leftover"])
def test_a_result_is_moved_in_one_step_and_nothing_stays_beside_it(before: str, tmp_path: Path) -> None:
    fresh, output = folder_with(tmp_path / "fresh", "new"), tmp_path / "out"
    if before != "nothing":
        folder_with(output, *(["config.json"] if before != "empty" else []))
    if before == "leftover":
        # a process killed between the renames of an earlier replacement
        folder_with(tmp_path / ".out.old", "model.safetensors")
    publish_folder(fresh, output)
    assert os.listdir(output) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_left_of_a_replaced_result_goes_with_the_next_command(tmp_path: Path) -> None:
    """The new result is in its place, and the old one was being removed."""
    folder_with(tmp_path / "out", "config.json")
    folder_with(tmp_path / ".out.old", "model.safetensors")
    settle(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    # what somebody put there stays
    folder_with(tmp_path / ".out.old", "mine.txt")
    settle(tmp_path / "out")
    assert (tmp_path / ".out.old" / "mine.txt").exists()


def test_a_move_that_fails_leaves_the_earlier_result_where_it_was(tmp_path: Path) -> None:
    output = folder_with(tmp_path / "out", "config.json")
    with pytest.raises(RunError, match=r"cannot move the result to .*out: No such file or directory"):
        publish_folder(tmp_path / "never written", output)
    assert os.listdir(output) == ["config.json"]
    assert os.listdir(tmp_path) == ["out"]
