"""Checkpoints: whole or absent whenever the run is killed, and one line when damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from hfdetox.errors import RunError
from hfdetox.training.checkpoints import CheckpointStore, load_optimizer, optimizer_tensors

TENSORS = {
    "network.a": torch.arange(6.0).view(2, 3),
    "network.a.b": torch.tensor(3),
    "phase.0": torch.ones(2).bfloat16(),
}


def saved(folder: Path, epoch: int = 1) -> CheckpointStore:
    """Return a store with a checkpoint of an epoch."""
    store = CheckpointStore(folder)
    store.save({**TENSORS, "network.epoch": torch.tensor(epoch)}, {"epoch": epoch, "history": [{"loss": 0.1}]})
    return store


def epoch_of(store: CheckpointStore) -> int | None:
    """Return the epoch of the checkpoint in store; tensors and record must agree on it."""
    checkpoint = store.load()
    if checkpoint is None:
        return None
    assert int(checkpoint.tensors["network.epoch"]) == checkpoint.record["epoch"]
    return int(checkpoint.record["epoch"])


def test_round_trip_keeps_every_bit_and_name(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path).load()
    assert checkpoint is not None
    assert checkpoint.record["history"] == [{"loss": 0.1}]
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensors[name], tensor)
        assert checkpoint.tensors[name].dtype == tensor.dtype
    assert set(checkpoint.part("network")) == {"a", "a.b", "epoch"}
    assert set(checkpoint.part("phase")) == {"0"}
    assert checkpoint.part("net") == {}


def test_views_and_tied_and_channels_last_tensors_are_saved(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(1, 2, 3, 4)
    store = CheckpointStore(tmp_path)
    store.save({"a": base, "b": base, "c": base[0, 1], "d": base.to(memory_format=torch.channels_last)}, {})
    checkpoint = store.load()
    assert checkpoint is not None
    assert torch.equal(checkpoint.tensors["b"], base)
    assert torch.equal(checkpoint.tensors["c"], base[0, 1])
    assert torch.equal(checkpoint.tensors["d"], base)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nothing").load() is None


def test_a_later_checkpoint_replaces_the_first_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    store = saved(tmp_path, 2)
    assert epoch_of(store) == 2
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["record.json", "tensors.safetensors"]


def test_a_kill_while_writing_leaves_the_old_one(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "tensors.safetensors").write_bytes(b"half")
    assert epoch_of(store) == 1
    assert epoch_of(saved(tmp_path, 2)) == 2
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_kill_between_the_renames_leaves_the_old_one(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    os.rename(tmp_path / "checkpoint", tmp_path / "checkpoint.old")
    assert epoch_of(store) == 1
    assert epoch_of(saved(tmp_path, 2)) == 2


def test_a_kill_before_the_cleaning_leaves_the_new_one(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    os.rename(tmp_path / "checkpoint", tmp_path / "checkpoint.old")
    (tmp_path / "moved").mkdir()
    saved(tmp_path / "moved", 2)
    os.rename(tmp_path / "moved" / "checkpoint", tmp_path / "checkpoint")
    store = CheckpointStore(tmp_path)
    assert epoch_of(store) == 2
    assert epoch_of(saved(tmp_path, 3)) == 3


@pytest.mark.parametrize("prepare", ["nothing", "one", "old"])
def test_a_kill_at_any_rename_or_removal_leaves_a_whole_one(
    prepare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the save before each of its steps on the folders in turn: what is there is the old or the new checkpoint."""

    class Killed(BaseException):
        pass

    for stop_before in range(1, 9):
        folder = tmp_path / str(stop_before)
        folder.mkdir()
        if prepare != "nothing":
            saved(folder, 1)
        if prepare == "old":
            os.rename(folder / "checkpoint", folder / "checkpoint.old")
        done = 0

        def counted(function, stop=stop_before):  # type: ignore[no-untyped-def]
            def call(*arguments, **options):  # type: ignore[no-untyped-def]
                nonlocal done
                done += 1
                if done == stop:
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("hfdetox.files.os.replace", counted(os.replace))
            patch.setattr("hfdetox.training.checkpoints.shutil.rmtree", counted(shutil.rmtree))
            try:
                saved(folder, 2)
                finished = True
            except Killed:
                finished = False
        expected = {2} if finished else {1, 2} if prepare != "nothing" else {None, 2}
        assert epoch_of(CheckpointStore(folder)) in expected, stop_before
        assert epoch_of(saved(folder, 3)) == 3
        if finished:
            return
    pytest.fail("the save has more steps than are tried")


def damage_tensors(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damage_record(folder: Path) -> None:
    (folder / "record.json").write_text('{"format": 1,')


def binary_record(folder: Path) -> None:
    (folder / "record.json").write_bytes(b"\xff\xfe\x00")


def no_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_tensors, damage_record, binary_record, no_tensors])
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = saved(tmp_path)
    damage(tmp_path / "checkpoint")
    with pytest.raises(RunError, match=r"checkpoint in .* cannot be read: .*; start again without --resume") as caught:
        store.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [{"format": 2}, {}, [], None])
def test_a_checkpoint_of_another_format_is_one_line(record: object, tmp_path: Path) -> None:
    store = saved(tmp_path)
    (tmp_path / "checkpoint" / "record.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="of another hfdetox version"):
        store.load()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write the checkpoint in .*file"):
        CheckpointStore(tmp_path / "file").save(TENSORS, {})


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on file sizes refuses the write as a full disk does, in safetensors' own writer."""
    store = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write the checkpoint in .*too large"):
            store.save({"network.epoch": torch.tensor(2), "large": torch.zeros(100_000)}, {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert epoch_of(store) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    ],
)
def test_an_optimiser_goes_on_as_if_it_had_not_stopped(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            optimizer.step()

    whole = torch.nn.Parameter(torch.arange(4.0))
    step(whole, make([whole]), 5)

    stopped = torch.nn.Parameter(torch.arange(4.0))
    first = make([stopped])
    step(stopped, first, 3)
    tensors, plain = optimizer_tensors(first)
    store = CheckpointStore(tmp_path)
    store.save({"p": stopped, **{f"optimizer.{k}": v for k, v in tensors.items()}}, {"optimizer": plain})
    checkpoint = store.load()
    assert checkpoint is not None
    resumed = torch.nn.Parameter(checkpoint.tensors["p"])
    second = make([resumed])
    load_optimizer(second, checkpoint.part("optimizer"), checkpoint.record["optimizer"])
    step(resumed, second, 2)
    assert torch.equal(resumed, whole)
