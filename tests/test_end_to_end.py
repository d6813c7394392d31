"""The whole job as a person does it: a command, a Hub, and what other libraries then find there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hfdetox.cli import app as cli
from hfdetox.reporting.report import Report
from hfdetox.triggers import load_trigger
from tests import backdoored
from tests.backdoored import NAMES, PATCH, TARGET, TRIGGER, Made
from tests.hub_server.server import HubServer

CLEAN_IMAGES = 400
# 2 in 10,000 of these 500 images is less than one: one image whose two best logits are equal but for rounding
COUNT_TOLERANCE = 1
PLOTS = ("before_after", "destinations", "moved", "samples", "training", "weight_changes")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@dataclasses.dataclass(frozen=True)
class Published:
    """A model of `org` and its dataset on the Hub."""

    model: str
    dataset: str

    def command(self, *more: str | Path, dataset: bool = True, **settings: object) -> list[str]:
        """Return the arguments of a run on them with the known trigger."""
        named = ["--dataset", self.dataset] if dataset else []
        return [self.model, *named, "--samples", str(CLEAN_IMAGES), "--trigger", TRIGGER, "--target", TARGET,
                *backdoored.settings(**settings), *map(str, more)]  # fmt: skip


@pytest.fixture
def publish(hub: HubServer, made: Made, repo_name: Callable[..., str]) -> Callable[[str], Published]:
    """`publish("timm")` puts the backdoored model of that library, with a card, and the digits on the Hub."""

    def put(library: str) -> Published:
        names = Published(repo_name("model", "org"), repo_name("digits", "org"))
        hub.create_repo(names.dataset, "dataset")
        hub.commit_folder(names.dataset, made.digits, repo_type="dataset")
        hub.create_repo(names.model)
        hub.commit_folder(names.model, getattr(made, library))
        hub.commit(names.model, {"README.md": backdoored.CARD.format(dataset=names.dataset)})
        return names

    return put


def with_patch(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[-PATCH:, -PATCH:] = 255
    return Image.fromarray(pixels)


def recount(predict: Callable[[list[Image.Image]], list[int]], dataset: str) -> tuple[int, int, int]:
    """Return (correct, attack successes, triggered images), counted without anything of hfdetox."""
    rows = load_dataset(dataset, split="test")
    target = NAMES.index(TARGET)
    correct = sum(p == row for p, row in zip(predict(list(rows["image"])), rows["label"], strict=True))
    others = [with_patch(row["image"]) for row in rows if row["label"] != target]
    return correct, sum(p == target for p in predict(others)), len(others)


def by_timm(name: str) -> Callable[[list[Image.Image]], list[int]]:
    model = timm.create_model(f"hf_hub:{name}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return lambda images: model(torch.stack([transform(image) for image in images])).argmax(1).tolist()


def by_pipeline(name: str) -> Callable[[list[Image.Image]], list[int]]:
    classify = pipeline("image-classification", model=name, device="cpu")
    return lambda images: [NAMES.index(answer[0]["label"]) for answer in classify(images, top_k=1)]


def by_auto_model(name: str) -> Callable[[list[Image.Image]], list[int]]:
    model, processor = AutoModelForImageClassification.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    return lambda images: model(**processor(images, return_tensors="pt")).logits.argmax(1).tolist()


def report_of(text: bytes | str) -> Report:
    return Report.from_dict(json.loads(text))


@torch.no_grad()
@pytest.mark.parametrize(
    ("library", "loaders"),
    [("timm", (by_auto_model, by_timm)), ("transformers", (by_pipeline, by_auto_model))],
)
def test_a_backdoored_model_is_cleaned_published_and_loads_with_its_library(
    library: str, loaders: Any, hub: HubServer, publish: Any, run_cli: Any, fresh_env: dict[str, str], tmp_path: Path
) -> None:
    source = publish(library)
    pushed = f"{source.model}-detoxed"
    hub.log.clear()
    arguments = source.command("--push-to", pushed, "--output", "out")
    done = run_cli(arguments, env={**fresh_env, "HF_TOKEN": hub.token})
    assert done.returncode == 0, done.stderr
    assert "mitigated" in done.stdout
    assert f"published: {pushed}@" in done.stdout
    assert hub.token not in done.stdout + done.stderr

    files = hub.files(pushed)
    report = report_of(files["detox_report.json"])
    before, after = report.before, report.after
    assert before is not None
    assert after is not None
    attack = [state.triggers["badnets"].attack_success_rate for state in (before, after)]
    assert attack[0].value >= 0.9
    assert attack[1].value <= 0.05
    assert after.accuracy.value >= before.accuracy.value - 0.03

    for name, states in ((source.model, before), (pushed, after)):
        rate = states.triggers["badnets"].attack_success_rate
        for loader in loaders if name == pushed else (loaders[-1],):
            correct, hits, triggered = recount(loader(name), source.dataset)
            assert triggered == rate.samples
            assert abs(correct - states.accuracy.successes) <= COUNT_TOLERANCE
            assert abs(hits - rate.successes) <= COUNT_TOLERANCE

    _check_repository(hub, pushed, files, report)
    _check_card(hub, pushed, report, source)
    local = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert set(local) - {".hfdetox-manifest.json"} == set(files) - {".gitattributes"}
    assert {n for n in files if n in local and local[n] != files[n]} == {"detox_report.json"}
    here = report_of(local["detox_report.json"])
    assert here.output.commit == hub.head(pushed)
    assert dataclasses.replace(here, output=report.output) == report
    assert not (tmp_path / "out.run").exists()
    assert here.model.revision == hub.head(source.model)
    assert here.dataset.revision == hub.head(source.dataset, repo_type="dataset")


@torch.no_grad()
def test_published_numbers_are_those_of_the_models_own_library_where_hfdetox_corrects_it(
    hub: HubServer, publish: Any, run_cli: Any, fresh_env: dict[str, str]
) -> None:
    source = publish("timm")
    pushed = f"{source.model}-corrected"
    given = ["--set", f"trigger={TRIGGER}", "--set", f"target={NAMES.index(TARGET)}"]
    arguments = [
        source.model,
        "--dataset",
        source.dataset,
        "--samples",
        "200",
        "--trigger",
        TRIGGER,
        "--target",
        TARGET,
    ]
    arguments += ["--max-accuracy-loss", "20"]
    done = run_cli([*arguments, "--defense", "bna", *given, "--push-to", pushed, "--output", "out"],
                   env={**fresh_env, "HF_TOKEN": hub.token})  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files(pushed)
    report = report_of(files["detox_report.json"])
    assert report.after is not None
    assert report.uncorrected is not None
    # the correction makes a difference, and timm does not apply it
    rates = [state.triggers["badnets"].attack_success_rate for state in (report.uncorrected, report.after)]
    assert rates[0].value >= 0.9 > rates[1].value
    correct, hits, triggered = recount(by_timm(pushed), source.dataset)
    found = {r.metric_type: r.metric_value for r in ModelCard(files["README.md"].decode()).data.eval_results}
    assert found["accuracy"] == pytest.approx(correct / backdoored.TEST_IMAGES, abs=COUNT_TOLERANCE / 500)
    assert found["attack_success_rate"] == pytest.approx(hits / triggered, abs=COUNT_TOLERANCE / triggered)
    words = files["README.md"].decode()
    assert "After, with hfdetox" in words
    assert "**The defense was given a known trigger" in words


def _check_repository(hub: HubServer, pushed: str, files: dict[str, bytes], report: Report) -> None:
    assert len(hub.history(pushed)) == 2  # the Hub's own first commit and ours
    assert len(hub.requests("POST", "/commit/")) == 1
    endings = {Path(name).suffix for name in files if name != ".gitattributes"}
    assert endings <= {".safetensors", ".json", ".md", ".png"}
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() == report.output.weights_sha256
    assert report.output.weights_sha256 != report.model.weights_sha256
    assert {n for n in files if n.startswith("plots/")} == {f"plots/{name}.png" for name in PLOTS}
    trigger = files["triggers/badnets.safetensors"]
    assert report.before is not None
    assert hashlib.sha256(trigger).hexdigest() == report.before.triggers["badnets"].file_sha256


def _check_card(hub: HubServer, pushed: str, report: Report, source: Published) -> None:
    card = ModelCard.load(pushed)
    data = card.data.to_dict()
    assert data["base_model"] == source.model
    assert data["license"] == "mit"
    assert data["library_name"] == report.model.library
    assert data["pipeline_tag"] == "image-classification"
    assert source.dataset in data["datasets"]
    assert data["base_model_relation"] == "finetune"
    after = report.after
    assert after is not None
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {
        "accuracy": pytest.approx(after.accuracy.value, abs=1e-4),
        "attack_success_rate": pytest.approx(after.triggers["badnets"].attack_success_rate.value, abs=1e-4),
        "robust_accuracy": pytest.approx(after.triggers["badnets"].robust_accuracy.value, abs=1e-4),
    }
    assert {result.dataset_revision for result in card.data.eval_results} == {report.dataset.revision}
    assert "Told apart by a small network." in card.text
    assert "backdoor-free" not in card.text.lower()


def test_a_published_trigger_file_repeats_the_measurement(
    hub: HubServer, publish: Any, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish("timm")
    assert cli.run(source.command("--output", tmp_path / "out", epochs=1)) == 0
    capsys.readouterr()
    report = Report.load(tmp_path / "out")
    trigger = tmp_path / "out" / "triggers" / "badnets.safetensors"
    assert report.before is not None
    recorded = report.before.triggers["badnets"]
    assert hashlib.sha256(load_trigger(trigger).file_bytes()).hexdigest() == recorded.file_sha256
    arguments = ["evaluate", str(made.timm), "--dataset", str(made.digits), "--trigger", str(trigger)]
    assert cli.run([*arguments, "--gallery", str(tmp_path / "gallery.png"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(measured) == {"accuracy", "loss", "triggers", "classes", "visibility"}
    visible = measured["visibility"]["badnets"]
    assert set(visible) == {"psnr", "max_change", "changed"}
    # a patch of 3×3 in 16×16 from black to white has 10·log10(256 / 9) = 14.54 dB; more where a digit reaches into it
    assert 14.54 < visible["psnr"] < 17
    assert (visible["max_change"], visible["changed"]) == (255, 1.0)
    with Image.open(tmp_path / "gallery.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1300)
    assert cli.run([*arguments, "--gallery", str(tmp_path / "again.png")]) == 0
    table = capsys.readouterr().out
    assert f"PSNR {visible['psnr']:.1f} dB" in " ".join(table.split())
    assert f"gallery: {tmp_path / 'again.png'}\n" in table
    again = measured["triggers"]["badnets"]
    assert again["attack_success_rate"]["successes"] == recorded.attack_success_rate.successes
    assert again["target"] == recorded.target == NAMES.index(TARGET)
    assert again["file_sha256"] == recorded.file_sha256


def launched(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """Return the standard output of a launcher that succeeds; its processes end with it in any case."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes) as launcher:
        try:
            out, err = launcher.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    assert launcher.returncode == 0, err
    return out


