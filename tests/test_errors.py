"""What may go wrong, as a person sees it: the exit status, and one line that says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers as tf
from datasets import Dataset

from hfdetox.cli import app as cli
from hfdetox.reporting.report import Report
from tests import backdoored, tiny_models
from tests.backdoored import NAMES, TARGET, TRIGGER, Made
from tests.hub_server.server import HubServer

NEVER = "http://127.0.0.1:9"  # the discard port, which nothing listens on
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


def the_line(text: str) -> str:
    """Return the one error line that a terminal shows when bars have erased themselves; warnings may stand above it."""
    shown = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    lines = [line for line in shown if line and not line.startswith("hfdetox: warning: ")]
    assert len(lines) == 1, text
    assert lines[0].startswith("hfdetox: error: ")
    assert "Traceback" not in text
    assert not any(token in text for token in (HubServer.token, HubServer.read_token, "hf_wrong"))
    return lines[0]


@pytest.fixture
def refused(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """`refused(status, arguments)` runs a command in this process, which must write nothing, and returns its line."""

    def run(status: int, arguments: Sequence[str | Path]) -> str:
        folder = tmp_path / "here"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        capsys.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert list(folder.iterdir()) == []
        return the_line(err)

    return run


def model_folder(folder: Path, model: tf.PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def small_vit(**options: object) -> tf.ViTConfig:
    return tf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                        patch_size=8, **options)  # fmt: skip


def test_an_unknown_model_or_dataset(made: Made, refused: Refused, hub: HubServer) -> None:
    line = refused(3, ["org/no-such-model", "--dataset", made.digits])
    assert f"model org/no-such-model is not on the Hub at {hub.url}; check the spelling" in line
    line = refused(3, [made.timm, "--dataset", "org/no-such-data"])
    assert f"dataset org/no-such-data is not on the Hub at {hub.url}; check the spelling" in line
    line = refused(3, [made.timm, "--dataset", "org/no-such-data", "--dry-run"])
    assert "dataset org/no-such-data is not on the Hub" in line
    line = refused(2, [made.timm, "--dataset", "./no-such-folder"])
    assert "no-such-folder: no such folder" in line


def test_a_repository_with_pickles_only(refused: Refused, hub: HubServer, repo_name: Callable[..., str]) -> None:
    name = repo_name("pickled", "org")
    hub.create_repo(name)
    hub.commit(name, {"config.json": '{"model_type": "vit"}', "pytorch_model.bin": b"\x80\x04."})
    for more in ([], ["--dry-run"]):
        line = refused(2, [name, "--dataset", "org/never-asked-for", *more])
        assert f"model {name} has its weights only as a pickle (pytorch_model.bin)" in line
    assert not any("pytorch_model.bin" in entry.path for entry in hub.log)


def test_models_that_are_no_single_label_classifiers(made: Made, refused: Refused, tmp_path: Path) -> None:
    encoder = model_folder(tmp_path / "encoder", tf.ViTModel(small_vit()))
    text = tmp_path / "text"
    tf.BertModel(tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                               vocab_size=20)).save_pretrained(text)  # fmt: skip
    several = tf.ViTForImageClassification(small_vit(num_labels=3, problem_type="multi_label_classification"))
    for folder, said in (
        (encoder, "is not an image classifier but a ViTModel; give a model with a trained classification head"),
        (text, "is not an image classifier (model type bert)"),
        (
            model_folder(tmp_path / "several", several),
            "is a multi_label_classification model; hfdetox handles one label",
        ),
    ):
        assert said in refused(2, [folder, "--dataset", made.digits])


def test_labels_that_do_not_match_are_listed_before_anything_is_trained(
    made: Made, refused: Refused, tmp_path: Path
) -> None:
    model = tiny_models.timm_folder(tmp_path / "fruit")
    line = refused(2, [model, "--dataset", made.digits, "--output", "out"])
    assert f"unmatched in the dataset (10): {', '.join(NAMES[:8])} and 2 more" in line
    assert f"unmatched in the model (5): {', '.join(tiny_models.NAMES)}" in line
    assert "--label-map" in line


def test_too_few_images(made: Made, refused: Refused, tmp_path: Path) -> None:
    backdoored.write_digits(tmp_path / "nine", without="seven")
    line = refused(2, [made.timm, "--dataset", tmp_path / "nine", "--samples", "100"])
    assert "split train has no image of 1 of the model's 10 classes (seven)" in line
    assert "--allow-missing-classes" in line
    line = refused(2, [made.timm, "--dataset", made.digits, "--samples", "5000"])
    assert "--samples 5000: split train has 1297 labelled images; ask for fewer" in line
    line = refused(2, [made.timm, "--dataset", made.digits, "--samples", "9"])
    assert "--samples 9 gives 9 images, fewer than the 10 classes" in line
    line = refused(2, [made.timm, "--dataset", made.digits, "--samples", "0"])
    assert "--samples 0 leaves no images: give a count of at least 1" in line


def test_no_image_column(made: Made, refused: Refused, tmp_path: Path) -> None:
    data = tmp_path / "numbers"
    Dataset.from_dict({"width": [3] * 20, "label": [1] * 20}).to_parquet(str(data / "train.parquet"))
    line = refused(2, [made.timm, "--dataset", data])
    assert "the dataset has no image column that can be told from its features" in line
    assert "width (int64), label (int64)" in line
    assert "--image-column" in line
    line = refused(2, [made.timm, "--dataset", made.digits, "--image-column", "picture"])
    assert "the dataset has no column 'picture' for --image-column; it has image (Image), label (ClassLabel)" in line


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_settings_precisions_triggers_and_targets_that_do_not_exist(
    made: Made, refused: Refused, more: list[str]
) -> None:
    base = [made.timm, "--dataset", made.digits, *more]
    line = refused(2, [*base, "--set", "bogus=1", "--set", "epochs=1", "--set", "wrong=2"])
    assert "d3 has no setting bogus, wrong; it has epochs, batch_size, learning_rate" in line
    assert "lambda, epsilon, layers, initialization" in line
    assert "unknown defense 'd4'; known: anp, bn, " in refused(2, [*base, "--defense", "d4"])
    assert "d3 has no preset 'hard'; it has paper, code, auto" in refused(2, [*base, "--defense", "d3:hard"])
    assert "epochs must be a whole number, got 'many'" in refused(2, [*base, "--set", "epochs=many"])
    assert "unknown trigger 'sunglasses'; known: badnets, blended" in refused(2, [*base, "--trigger", "sunglasses"])
    line = refused(2, [*base, "--trigger", "badnets", "--trigger", "badnets:size=5"])
    assert "two triggers are named 'badnets'" in line
    line = refused(2, [*base, "--precision", "fp16", "--device", "cpu"])
    assert "fp16 does not run on a CPU; use --precision bf16, no or auto" in line
    if not more:
        line = refused(2, [*base, "--trigger", TRIGGER, "--target", "ten"])
        assert "target 'ten' is neither a label (zero, one, two" in line
        line = refused(2, [*base, "--samples", "100", "--set", "layers=nowhere.*"])
        assert "nowhere.*" in line
        assert "fc" in line


def test_an_accuracy_near_chance_stops_the_run_and_permuted_labels_are_named(
    made: Made, refused: Refused, tmp_path: Path
) -> None:
    backdoored.write_digits(tmp_path / "shifted", shift=1)
    base = [made.timm, "--samples", "100", "--output", "out"]
    line = refused(1, [*base, "--dataset", tmp_path / "shifted"])
    assert "near chance (10.0%): its labels or its preprocessing are probably wrong for this dataset" in line
    assert "with its labels in another order it would reach 9" in line
    assert "--label-map" in line
    # a network that has learnt nothing gives no hint of an order
    untrained = tiny_models.timm_folder(tmp_path / "untrained", num_classes=len(NAMES))
    line = refused(1, [untrained, *base[1:], "--dataset", made.digits])
    assert "near chance" in line
    assert "another order" not in line


def test_an_earlier_result_is_replaced_only_when_asked(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = [str(made.timm), "--dataset", str(made.digits), "--samples", "100", "--eval-samples", "50",
               "--max-accuracy-loss", "100", "--output", str(output)]  # fmt: skip
    assert cli.run([*command, "--epochs", "1"]) == 0
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert cli.run([*command, "--epochs", "2", *more]) == 2
        assert f"{output} holds an earlier result; choose another --output, or replace it with --overwrite" in the_line(
            capsys.readouterr().err
        )
    assert Report.load(output).defense.epochs == 1
    assert cli.run([*command, "--epochs", "2", "--overwrite"]) == 0
    assert Report.load(output).defense.epochs == 2
    assert os.listdir(tmp_path) == ["out"]


# a process of its own takes seconds to import everything, so that some commands share one
SEVERAL = """
import contextlib, io, json, os, sys
from hfdetox.cli.app import run
answers = []
for token, arguments in json.loads(sys.argv[1]):
    os.environ.update({"HF_TOKEN": token} if token else {})
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run(arguments)
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    status: int
    out: str
    err: str

    def line(self, status: int) -> str:
        """Return the one line of a command that ended with this status."""
        assert self.status == status, self.err
        assert self.out == ""
        return the_line(self.err)


