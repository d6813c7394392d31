"""`hfdetox gate` from end to end: it fails closed, and what it writes is what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hfdetox
from hfdetox.cli import app as cli
from hfdetox.gating import gate
from hfdetox.reporting.cyclonedx import cyclonedx
from hfdetox.reporting.gate_facts import GateResult, GateVerdict, Reason, Rule
from hfdetox.reporting.sarif import sarif
from tests import backdoored
from tests.backdoored import Made
from tests.gated import result
from tests.hub_server.server import HubServer
from tests.test_verifying import Published, published

__all__ = ["published"]

SAMPLES = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@pytest.fixture
def lenient(tmp_path: Path) -> Path:
    """A policy that asks for no measured error rates."""
    file = tmp_path / "lenient.yaml"
    file.write_text("scan: {measured_rates: false}\n")
    return file


def at_gate(model: object, dataset: object, **options: Any) -> GateResult:
    return gate(str(model), dataset=str(dataset), device="cpu", progress=False, **options)


def rules(found: GateResult) -> list[str]:
    return [str(reason.rule) for reason in found.reasons]


@pytest.mark.parametrize("option", ["--sarif", "--cyclonedx"])
def test_nobody_elses_file_is_overwritten(
    option: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"name": "mine"}')
    assert cli.run(["gate", str(made.timm), "--dataset", str(made.digits), option, str(mine)]) not in (0, 10)
    assert f"{option} {mine} is there, and is none that hfdetox wrote" in capsys.readouterr().err
    assert mine.read_text() == '{"name": "mine"}'


def test_a_crash_leaves_no_pass_behind(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"sarif": tmp_path / "gate.sarif", "cyclonedx": tmp_path / "gate.cdx.json"}
    passed = result(Reason(Rule.NO_EVIDENCE, GateVerdict.PASS, "no evidence found on 500 clean images"))
    assert passed.status == 0
    for form, file in zip((sarif, cyclonedx), files.values(), strict=True):
        file.write_text(json.dumps(form(passed)))

    def crash(**_: object) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr("hfdetox.gating.scan", crash)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        at_gate(made.timm, made.digits, **files)
    log, bill = (json.loads(file.read_text()) for file in files.values())
    [run] = log["runs"]
    assert run["properties"]["verdict"] == "unknown"
    assert [one["level"] for one in run["results"]] == ["warning"]
    assert "has not finished" in run["results"][0]["message"]["text"]
    assert {"name": "hfdetox:gate:verdict", "value": "unknown"} in bill["metadata"]["properties"]


def test_a_backdoored_model_never_passes_and_the_files_say_so(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, bill = tmp_path / "gate.sarif", tmp_path / "gate.cdx.json"
    command = ["gate", str(made.timm), "--dataset", str(made.digits), "--samples", str(SAMPLES), "--device", "cpu"]
    status = cli.run([*command, "--sarif", str(log), "--cyclonedx", str(bill)])
    shown = capsys.readouterr().out
    assert status in (20, 30)
    assert shown.splitlines()[-1] == f"verdict: {'REJECT' if status == 20 else 'UNKNOWN'} (exit status {status})"
    assert "latent-shift" in shown
    assert json.loads(log.read_text())["runs"][0]["properties"]["exitStatus"] == status
    assert json.loads(bill.read_text())["components"][0]["type"] == "machine-learning-model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.cdx.json", "gate.sarif"]
    # its own file is replaced
    assert cli.run([*command, "--json", "--sarif", str(log)]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == status
    assert document["scan"]["samples"] == SAMPLES
    assert document["model"]["weights_sha256"]
    assert hfdetox.gate is gate


def test_what_cannot_be_had_is_unknown_and_still_written(
    hub: HubServer, made: Made, repo_name: Callable[..., str], tmp_path: Path
) -> None:
    pickled, broken, log = repo_name("pickled"), tmp_path / "broken", tmp_path / "x.sarif"
    hub.create_repo(pickled)
    hub.commit(pickled, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
    shutil.copytree(made.timm, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    pictures = tmp_path / "pictures"
    for split in ("train", "test"):
        for name in backdoored.NAMES:
            (pictures / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (16, 16)).save(pictures / split / name / f"{number}.png")
    (pictures / "train" / "two" / "0.png").write_bytes(b"\x89PNG cut")
    for model, dataset in (("org/never-there", made.digits), (pickled, made.digits), (broken, made.digits),
                           (made.timm, "org/never-there"), (made.timm, tmp_path / "pictures")):  # fmt: skip
        found = at_gate(model, dataset, sarif=log, clean_samples=20)
        assert (found.verdict, found.status) == ("unknown", 30), (model, dataset, found.reasons)
        assert json.loads(log.read_text())["runs"][0]["results"][0]["ruleId"] == "undecided"
        log.unlink()
    assert cli.run(["gate", "org/never-there", "--dataset", str(made.digits), "--quiet"]) == 30
    assert cli.run(["gate", "./never-there", "--dataset", str(made.digits)]) == 2
    assert cli.run(["gate", str(made.timm), "--dataset", str(made.digits), "--clean"]) == 2


def test_without_measured_error_rates_or_with_few_images_nothing_passes(made: Made, lenient: Path) -> None:
    found = at_gate(made.transformers, made.digits, policy=lenient, clean_samples=50)
    assert found.status in (20, 30)
    assert found.scan is not None
    assert found.scan.samples == 50


def test_the_accuracy_that_the_policy_asks_for_is_held_against_the_interval(made: Made, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("accuracy: {least: 0.999}\n")
    assert "accuracy" in rules(at_gate(made.timm, made.digits, policy=policy, clean_samples=SAMPLES))


def test_a_model_that_says_it_is_backdoored_is_refused(
    hub: HubServer, made: Made, repo_name: Callable[..., str], tmp_path: Path
) -> None:
    out, tagged = tmp_path / "attacked", repo_name("tagged")
    command = ["attack", str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "60",
               "--trigger", "badnets", "--set", "epochs=1", "--goal-asr", "0", "--goal-accuracy", "0",
               "--output", str(out), "--quiet"]  # fmt: skip
    assert cli.run(command) == 0
    found = at_gate(out, made.digits, clean_samples=SAMPLES)
    assert (found.verdict, found.status) == ("reject", 20)
    assert "deliberately-backdoored" in rules(found)
    hub.create_repo(tagged)
    hub.commit_folder(tagged, made.timm)
    hub.commit(tagged, {"README.md": "---\ntags: [deliberately-backdoored]\n---\n# Net\n"})
    assert at_gate(tagged, made.digits, clean_samples=SAMPLES).status == 20


def test_a_repository_that_hfdetox_cleaned_is_verified_first(
    hub: HubServer, published: Published, repo_name: Callable[..., str]
) -> None:
    found = at_gate(published.cleaned, published.dataset, clean_samples=SAMPLES)
    assert found.verified == "match"
    assert found.base is not None
    assert found.base.id == published.model
    assert set(found.triggers) >= {"badnets", "other"}
    # a short run: its triggers were not shown to be gone
    assert "trigger-left" in rules(found)
    assert found.status in (20, 30)
    forged = repo_name("forged")
    hub.create_repo(forged)
    files = {name: data for name, data in hub.files(published.cleaned).items() if name != ".gitattributes"}
    card = files["README.md"] + b"\nMitigated, all of it.\n"
    hub.commit(forged, {**files, "README.md": card})
    found = at_gate(forged, published.dataset, clean_samples=SAMPLES, clean=True, output=str(published.output) + "-new")
    assert (found.verdict, found.verified) == ("reject", "mismatch")
    assert "not-as-published" in rules(found)
    # what does not verify is never cleaned
    assert found.output is None
    assert not Path(f"{published.output}-new").exists()


def test_what_is_suspected_is_cleaned_only_if_asked_and_judged_anew(made: Made, tmp_path: Path) -> None:
    policy, out = tmp_path / "policy.yaml", tmp_path / "out"
    policy.write_text("scan: {measured_rates: false}\naccuracy: {most_lost: 100}\nclean: {defense: d3:paper}\n")
    found = at_gate(made.timm, made.digits, policy=policy, clean_samples=SAMPLES, clean=True, output=out,
                    triggers=[backdoored.TRIGGER], target=backdoored.TARGET)  # fmt: skip
    assert found.scan is not None
    assert found.scan.finding == "suspicious"
    assert found.output == str(out)
    assert (out / "detox_report.json").is_file()
    assert found.rescan is not None
    assert found.base is not None
    assert "badnets" in found.triggers
    assert found.status in (10, 20, 30)
    # what the model was is no reason against what was made of it
    assert (found.status == 10) == all(reason.verdict == "pass after cleaning" for reason in found.reasons)
    assert ("cleaned" in rules(found)) == (found.status == 10)


def test_a_policy_that_asks_for_a_signature_needs_the_key(made: Made, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("cleaned: {signed: true}\n")
    assert cli.run(["gate", str(made.timm), "--dataset", str(made.digits), "--policy", str(policy)]) == 2