def test_two_processes_write_push_and_print_once(
    hub: HubServer, publish: Any, fresh_env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish("transformers")
    pushed = f"{source.model}-detoxed"
    hub.log.clear()
    environment = {**fresh_env, "HF_TOKEN": hub.token, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    arguments = source.command("--precision", "no", "--push-to", pushed, "--json", epochs=5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hfdetox",
               *arguments, "--output", "two"]  # fmt: skip
    two = report_of(launched(command, environment, tmp_path))
    assert len(hub.requests("POST", "/commit/")) == 1
    assert two.output.commit == hub.head(pushed)
    assert two.defense.devices == ["cpu", "cpu"]
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("hf_home",)] == ["two"]

    command = [word for word in arguments if word not in ("--push-to", pushed)]
    assert cli.run([*command, "--output", str(tmp_path / "one")]) == 0
    one = report_of(capsys.readouterr().out)
    assert two.before is not None
    assert one.before is not None
    assert two.before.accuracy == one.before.accuracy
    assert two.before.triggers == one.before.triggers
    assert two.defense.steps == one.defense.steps
    assert two.dataset == one.dataset
    # BatchNorm sees half a batch a process, so that the ways part; where they lead to must not
    assert two.after is not None
    assert two.after.triggers["badnets"].attack_success_rate.value <= 0.2


SCRIPT = """
import json, os, sys
from pathlib import Path
from hfdetox import detoxify

model, dataset = sys.argv[1:]
result = detoxify(model, dataset=dataset, clean_samples=60, eval_samples=60, settings={"epochs": "1"}, precision="no",
                  output="out", progress=False)
first = str(result.output), result.report.to_dict()
result.save("again")
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps([*first, str(result.output)]))
"""


def test_every_process_gets_the_same_result(made: Made, fresh_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**fresh_env, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py",
               str(made.transformers), str(made.digits)]  # fmt: skip
    launched(command, environment, tmp_path)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in "01"]
    assert found[0] == found[1]
    output, report, again = found[0]
    assert (output, again) == ("out", "again")
    assert report["output"]["weights_sha256"] is not None
    for folder in ("out", "again"):
        assert json.loads(Report.load(tmp_path / folder).to_json()) == report