def several(environment: dict[str, str], folder: Path, *commands: tuple[str, list[str]]) -> list[Answer]:
    """Run (token, arguments) one after the other in one new process with this environment."""
    done = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(commands)], env=environment, cwd=folder,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def test_tokens_that_are_missing_or_wrong_are_found_before_anything_is_pulled(
    made: Made, hub: HubServer, repo_name: Callable[..., str], fresh_env: dict[str, str], tmp_path: Path
) -> None:
    gated, new = repo_name("gated", "org"), repo_name()
    hub.create_repo(gated, gated=True)
    hub.commit_folder(gated, made.timm)
    pull = [gated, "--dataset", str(made.digits)]
    push = [str(made.timm), "--dataset", str(made.digits), "--push-to", new]
    answers = several(fresh_env, tmp_path, ("", pull), ("", push), ("hf_wrong", push), (hub.read_token, push))
    no_access, no_token, wrong_token, read_token = (answer.line(3) for answer in answers)
    assert f"model {gated} is gated and there is no token; log in with `hf auth login` or set HF_TOKEN" in no_access
    assert f"no token for a push to model {new}" in no_token
    assert "the Hub refuses the token" in wrong_token
    assert "hf auth login" in wrong_token
    assert "may only read" in read_token
    assert not hub.exists(new)
    assert not hub.requests("POST")
    assert not any("model.safetensors" in entry.path and entry.status < 400 for entry in hub.log)
    assert {path.name for path in tmp_path.iterdir()} <= {"hf_home"}


