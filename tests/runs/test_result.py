"""The result: what is saved loads as it was, or nothing is written; the picture strip of any size of set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hfdetox.config import DetoxOptions
from hfdetox.data.cache import Pixels
from hfdetox.errors import RunError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import TriggerView
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.runs.folder import RunFolder
from hfdetox.runs.pictures import draw_moved, draw_strip
from hfdetox.runs.result import Artifacts, DetoxResult, save_result
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import BadNets
from tests.reporting.test_report import full_report
from tests.tiny_models import REMOTE_CODE, edit_json, timm_model, transformers_folder
from tests.tiny_training import toy_preprocessing, toy_set


def result_of(classifier: Classifier) -> DetoxResult:
    """Return a result of the classifier with a probe of two grey images."""
    channels, height, width = classifier.preprocessing.input_size
    images = [Image.new("RGB", (width, height), (level,) * 3) for level in (40, 200)]
    probe = torch.stack([classifier.preprocessing.prepare(image) for image in images])
    assert probe.shape == (2, channels, height, width)
    return DetoxResult(full_report(), classifier, Artifacts(probe=probe))


def test_a_model_with_its_own_code_is_checked_and_saved(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path / "source", "vit")
    (source / "strange.py").write_text(REMOTE_CODE)
    auto_map = {"AutoModelForImageClassification": "strange.Strange"}
    edit_json(source / "config.json", architectures=["Strange"], auto_map=auto_map)
    classifier = load_classifier(source, trust_remote_code=True)
    assert (result_of(classifier).save(tmp_path / "out") / "strange.py").is_file()


def test_a_preprocessing_of_the_callers_is_used_for_the_check(tmp_path: Path) -> None:
    def halve(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 510

    model = timm_model()
    classifier = load_classifier(model, preprocessing=halve, labels=model.num_classes)
    assert (result_of(classifier).save(tmp_path / "out") / "model.safetensors").is_file()


def test_a_model_that_does_not_load_as_it_was_is_not_written(tmp_path: Path) -> None:
    result = result_of(load_classifier(timm_model()))
    # what the file cannot know: the network in memory sees other pixels
    result.classifier.network.mean.add_(1.0)
    with pytest.raises(RunError, match="does not give the logits of the one in memory"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_who_may_read_the_folder_is_the_umasks_business(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        output = result_of(load_classifier(timm_model())).save(tmp_path / "out")
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o777 & ~umask
    for name in ("config.json", "model.safetensors"):
        assert (output / name).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_saving_leaves_the_callers_model_where_and_as_it_is(device: str, tmp_path: Path) -> None:
    model = timm_model()
    result = result_of(load_classifier(model))
    model.to(device).train()
    model.get_classifier().eval()
    modes = [part.training for part in model.modules()]
    assert set(modes) == {True, False}
    result.save(tmp_path / "out")
    assert [part.training for part in model.modules()] == modes
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("max_bytes", [2**31, 0], ids=["cached", "on demand"])
def test_the_strip_shows_the_same_images_however_they_are_kept(max_bytes: int) -> None:
    images, preprocessing, trigger = toy_set(24), toy_preprocessing(), BadNets(size=8, value=255)
    clean = Pixels(images, preprocessing, max_bytes=max_bytes)
    assert (clean.images is None) == (max_bytes == 0)
    positions = clean.without_label(0)
    triggered = Pixels(images, preprocessing, trigger, positions=positions, max_bytes=max_bytes)
    view = TriggerView(trigger, 0, triggered, classes=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    classifier = load_classifier(model, preprocessing=preprocessing, labels=["a", "b", "c", "d"])
    evaluation = Evaluator(classifier, make_accelerator("cpu", "no"), clean, [view], progress=False)
    outcome = evaluation.measure("measure")
    rows = draw_strip(evaluation, outcome, outcome)
    assert [row.title for row in rows] == ["Clean images", "Trigger badnets"]
    for row in rows:
        assert row.images.dtype == np.uint8
        assert row.images.shape[1:] == (8, 8, 3)
        assert len(row.images) == len(row.labels) == len(row.before) == len(row.after) > 0
        assert "a" not in row.labels
    # a patch of 8 at 32 pixels is 2×2 at 8
    assert (rows[1].images[:, -2:, -2:] == 255).all()
    assert (rows[0].images[:, :-2] == rows[1].images[:, :-2]).all()


def test_of_the_images_that_moved_each_class_shows_the_one_that_moved_most() -> None:
    rows = 12
    model, preprocessing = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), toy_preprocessing()
    clean = Pixels(toy_set(rows), preprocessing)
    classifier = load_classifier(model, preprocessing=preprocessing, labels=["a", "b", "c", "d"])
    evaluation = Evaluator(classifier, make_accelerator("cpu", "no"), clean, [], progress=False)
    before = evaluation.measure("measure")
    truth, moved = clean.labels.numpy(), [0, 2, 3, 5, 6, 7, 9, 10]
    predicted, losses = before.predicted.copy(), before.losses.copy()
    predicted[moved] = (predicted[moved] + 1) % 4
    after = replace(before, predicted=predicted, losses=losses)
    # how far each went: the probability of its class was 1
    far = np.array([0.1, 0.9, 0.5, 0.3, 0.99, 0.2, 0.4, 0.6, 0.95, 0.7, 0.05, 0.9])
    before = replace(before, losses=np.zeros(rows))
    after = replace(after, losses=-np.log(1 - far))
    by_distance = sorted(moved, key=lambda place: -far[place])
    firsts = [place for place in by_distance
              if place == next(other for other in by_distance if truth[other] == truth[place])]  # fmt: skip
    wanted = [*firsts, *(place for place in by_distance if place not in firsts)][:6]
    [row] = draw_moved(evaluation, before, after)
    positions = clean.positions[wanted].tolist()
    assert (row.images == clean.pictures(positions)[1]).all()
    assert list(row.labels) == ["abcd"[truth[place]] for place in wanted]
    assert draw_moved(evaluation, before, before) == []


def test_a_result_that_cannot_be_written_keeps_the_run_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    output, run = tmp_path / "file" / "out", RunFolder(tmp_path / "out.run")
    run.begin(DetoxOptions("org/model", dataset="org/data"), [])
    result = DetoxResult(full_report(), load_classifier(timm_model()), Artifacts())
    with pytest.raises(RunError, match=rf"cannot write .*; the run is kept, go on with: hfdetox --resume {run.path}$"):
        save_result(result, DetoxOptions("org/model", dataset="org/data", output=output), run)
    assert (run.path / "run.json").is_file()