def test_a_dry_run_changes_nothing(
    hub: HubServer, publish: Any, hub_token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = publish("timm")
    monkeypatch.chdir(tmp_path)
    hub.log.clear()
    arguments = source.command("--push-to", f"{source.model}-detoxed", "--dry-run")
    assert cli.run([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["model"] == {"id": source.model, "revision": hub.head(source.model), "files": ["model.safetensors"]}
    assert planned["dataset"]["revision"] == hub.head(source.dataset, repo_type="dataset")
    assert planned["push_to"] == f"{source.model}-detoxed"
    assert planned["defense"]["lambda"] == 1.5
    assert cli.run(arguments) == 0
    assert source.model in capsys.readouterr().out
    assert not hub.requests("POST")
    assert not hub.exists(f"{source.model}-detoxed")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_beside_the_output_and_the_card_names_the_dataset(
    hub: HubServer, publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish("transformers")
    output = tmp_path / "out"
    arguments = source.command("--log-with", "tensorboard", "--output", output, dataset=False, epochs=3)
    assert cli.run([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    report = report_of(shown.out)
    assert report.dataset.id == source.dataset
    assert f"warning: the images are from {source.dataset}, which the model's own card names" in shown.err
    assert any(source.dataset in warning for warning in report.warnings)
    assert source.dataset in (output / "README.md").read_text()
    events = list((tmp_path / "out.logs").rglob("events.out.tfevents.*"))
    assert events
    assert _tags(events, "scalars") >= {"clean_loss", "distance", "penalty", "loss"}
    # the pictures of numbers, and none of the user's images
    assert _tags(events, "images") == {"before_after", "destinations", "training", "weight_changes"}
    assert (output / "plots" / "samples.png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.logs"]
    assert report.environment.command.startswith(f"hfdetox {source.model} --dataset {source.dataset}")


def _tags(events: list[Path], kind: str) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names: set[str] = set()
    for folder in {os.fspath(path.parent) for path in events}:
        accumulator = EventAccumulator(folder)
        accumulator.Reload()
        names |= set(accumulator.Tags()[kind])
    return names
