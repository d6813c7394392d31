"""`hfdetox verify`: what hfdetox published is pulled again, and every kind of tampering is found."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

import hfdetox
from hfdetox.cli import app as cli
from hfdetox.errors import UsageError
from hfdetox.evaluation.metrics import rate
from hfdetox.reporting.card import retarget_card
from hfdetox.reporting.report import Report
from hfdetox.triggers import TRIGGERS
from hfdetox.verifying import Verification, verify
from tests import backdoored
from tests.backdoored import TARGET, TRIGGER
from tests.hub_server.server import HubServer
from tests.runs.test_signing import keys

REPORT = "detox_report.json"
SHORT = ["--samples", "100", "--eval-samples", "120", "--defense", "ft", "--set", "epochs=1", "--set", "batch_size=64",
         "--max-accuracy-loss", "100", "--quiet"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A backdoored model, the digits, and the cleaned model: ids on the Hub, and the local output folder."""

    model: str
    dataset: str
    cleaned: str
    output: Path


_MADE: list[Published] = []


@pytest.fixture
def published(hub: HubServer, hub_token: str, tmp_path_factory: pytest.TempPathFactory,
              repo_name: Callable[..., str]) -> Published:  # fmt: skip
    """The cleaned model, made by the first test that asks; repositories stay."""
    if not _MADE:
        made = backdoored.made(tmp_path_factory)
        model, dataset, cleaned = repo_name("model", "org"), repo_name("digits", "org"), repo_name("cleaned")
        hub.create_repo(dataset, "dataset")
        hub.commit_folder(dataset, made.digits, repo_type="dataset")
        hub.create_repo(model)
        hub.commit_folder(model, made.timm)
        hub.commit(model, {"README.md": backdoored.CARD.format(dataset=dataset)})
        output = tmp_path_factory.mktemp("cleaned") / "out"
        triggers = ["--trigger", TRIGGER, "--trigger", "blended:name=other,alpha=0.3", "--target", TARGET]
        command = [model, "--dataset", dataset, *SHORT, *triggers, "--push-to", cleaned, "--output", str(output)]
        assert cli.run(command) == 0
        _MADE.append(Published(model, dataset, cleaned, output))
    return _MADE[0]


@pytest.fixture
def tampered(hub: HubServer, published: Published, repo_name: Callable[..., str]) -> Callable[..., str]:
    """`tampered({path: bytes or None})` is a copy of the cleaned repository with other files; None removes one."""

    def copy(changes: dict[str, bytes | None]) -> str:
        files = {name: data for name, data in hub.files(published.cleaned).items() if name != ".gitattributes"}
        name = repo_name("tampered")
        hub.create_repo(name)
        hub.commit(name, {path: data for path, data in {**files, **changes}.items() if data is not None})
        return name

    return copy


def check(source: str | Path, **options: Any) -> Verification:
    return verify(source, progress=False, device="cpu", **options)


def wrong(found: Verification) -> list[str]:
    return [one.what for one in found.mismatches]


