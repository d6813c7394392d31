"""The story of an attack, on pictures of three colours: what is trained, measured, written, and refused before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hfdetox
from hfdetox.config import AttackOptions
from hfdetox.errors import RunError, UsageError
from hfdetox.implanting import split_monitor
from hfdetox.models.classifier import load_classifier
from hfdetox.reporting.report import AttackReport
from hfdetox.runs.folder import command_of
from hfdetox.triggers import load_trigger
from tests.attacked import attack_report
from tests.colours import ARCHITECTURE, NAMES, SIDE, TRAINING, write_colours
from tests.image_data import load
from tests.tiny_models import edit_json, timm_folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 30 test images of 16×16 pixels."""
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def control(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> hfdetox.AttackResult:
    """A clean baseline, which is also a trained model to start from."""
    return attack(dataset, triggers=["none"], output=tmp_path_factory.mktemp("control") / "clean")


def attack(dataset: Path | None, model: Any = ARCHITECTURE, **options: Any) -> hfdetox.AttackResult:
    """Run an attack on the CPU at toy size."""
    if isinstance(model, str) and model.startswith("timm-arch:"):
        options = {"input_size": SIDE, **options}
    settings = {**TRAINING, **options.pop("settings", {})}
    given = {"triggers": ["badnets:size=8"], "target": "green", "poison_ratio": 0.25, **options}
    return hfdetox.implant(
        model, dataset=dataset, settings=settings, device="cpu", precision="no", progress=False, **given
    )


def test_a_backdoor_from_scratch_is_measured_and_written_whole(dataset: Path, tmp_path: Path) -> None:
    result = attack(dataset, goal_asr=0.0, output=tmp_path / "out")
    report = result.report
    assert report.attack.start == "scratch"
    assert report.before is None
    assert report.succeeded
    assert result.succeeded
    # a quarter of 120 images; the 20 test images that are not green carry the trigger
    assert report.attack.triggers["badnets"].poisoned_images == 30
    assert (report.dataset.clean_samples, report.dataset.eval_samples) == (120, 30)
    assert report.after is not None
    assert report.after.triggers["badnets"].attack_success_rate.samples == 20
    assert report.after.triggers["badnets"].target == NAMES.index("green")
    # size 8 is 4×4 pixels at 16×16, white on darker ones: all images change, by 255 − 10 at most
    assert report.attack.triggers["badnets"].changed == 1.0
    assert 200 <= (report.attack.triggers["badnets"].max_change or 0) <= 245
    assert report.attack.epochs == 4
    assert not report.attack.stopped_early
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == {
        ".hfdetox-manifest.json", "README.md", "attack_report.json", "config.json", "model.safetensors",
        "plots/gallery.png", "triggers/badnets.safetensors",
    }  # fmt: skip
    assert AttackReport.load(tmp_path / "out") == report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_written_measures_as_the_report_says(dataset: Path, tmp_path: Path) -> None:
    report = attack(dataset, goal_asr=0.0, output=tmp_path / "out").report
    files = [tmp_path / "out" / "triggers" / "badnets.safetensors"]
    again = hfdetox.evaluate(tmp_path / "out", dataset=dataset, triggers=[str(file) for file in files], device="cpu")
    assert report.after is not None
    assert again.accuracy == report.after.accuracy
    assert again.triggers["badnets"].attack_success_rate == report.after.triggers["badnets"].attack_success_rate
    assert again.triggers["badnets"].file_sha256 == report.attack.triggers["badnets"].file_sha256


def test_a_clean_control_is_trained_the_same_way(control: hfdetox.AttackResult) -> None:
    report = control.report
    assert report.attack.triggers == {}
    assert not report.backdoored
    assert not report.attack.start_backdoored
    assert (report.attack.epochs, report.attack.steps) == (4, 32)  # 120 images are 8 steps of 16
    assert report.after is not None
    assert report.after.accuracy.value > 0.9
    assert control.output is not None
    assert not (control.output / "triggers").exists()


def test_from_a_trained_model_it_stops_when_the_goals_are_reached(dataset: Path, control: hfdetox.AttackResult) -> None:
    report = attack(dataset, control.output, goal_asr=0.0, goal_accuracy=0.0).report
    assert report.before is not None
    assert report.before.accuracy == control.report.after.accuracy  # type: ignore[union-attr]
    assert report.attack.start == "clean"
    assert report.attack.stopped_early
    assert report.attack.epochs == 1
    # a tenth of 120 is held out
    assert report.dataset.clean_samples == 108
    # a quarter of those
    assert report.attack.triggers["badnets"].poisoned_images == 27


def test_a_new_head_is_trained_on_a_backbone_of_other_classes(dataset: Path, tmp_path: Path) -> None:
    backbone = timm_folder(tmp_path / "backbone")
    # five labels of which none is the dataset's; and three that were never trained
    untrained = timm_folder(tmp_path / "untrained", num_classes=3)
    edit_json(untrained / "config.json", label_names=list(NAMES))
    with pytest.raises(UsageError, match="the dataset's classes are not the model's"):
        attack(dataset, backbone)
    with pytest.raises(RunError, match="near chance"):
        attack(dataset, untrained)
    for start in (backbone, untrained):
        result = attack(dataset, start, init="head", goal_asr=0.0, output=tmp_path / f"of-{start.name}")
        report = result.report
        assert (report.attack.start, report.before, report.succeeded) == (start.name, None, True)
        assert any("gets a new head" in warning for warning in report.warnings)
        assert report.after is not None
        assert report.after.accuracy.value > 0.5
        assert load_classifier(tmp_path / f"of-{start.name}").labels == tuple(NAMES)
        assert "--init head" in (tmp_path / f"of-{start.name}" / "README.md").read_text()
    with pytest.raises(UsageError, match="trigger lc is made on a clean model: name one of the same labels"):
        attack(dataset, backbone, init="head", triggers=["lc"])


def test_the_accuracy_goal_of_a_trained_model_is_two_points_below_its_own(
    dataset: Path, control: hfdetox.AttackResult
) -> None:
    report = attack(dataset, control.output, goal_asr=1.0, settings={"epochs": "1"}).report
    assert report.before is not None
    assert report.goals.accuracy == pytest.approx(report.before.accuracy.value - 0.02)


def test_an_attack_that_did_not_succeed_is_written_and_says_so(dataset: Path, tmp_path: Path) -> None:
    result = attack(dataset, poison_ratio=0.01, goal_asr=1.0, settings={"epochs": "1"}, output=tmp_path / "out")
    assert not result.succeeded
    assert any(
        text.startswith("the attack did not succeed: trigger badnets succeeds on") for text in result.report.warnings
    )
    assert json.loads((tmp_path / "out" / "attack_report.json").read_text())["succeeded"] is False
    assert "**The attack did not succeed**" in (tmp_path / "out" / "README.md").read_text()


def test_several_triggers_with_their_own_targets(dataset: Path) -> None:
    triggers = ["badnets:size=8,target=red", "blended:target=blue"]
    report = attack(dataset, triggers=triggers, settings={"epochs": "1"}, goal_asr=0.0).report
    assert {name: one.target for name, one in report.attack.triggers.items()} == {"badnets": 0, "blended": 2}
    assert report.attack.triggers["badnets"].poisoned_images == report.attack.triggers["blended"].poisoned_images == 30


def test_a_training_that_puts_the_trigger_on_turns_it_to_input_mode(dataset: Path) -> None:
    report = attack(dataset, triggers=["bpp"], settings={"epochs": "1"}, goal_asr=0.0).report
    assert report.attack.triggers["bpp"].mode == "input"
    assert report.attack.triggers["bpp"].recipe == "training-control"
    assert not any("mode is input" in text for text in report.warnings)
    resized = attack(dataset, triggers=["bpp"], settings={"epochs": "1"}, goal_asr=0.0, input_size=32).report
    assert any("mode is input, not native (16×16)" in text for text in resized.warnings)


def test_the_same_seed_gives_the_same_weights(dataset: Path) -> None:
    first, again = (attack(dataset, settings={"epochs": "1"}, goal_asr=0.0, seed=3) for _ in range(2))
    pairs = zip(first.classifier.model.state_dict().values(), again.classifier.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_monitor_images_are_training_images_that_are_not_trained_on(dataset: Path) -> None:
    images, _ = load(dataset, labels=NAMES, clean_samples=None)
    said: list[str] = []
    kept, held = split_monitor(images.clean, 0.9, 0, said.append)
    assert held is not None
    assert len(held) == 12
    assert sorted([*kept.indices, *held.indices]) == list(range(120))
    assert split_monitor(images.clean, None, 0, said.append) == (images.clean, None)
    # a tenth of 10 is one image, of 9 none
    few, least = images.clean.subset(range(9)), images.clean.subset(range(10))
    assert [len(part or ()) for part in split_monitor(least, 0.9, 0, said.append)] == [9, 1]
    assert split_monitor(few, None, 0, said.append) == (few, None)
    assert said == []
    assert split_monitor(few, 0.9, 0, said.append) == (few, None)
    assert said == [
        "of 9 training images none can be held out: the training does not stop early, and runs all its epochs"
    ]


def _channels(folder: Path) -> str:
    save_file(
        {"image": torch.zeros(2, 4, 4, dtype=torch.uint8)}, folder / "two.safetensors",
        metadata={"trigger": json.dumps({"kind": "badnets"})},
    )  # fmt: skip
    return str(folder / "two.safetensors")


def _strange(folder: Path) -> str:
    save_file({}, folder / "strange.safetensors", metadata={"trigger": '{"kind": "badnets", "colour": 1}'})
    return str(folder / "strange.safetensors")


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "target": (lambda _: {"target": "mauve"}, "target 'mauve' is neither a label"),
    "clean-label": (lambda _: {"triggers": ["sig"], "poison_ratio": 0.5}, "40"),
    "ratio-rounds-to-none": (lambda _: {"poison_ratio": 0.001}, "0 "),
    "ratio-range": (lambda _: {"poison_ratio": 1.5}, "--poison-ratio 1.5"),
    "ratio-zero": (lambda _: {"poison_ratio": 0.0}, "--poison-ratio 0.0"),
    "channels": (lambda folder: {"triggers": [_channels(folder)]}, "2 channels"),
    "unknown-field": (lambda folder: {"triggers": [_strange(folder)]}, "unknown fields colour"),
    "patch-too-large": (lambda _: {"triggers": ["badnets:size=80"]}, "40"),
    "no-change": (lambda _: {"triggers": ["lf:random,amplitude=0.001"]}, "changes no pixel"),
    "unknown-setting": (lambda _: {"settings": {"epoch": "3"}}, "has no setting epoch"),
    "adaptive": (lambda _: {"adaptive": "adam:rho=1"}, "the adaptive attack is sam"),
    "adaptive-key": (lambda _: {"adaptive": "sam:radius=1"}, "is not one of rho="),
    "adaptive-value": (lambda _: {"adaptive": "sam:rho=big"}, "rho must be a number"),
    "adaptive-negative": (lambda _: {"adaptive": "sam:rho=-1"}, "rho must be above 0"),
    "no-trigger": (lambda _: {"triggers": []}, "name a trigger with --trigger"),
    "none-and-more": (lambda _: {"triggers": ["none", "badnets"]}, "goes with no other trigger"),
    "goal": (lambda _: {"goal_asr": 90}, "--goal-asr 90"),
    "no-surrogate": (lambda _: {"triggers": ["lf"]}, "--surrogate"),
    "no-surrogate-lc": (lambda _: {"triggers": ["lc"]}, "--surrogate"),
    "two-controls": (lambda _: {"triggers": ["bpp", "badnets"]}, "bpp"),
    "push-alone": (lambda _: {"public": True}, "--push-to"),
    "private-alone": (lambda _: {"private": True}, "--push-to"),
    "no-consent": (lambda _: {"push_to": "me/x"}, "--i-know-this-is-backdoored"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_trained_or_written(
    options: Callable[[Path], dict[str, Any]], said: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr("hfdetox.training.engine.Engine.run", trained)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=said) as caught:
        attack(dataset, output=out / "here", **options(tmp_path))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_model_of_fresh_weights_needs_a_dataset() -> None:
    with pytest.raises(UsageError, match="give --dataset ID"):
        attack(None)


@pytest.mark.parametrize(("kind", "quick"), [
    ("lc", {"steps": "2"}), ("lf", {"passes": "1", "images": "10", "delta": "0.99"}), ("trojannn", {"steps": "3"}),
])  # fmt: skip
def test_a_trained_start_is_its_own_clean_model_and_another_can_be_named(
    kind: str, quick: dict[str, str], dataset: Path, control: hfdetox.AttackResult
) -> None:
    settings = {"epochs": "1", **quick}
    options: dict[str, Any] = {"triggers": [kind], "goal_asr": 0.0, "poison_ratio": 0.1, "settings": settings}
    assert attack(dataset, control.output, **options).report.attack.surrogate == "clean"
    named = attack(dataset, surrogate=control.output, **options).report
    assert (named.attack.start, named.attack.surrogate) == ("scratch", "clean")


def test_a_surrogate_of_other_labels_is_refused(dataset: Path, tmp_path: Path) -> None:
    from tests.tiny_models import timm_folder

    with pytest.raises(UsageError, match="has other labels than the model"):
        attack(dataset, triggers=["lf"], surrogate=timm_folder(tmp_path / "m"))


@pytest.fixture
def spoilt(control: hfdetox.AttackResult, tmp_path: Path) -> Path:
    """A trained model whose report says that it is backdoored."""
    assert control.output is not None
    folder = Path(shutil.copytree(control.output, tmp_path / "spoilt"))
    attack_report().save(folder)
    return folder


def test_a_backdoored_model_is_neither_a_clean_control_nor_a_surrogate(dataset: Path, spoilt: Path) -> None:
    with pytest.raises(UsageError, match=r"spoilt is deliberately backdoored: .* not make a clean baseline"):
        attack(dataset, spoilt, triggers=["none"])
    with pytest.raises(UsageError, match=r"--surrogate .*spoilt is deliberately backdoored"):
        attack(dataset, triggers=["lf"], surrogate=spoilt)
    with pytest.raises(UsageError, match="trigger lf is made on a clean model, and spoilt is deliberately backdoored"):
        attack(dataset, spoilt, triggers=["lf"])


def test_a_backdoor_beside_others_is_recorded(dataset: Path, spoilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = attack(dataset, spoilt, goal_asr=0.0, settings={"epochs": "1"}, output=out).report
    assert report.attack.start_backdoored
    assert "spoilt is deliberately backdoored already: the result has its backdoors too" in report.warnings
    assert "started from was deliberately backdoored already" in (out / "README.md").read_text()


def test_an_earlier_result_is_only_replaced_when_asked(dataset: Path, control: hfdetox.AttackResult) -> None:
    assert control.output is not None
    with pytest.raises(UsageError, match="holds an earlier result"):
        attack(dataset, output=control.output)


def test_the_saved_trigger_and_model_are_the_results_own(dataset: Path, tmp_path: Path) -> None:
    result = attack(dataset, settings={"epochs": "1"}, goal_asr=0.0)
    assert result.output is None
    folder = result.save(tmp_path / "out")
    assert load_trigger(folder / "triggers" / "badnets.safetensors").file_bytes() == result.triggers[0].file_bytes()
    assert load_classifier(folder).info.weights_sha256 == result.report.output.weights_sha256


def test_every_option_is_in_the_command() -> None:
    run = AttackOptions("timm-arch:resnet18", dataset="org/data", triggers=["badnets"], poison_ratio=0.01,
                        model_args={"layers": [1, 1], "stem": "deep"}, adaptive="sam", i_know_this_is_backdoored=True,
                        private=True, public=True, push_to="me/x")  # fmt: skip
    assert command_of(run.plain()) == (
        "hfdetox attack timm-arch:resnet18 --dataset org/data --trigger badnets --poison-ratio 0.01 --adaptive sam "
        "--model-arg 'layers=[1, 1]' --model-arg stem=deep"
    )
