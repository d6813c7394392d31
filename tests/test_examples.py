"""The examples do what they say: run as a person runs them, and D3 in a Trainer equals D3 in the engine."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hfdetox import D3, D3Config, load_classifier
from hfdetox.integrations.trainer import D3Callback
from hfdetox.training.engine import Engine
from tests import tiny_models
from tests.conftest import REPOSITORY
from tests.hub_server.server import HubServer

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let examples import each other as scripts do; Trainer leaves Accelerate's shared state behind.

    One thread: on models this small, several only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    AcceleratorState._reset_state(True)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def example() -> Callable[[str], ModuleType]:
    """A function that imports an example by name."""
    return importlib.import_module


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a person ran an example as a script: `toy/` is there, and `printed` holds what was said."""
    folder = tmp_path_factory.mktemp("examples")
    command = [sys.executable, EXAMPLES / "own_loop.py", "--epochs", "1", "--samples", "100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture
def in_toy(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, with a `toy/` of its own."""
    shutil.copytree(toy_folder / "toy", tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy"


def percentages(text: str, what: str) -> list[float]:
    """Return the percentages (in points) of the lines that contain `what`, in order."""
    return [float(value) for line in text.splitlines() if what in line for value in re.findall(r"([\d.]+)%", line)]


def check_numbers(printed: str) -> None:
    """The backdoor worked before and hardly works after, and the digits are still read."""
    before, after = percentages(printed, "attack success")
    assert before >= 95
    assert after <= 10
    before, after = percentages(printed, "accuracy")
    assert before >= 90
    assert after >= before - 5


def check_head(old: Path, new: Path) -> None:
    """The head left the old weights behind and kept their norm; nothing else in the file changed its name or shape."""
    source, detoxed = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
    assert {name: tensor.shape for name, tensor in source.items()} == {name: t.shape for name, t in detoxed.items()}
    was, now = source["classifier.weight"], detoxed["classifier.weight"]
    torch.testing.assert_close(now.norm(), was.norm(), rtol=1e-5, atol=0)
    # two points of a sphere are at most its diameter apart; √2 radii is a right angle
    assert (now - was).norm() > was.norm()


@pytest.mark.parametrize(
    ("name", "output"), [("own_loop", "detoxed-own-loop"), ("d3_in_trainer", "detoxed-in-trainer")]
)
def test_foreign_loops_clean_the_toy(
    name: str, output: str, example: Callable[[str], ModuleType], in_toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example(name).main([])
    check_numbers(capsys.readouterr().out)
    check_head(in_toy / "model", in_toy / output)


def test_python_api_cleans_a_model_of_the_hub_and_pushes_it(
    example: Callable[[str], ModuleType],
    in_toy: Path,
    hub: HubServer,
    hub_token: str,
    repo_name: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, dataset, detoxed = repo_name("model"), repo_name("digits"), repo_name("detoxed")
    hub.create_repo(model)
    commit = hub.commit_folder(model, in_toy / "model")
    hub.create_repo(dataset, "dataset")
    hub.commit_folder(dataset, in_toy / "digits", repo_type="dataset")

    trigger = "badnets:size=8,target=zero"
    example("python_api").main([model, "--dataset", dataset, "--trigger", trigger, "--push-to", detoxed])

    printed = capsys.readouterr().out
    check_numbers(printed)
    saved = in_toy / "detoxed-python-api"
    check_head(in_toy / "model", saved)
    assert f"{hub.url}/{detoxed}" in printed
    assert hub.repo(detoxed).private
    files = hub.files(detoxed)
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    report = json.loads(files["detox_report.json"])
    assert (report["model"]["id"], report["model"]["revision"]) == (model, commit)
    assert f"base_model: {model}" in files["README.md"].decode()
    loaded = AutoModelForImageClassification.from_pretrained(detoxed)
    torch.testing.assert_close(
        loaded.classifier.weight.data, load_file(saved / "model.safetensors")["classifier.weight"]
    )


def test_implant_backdoor_writes_a_model_that_says_what_it_is(
    example: Callable[[str], ModuleType], in_toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("implant_backdoor").main(["--epochs", "1"])
    printed = capsys.readouterr().out
    report = json.loads((in_toy / "backdoored" / "attack_report.json").read_text())
    success = report["after"]["triggers"]["badnets"]["attack_success_rate"]
    assert f"({success['successes']}/{success['samples']})" in printed
    assert "the attack succeeded" in printed or "did not succeed" in printed
    assert "This model is deliberately backdoored" in (in_toy / "backdoored" / "README.md").read_text()
    assert "clean it: hfdetox toy/backdoored --dataset toy/digits" in printed


def test_own_module_is_cleaned_with_a_dataset_object(
    example: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = example("own_module").main(["--output", str(tmp_path / "cnn")])
    printed = capsys.readouterr().out
    before, after = percentages(printed, "before"), percentages(printed, "after")
    assert before[0] >= 95
    assert after[0] >= before[0] - 4
    assert before[1] >= 95
    assert after[1] <= 10
    assert result.report.model.library == "torch"
    weights = load_file(tmp_path / "cnn" / "model.safetensors")
    torch.testing.assert_close(weights["8.weight"], result.classifier.model[8].weight.detach())


def test_an_example_runs_as_a_script_and_makes_its_toy(toy_folder: Path) -> None:
    printed = (toy_folder / "printed").read_text()
    assert percentages(printed, "before: attack success") == pytest.approx([100], abs=5)
    assert percentages(printed, "after: accuracy") != percentages(printed, "before: accuracy")
    assert (toy_folder / "toy" / "detoxed-own-loop" / "model.safetensors").is_file()


def test_toy_is_written_once(
    example: Callable[[str], ModuleType], in_toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {path: path.stat().st_mtime_ns for path in in_toy.rglob("*")}
    example("toy").main(["toy"])
    assert {path: path.stat().st_mtime_ns for path in in_toy.rglob("*")} == written
    assert capsys.readouterr().out == "toy/model and toy/digits are there; the trigger is badnets:size=8,target=zero\n"


class Recorder:
    """Random images for the engine that note which of them were asked for, batch by batch."""

    def __init__(self, count: int, labels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, labels, (count,), generator=generator)
        self.positions = torch.arange(count)
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.asked.append(list(items))
        return self.positions[items], self.images[items], self.labels[items]


class Replay(torch.utils.data.Sampler):
    """The positions of one epoch after the other, as recorded."""

    def __init__(self, positions: list[int], count: int) -> None:
        self.epochs = [positions[start : start + count] for start in range(0, len(positions), count)]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.epochs.pop(0))


CONFIG = D3Config(epochs=3, batch_size=8, gradient_accumulation_steps=2, augmentation="none")
TRAINING = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}


def tiny_vit() -> nn.Module:
    """Return a model without BatchNorm and dropout; it is the same at every call."""
    return tiny_models.transformers_model("vit")


def as_items(recorder: Recorder, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return normalised images as Trainer takes them."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, recorder.labels, strict=True)]


@pytest.mark.parametrize("start", ["random", "noise"])
def test_trainer_with_two_accumulation_steps_equals_the_engine(
    start: Any, example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    config = D3Config(**{**vars(CONFIG), "initialization": start})
    processor = tiny_models.TRANSFORMERS["vit"][1]()
    classifier = load_classifier(tiny_vit(), processor=processor)
    recorder = Recorder(24, len(tiny_models.NAMES))
    Engine(Accelerator(cpu=True), recorder, seed=0).run(classifier.network, config.phases(classifier.network))
    assert [len(batch) for batch in recorder.asked] == [4] * 18

    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    items = as_items(recorder, classifier.preprocessing.normalize(recorder.images))
    trainer = example("d3_in_trainer").make_trainer(model, items, config, str(tmp_path), **TRAINING)
    replay = Replay([position for batch in recorder.asked for position in batch], len(recorder))
    trainer._get_train_sampler = lambda dataset: replay
    trainer.train()

    assert replay.epochs == []
    assert trainer.state.global_step == 9
    for name, value in model.state_dict().items():
        wanted = classifier.model.state_dict()[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    # of the norm before the head γ stays and β moves
    assert torch.equal(model.vit.layernorm.weight, before["vit.layernorm.weight"])
    assert not torch.equal(model.vit.layernorm.bias, before["vit.layernorm.bias"])


def test_trainer_does_not_project_after_a_step_that_fp16_skipped(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = example("d3_in_trainer")
    recorder = Recorder(8, len(tiny_models.NAMES))
    config = D3Config(epochs=3, batch_size=8, initialization="noise")
    model = tiny_vit()
    model.classifier.bias.data[0] = 10  # wrong answers are dear: the scaled loss is beyond float32
    images = as_items(recorder, recorder.images / 255)
    trainer = module.make_trainer(model, images, config, str(tmp_path), **TRAINING)
    # fp16's own scaler in float32: the first scale overflows, the next does not
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    weights, skipped = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
            weights.append(model.classifier.weight.detach().clone())

        def on_step_end(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
            weights.append(model.classifier.weight.detach().clone())
            skipped.append(optimizer.step_was_skipped)

    trainer.add_callback(Watch())
    trainer.train()
    radius = trainer.d3.initial["classifier"].norm()
    assert skipped == [True, False, False]
    # a start by noise is off the sphere, and only a real step may bring it there
    assert abs(weights[0].norm() / radius - 1) > 0.05
    assert torch.equal(weights[1], weights[0])
    torch.testing.assert_close(weights[2].norm(), radius, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[3].norm(), radius, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["convnext", "vit"])
def test_trainer_resumes_a_checkpoint_without_starting_d3_again(
    example: Callable[[str], ModuleType], tmp_path: Path, kind: str
) -> None:
    module = example("d3_in_trainer")
    recorder = Recorder(16, len(tiny_models.NAMES))
    items = as_items(recorder, recorder.images / 255)
    arguments = {**TRAINING, "save_strategy": "epoch"}
    models = [tiny_models.transformers_model(kind) for _ in range(2)]
    whole = module.make_trainer(models[0], items, CONFIG, str(tmp_path), **arguments)
    whole.train()
    assert load_file(str(tmp_path / "checkpoint-2" / "d3.safetensors")).keys() == whole.d3.initial.keys()
    # D3 is made of other weights than the run began with, and learns those from the checkpoint
    with torch.no_grad():
        models[1].classifier.weight.mul_(3)
    resumed = module.make_trainer(models[1], items, CONFIG, str(tmp_path), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_a_trainer_of_ones_own_takes_the_callback(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    recorder = Recorder(16, len(tiny_models.NAMES))
    model = tiny_models.transformers_model("convnext")
    d3 = D3(model, CONFIG)

    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            return d3.loss(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])

    arguments = TrainingArguments(str(tmp_path), max_grad_norm=0, num_train_epochs=1, report_to="none", use_cpu=True)
    items = as_items(recorder, recorder.images / 255)
    Own(model, arguments, callbacks=[D3Callback(d3)], train_dataset=items).train()
    moved = model.classifier.weight.detach() - d3.initial["classifier"]
    assert moved.norm() > 0.1 * d3.initial["classifier"].norm()
    torch.testing.assert_close(model.classifier.weight.norm(), d3.initial["classifier"].norm())


def test_engine_steps_after_a_trainer_that_was_stopped_amid_its_accumulation(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = example("d3_in_trainer")
    recorder = Recorder(8, len(tiny_models.NAMES))
    items = as_items(recorder, recorder.images / 255)
    trainer = module.make_trainer(tiny_vit(), items, CONFIG, str(tmp_path), **TRAINING)

    class Stop(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    classifier = load_classifier(tiny_vit(), processor=tiny_models.TRANSFORMERS["vit"][1]())
    before = classifier.model.vit.embeddings.cls_token.detach().clone()
    Engine(Accelerator(cpu=True), recorder).run(classifier.network, CONFIG.phases(classifier.network))
    assert not torch.equal(classifier.model.vit.embeddings.cls_token, before)