def edited(hub: HubServer, repo: str, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """Return the report of a repository after an edit of its JSON, written as hfdetox writes it."""
    plain = json.loads(hub.files(repo)[REPORT])
    edit(plain)
    return Report.from_dict(plain).to_json().encode()


def test_what_was_published_matches_count_by_count(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(published.cleaned)
    assert found.verdict == "match", [dataclasses.astuple(one) for one in found.mismatches]
    assert (found.status, found.missing, found.differing) == (0, {}, [])
    named = {one.what for one in found.checks}
    states = [f"{state}: {rest}" for state in ("before", "after") for rest in (
        "accuracy", "loss", "worst class", "accuracy of each class", "badnets: attack success rate",
        "badnets: robust accuracy", "other: accuracy without", "badnets: largest class, excess")]  # fmt: skip
    assert named >= {
        "weights", "weights of the model as it came", "card (README.md)", "triggers/badnets.safetensors",
        "triggers/other.safetensors", "DER of badnets", "DER, mean", "points of accuracy lost",
        "rates and intervals of the report", "verdict on the accuracy", *states, "before: findings of the scores",
        "before: score latent-shift", "after: score scar", "grade of the clean images",
    }  # fmt: skip
    assert cli.run(["verify", published.cleaned, "--quiet"]) == 0
    assert cli.run(["verify", published.cleaned, "--json", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["revision"]) == ("match", found.revision)
    assert hfdetox.verify is verify


def test_it_is_said_before_how_long_counting_takes(
    published: Published, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("hfdetox.evidence.cost.speed_on", lambda _: 0.1)
    verify(published.cleaned)
    assert "counting again takes about " in capsys.readouterr().err
    verify(published.cleaned, progress=False)
    assert "takes about" not in capsys.readouterr().err


def test_a_local_folder_is_checked_against_its_manifest_too(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(published.output, folder)
    found = check(folder)
    assert (found.verdict, found.missing) == ("match", {}), wrong(found)
    assert "files of the manifest" in {one.what for one in found.checks}
    (folder / "plots" / "training.png").unlink()
    (folder / "plots" / "samples.png").write_bytes(b"\x89PNG other")
    capsys.readouterr()
    assert cli.run(["verify", str(folder), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "plots/samples.png" in shown
    assert "plots/training.png" in shown
    assert "MISMATCH: plots/samples.png; plots/training.png" in shown


def test_a_changed_weight_file_is_found_by_its_hash_and_by_its_answers(
    hub: Any, published: Published, tampered: Any
) -> None:
    tensors = load(hub.files(published.cleaned)["model.safetensors"])
    swapped = {name: np.roll(value, 1, 0) if name.startswith("fc.") else value for name, value in tensors.items()}
    found = check(tampered({"model.safetensors": save(swapped, metadata={"format": "pt"})}))
    assert found.status == 1
    assert {"weights", "after: accuracy", "after: badnets: robust accuracy"} <= set(wrong(found))
    assert not any(one.startswith("before") for one in wrong(found))


@pytest.mark.parametrize("content", [b"not weights at all", b""])
def test_weights_that_cannot_be_read_are_a_mismatch(tampered: Any, content: bytes) -> None:
    found = check(tampered({"model.safetensors": content}))
    assert (found.status, found.verdict) == (1, "mismatch")
    assert "weights" in wrong(found)
    assert "after" in found.missing


def test_a_card_with_a_better_number_is_found(hub: Any, published: Published, tampered: Any) -> None:
    card = hub.files(published.cleaned)["README.md"].decode()
    report = Report.from_dict(json.loads(hub.files(published.cleaned)[REPORT]))
    assert report.after is not None
    stated = report.after.accuracy
    line = f"({stated.successes:,} of {stated.samples:,}; "
    assert line in card
    for edit in (card.replace(line, f"({stated.samples:,} of {stated.samples:,}; "), card + "\nTrust me.\n",
                 card.replace("value: ", "value: 0.", 1), card.replace("`zero`", "`nine`")):  # fmt: skip
        assert edit != card
        found = check(tampered({"README.md": edit.encode()}))
        assert (found.status, wrong(found)) == (1, ["card (README.md)"])
    found = check(tampered({"README.md": None}))
    assert wrong(found) == ["card (README.md)"]


def test_a_report_with_a_better_number_is_found_by_counting(hub: Any, published: Published, tampered: Any) -> None:
    def lower(plain: dict[str, Any]) -> None:
        one = plain["after"]["triggers"]["badnets"]["attack_success_rate"]
        better = rate(max(0, one["successes"] - 30), one["samples"])
        plain["after"]["triggers"]["badnets"]["attack_success_rate"] = dataclasses.asdict(better)

    found = check(tampered({REPORT: edited(hub, published.cleaned, lower)}))
    assert found.status == 1
    # the card was not changed with it
    assert {"after: badnets: attack success rate", "card (README.md)"} <= set(wrong(found))


@pytest.mark.parametrize(
    ("place", "value", "found_as"),
    [
        (("before", "accuracy", "value"), 0.99, "rates and intervals of the report"),
        (("after", "accuracy", "interval"), [0.98, 0.99], "rates and intervals of the report"),
        (("before", "loss"), 0.01, "before: loss"),
        (("defense_effectiveness_rating", "badnets", "value"), 0.99, "DER of badnets"),
        (("accuracy_loss", "interval"), [-0.2, -0.1], "points of accuracy lost"),
        (("accuracy_loss", "verdict"), "accepted anyhow", "verdict on the accuracy"),
        (("after", "triggers", "other", "destination", "label"), 5, "after: other: largest class"),
        (("before", "classes", "lowest", 0, "name"), "none", "before: all of it"),
        (("after", "triggers", "badnets", "mode"), "input", "after: badnets: what it is"),
        (("after", "classes", "spread"), 0.0, "after: all of it"),
        (("output", "weights_sha256"), "0" * 64, "weights"),
        (("model", "weights_sha256"), "0" * 64, "weights of the model as it came"),
        (("before", "triggers", "badnets", "file_sha256"), "0" * 64, "before: badnets: what it is"),
        (("after", "triggers", "badnets", "file_sha256"), "0" * 64, "triggers/badnets.safetensors"),
        (("dataset", "eval_indices_sha256"), "0" * 64, "rows of the images"),
        (("environment", "seed"), 5, "rows of the images"),
    ],
)
def test_each_number_of_the_report_is_held_against_what_is_found(
    hub: Any, published: Published, tampered: Any, place: tuple[Any, ...], value: Any, found_as: str
) -> None:
    def change(plain: dict[str, Any]) -> None:
        for key in place[:-1]:
            plain = plain[key]
        plain[place[-1]] = value

    found = check(tampered({REPORT: edited(hub, published.cleaned, change)}))
    assert found.status == 1
    assert found_as in wrong(found)


def test_a_changed_a_missing_and_an_added_trigger_are_found(hub: Any, published: Published, tampered: Any) -> None:
    files = hub.files(published.cleaned)
    name, other = "triggers/badnets.safetensors", "triggers/other.safetensors"
    found = check(tampered({name: files[other]}))
    assert name in wrong(found)
    assert any(one.startswith("after: badnets") for one in wrong(found))
    found = check(tampered({name: None}))
    assert wrong(found) == [name]
    assert "trigger badnets" in found.missing
    found = check(tampered({"triggers/more.safetensors": files[other]}))
    assert wrong(found) == ["triggers/more.safetensors"]


def test_reconstructed_triggers_and_the_agreement_are_counted_again(
    hub: HubServer, published: Published, tampered: Any, tmp_path: Path
) -> None:
    name = "reconstructed-patch-3"
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(3, backdoored.SIDE, backdoored.SIDE, generator=generator)
    mask = torch.zeros(1, backdoored.SIDE, backdoored.SIDE)
    mask[:, 3:8, 3:8] = 0.8
    trigger = TRIGGERS["mask"](name=name, target=3, mode="input", mask=mask, pattern=pattern)
    trigger.save(tmp_path / f"{name}.safetensors")
    made = []
    for model in (published.model, published.cleaned):
        found = hfdetox.evaluate(model, dataset=published.dataset, eval_samples=120, triggers=[trigger], device="cpu",
                                 progress=False)  # fmt: skip
        made.append(dataclasses.asdict(found.triggers[name]))

    def edit(plain: dict[str, Any], fewer: int) -> None:
        one = made[1]["attack_success_rate"]
        changed = dataclasses.asdict(rate(abs(one["successes"] - fewer), one["samples"]))
        plain["evidence"] = plain["evidence"] or {}
        plain["evidence"]["reconstructed"] = {name: {
            "score": "patch", "label": 3, "class_name": "three", "before": made[0],
            "after": {**made[1], "attack_success_rate": changed},
        }}  # fmt: skip

    files = {f"triggers/{name}.safetensors": (tmp_path / f"{name}.safetensors").read_bytes()}
    honest = check(tampered({REPORT: edited(hub, published.cleaned, lambda plain: edit(plain, 0)), **files}))
    named = {one.what for one in honest.checks}
    assert {f"{state}: reconstructed {name}: attack success rate" for state in ("before", "after")} <= named
    assert f"triggers/{name}.safetensors" in named
    assert "answers as before" in named
    # the card was not made anew with them
    assert set(wrong(honest)) <= {"card (README.md)"}
    forged = check(tampered({REPORT: edited(hub, published.cleaned, lambda plain: edit(plain, 7)), **files}))
    assert f"after: reconstructed {name}: attack success rate" in wrong(forged)


def test_a_signature_is_checked_and_one_by_another_key_is_one_clear_line(
    hub: HubServer, hub_token: str, published: Published, repo_name: Callable[..., str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, name = tmp_path / "out", repo_name("signed")
    shutil.copytree(published.output, folder)
    (private, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "other")
    assert cli.run(["push", str(folder), name, "--sign", str(private)]) == 0
    for source in (name, folder):
        found = check(source, public_key=public)
        assert (found.verdict, found.checks[0].what) == ("match", "signature (model.sig)"), wrong(found)
    capsys.readouterr()
    assert cli.run(["verify", name, "--public-key", str(other), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "MISMATCH: signature (model.sig)"
    assert len([line for line in shown if "made by another key" in line]) == 1
    # without the key nobody asks
    assert check(name).verdict == "match"
    assert wrong(check(published.cleaned, public_key=public)) == ["signature (model.sig)"]


def test_a_leaderboard_file_that_the_report_does_not_make_is_found(tampered: Any) -> None:
    found = check(tampered({".eval_results/cifar.yaml": b"- value: 99.9\n"}))
    assert wrong(found) == [".eval_results/cifar.yaml"]


def test_what_hfdetox_did_not_make_and_what_a_newer_one_made_is_refused_in_one_line(
    hub: HubServer, published: Published, tampered: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for source in (published.model, str(tmp_path)):
        assert cli.run(["verify", source]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "has no detox_report.json: hfdetox did not clean it" in line
    plain = json.loads(hub.files(published.cleaned)[REPORT]) | {"schema_version": 99}
    assert cli.run(["verify", tampered({REPORT: json.dumps(plain).encode()})]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "schema version 99" in line
    assert cli.run(["verify", tampered({REPORT: b"[1, 2"})]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.run(["verify", "org/never-there"]) == 3
    assert cli.run(["verify", "./never-there"]) == 2
    assert cli.run(["verify"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_dataset_that_is_gone_or_gated_leaves_it_incomplete_and_says_why(
    hub: HubServer, published: Published, tampered: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def gone(plain: dict[str, Any]) -> None:
        plain["dataset"]["id"] = "org/gone"

    report = edited(hub, published.cleaned, gone)
    moved = Report.from_dict(json.loads(report))
    card = retarget_card(hub.files(published.cleaned)["README.md"].decode(), moved, repo_id=moved.output.pushed_to,
                         plots=[n for n in hub.files(published.cleaned) if n.startswith("plots/")])  # fmt: skip
    name = tampered({REPORT: report, "README.md": card.encode()})
    found = check(name)
    assert (found.verdict, found.status) == ("incomplete", 3)
    assert found.missing["after"].startswith("dataset org/gone at ")
    assert "is not on the Hub" in found.missing["after"]
    capsys.readouterr()
    assert cli.run(["verify", name, "--device", "cpu"]) == 3
    shown = capsys.readouterr().out
    assert "not recomputed: after: dataset org/gone" in shown
    assert "incomplete: " in shown
    # whoever has the images can give them
    digits = tmp_path / "digits"
    digits.mkdir()
    for file, data in hub.files(published.dataset, repo_type="dataset").items():
        if file.endswith(".parquet"):
            (digits / file).write_bytes(data)
    found = check(name, dataset=digits)
    assert (found.verdict, found.missing) == ("match", {}), wrong(found)
    backdoored.write_digits(tmp_path / "other", without="two")
    found = check(name, dataset=tmp_path / "other")
    assert found.verdict in ("mismatch", "incomplete")
    assert found.status in (1, 2)


def test_local_images_and_a_local_base_are_named_where_they_are_missing(
    published: Published, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backdoored.made(tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    command = [str(made.timm), "--dataset", str(made.digits), *SHORT, "--output", "here"]
    assert cli.run(command) == 0
    found = check("here")
    assert (found.verdict, found.status) == ("incomplete", 2)
    assert "name their folder with --dataset DIR" in found.missing["after"]
    assert "--base DIR" in found.missing["before"]
    found = check("here", dataset=made.digits)
    assert (found.verdict, found.status, list(found.missing)) == ("match", 0, ["before"]), wrong(found)
    found = check("here", dataset=made.digits, base=made.timm)
    assert (found.verdict, found.missing) == ("match", {}), wrong(found)
    assert cli.run(["verify", "here", "--dataset", "./nowhere"]) == 2
    assert cli.run(["verify", "here", "--revision", "main"]) == 2


def test_an_attack_is_verified_like_a_cleaned_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = backdoored.made(tmp_path_factory)
    out = tmp_path / "attacked"
    command = ["attack", str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "120",
               "--trigger", "blended", "--target", TARGET, "--set", "epochs=1", "--goal-asr", "0",
               "--goal-accuracy", "0", "--output", str(out), "--quiet"]  # fmt: skip
    assert cli.run(command) == 0
    found = check(out, dataset=made.digits, base=made.timm)
    assert (found.verdict, found.missing) == ("match", {}), wrong(found)
    assert "after: blended: attack success rate" in {one.what for one in found.checks}
    plain = json.loads((out / "attack_report.json").read_text())
    plain["succeeded"] = False
    (out / "attack_report.json").write_text(json.dumps(plain))
    assert {"attack_report.json", "the attack succeeded"} <= set(wrong(check(out, dataset=made.digits)))


def test_the_library_says_what_it_cannot_verify() -> None:
    with pytest.raises(UsageError, match="REPO or FOLDER is missing"):
        verify()