def test_a_hub_that_cannot_be_reached(
    made: Made, fresh_env: dict[str, str], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli(["org/model", "--dataset", made.digits], env={**fresh_env, "HF_ENDPOINT": NEVER})
    line = Answer(done.returncode, done.stdout, done.stderr).line(3)
    assert f"the Hub at {NEVER} cannot be reached for model org/model" in line
    assert "HF_HUB_OFFLINE=1" in line


def test_offline_a_run_needs_the_cache_and_nothing_else(
    made: Made, hub: HubServer, repo_name: Callable[..., str], fresh_env: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, dataset = repo_name("model", "org"), repo_name("digits", "org")
    hub.create_repo(model)
    hub.commit_folder(model, made.timm)
    hub.create_repo(dataset, "dataset")
    hub.commit_folder(dataset, made.digits, repo_type="dataset")
    options = ["--samples", "100", "--eval-samples", "100", "--trigger", TRIGGER, "--target", TARGET, "--epochs", "1",
               "--max-accuracy-loss", "100", "--json", "--output"]  # fmt: skip
    command = [model, "--dataset", dataset, *options]
    assert cli.run([*command, str(tmp_path / "online")]) == 0
    online = json.loads(capsys.readouterr().out)

    offline = {**fresh_env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NEVER, "HF_HOME": os.environ["HF_HOME"]}
    no_model, no_data, cached = several(
        offline, tmp_path, ("", ["org/never-pulled", "--dataset", dataset, *options, "never"]),
        ("", [model, "--dataset", "org/never-read", *options, "never"]), ("", [*command, "offline"]),
    )  # fmt: skip
    advice = "is not in the cache and HF_HUB_OFFLINE is set; unset it, or pull it once while online"
    assert f"model org/never-pulled {advice}" in no_model.line(3)
    assert f"dataset org/never-read {advice}" in no_data.line(3)
    assert cached.status == 0, cached.err
    assert "nobody checked that it is current" in cached.err
    again = json.loads(cached.out)
    assert [again[part] for part in ("model", "dataset", "before")] == [
        online[part] for part in ("model", "dataset", "before")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["offline", "online"]


def test_the_model_of_a_damaged_download_is_not_used(
    made: Made, hub: HubServer, repo_name: Callable[..., str], refused: Refused
) -> None:
    name = repo_name("damaged", "org")
    hub.create_repo(name)
    hub.commit_folder(name, made.timm)
    hub.faults.flip_byte("model.safetensors", at=5000, origin="storage")
    line = refused(3, [name, "--dataset", made.digits])
    assert f"model.safetensors of model {name} is not what the Hub says it is" in line
    assert "run it again" in line


def test_a_wrong_safetensors_file_in_a_folder(made: Made, refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(made.timm, folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04" + b"pickle" * 100)
    assert "safetensors" in refused(2, [folder, "--dataset", made.digits])
