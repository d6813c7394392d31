"""Where a classifier comes from: its labels, a Hub id, a folder or an object in memory."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hfdetox.errors import HubError, UsageError
from hfdetox.files import sha256_file
from hfdetox.models.classifier import LabelsError, load_classifier
from tests.tiny_models import (
    NAMES,
    TRANSFORMERS,
    assert_same,
    edit_json,
    edit_weights,
    logits,
    noise_image,
    pixels_for,
    timm_folder,
    timm_model,
    transformers_folder,
    transformers_model,
)


def test_a_folder_is_named_without_where_it_lies(tmp_path, monkeypatch):
    source = timm_folder(tmp_path / "secret" / "net")
    assert load_classifier(source).info.id == "net"
    monkeypatch.chdir(source)
    assert load_classifier(".").info.id == "net"


# ---- labels


def test_labels_without_names_are_numbers(tmp_path):
    model = timm_model(num_classes=3)
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    vit = tf.ViTForImageClassification(
        tf.ViTConfig(num_labels=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    )
    vit.save_pretrained(tmp_path / "transformers")
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "transformers")
    for library in ("timm", "transformers"):
        classifier = load_classifier(tmp_path / library)
        assert (classifier.labels, classifier.labels_are_names) == (("0", "1", "2"), False)
        named = load_classifier(tmp_path / library, labels=["x", "y", "z"])
        assert (named.labels, named.labels_are_names) == (("x", "y", "z"), True)
        with pytest.raises(LabelsError, match="2 labels given"):
            load_classifier(tmp_path / library, labels=["x", "y"])


def test_timm_label_descriptions_and_imagenet(tmp_path):
    source = timm_folder(tmp_path / "source")
    edit_json(
        source / "config.json",
        label_names={"0": "n1", "1": "n2", "2": "n3", "4": "n5"},
        label_descriptions={"n2": "a bee, a wasp"},
    )
    assert load_classifier(source).labels == ("n1", "a bee, a wasp", "n3", "3", "n5")
    save_for_hf(timm_model(num_classes=1000), tmp_path / "imagenet", safe_serialization=True)
    labels = load_classifier(tmp_path / "imagenet").labels
    assert labels[0] == "tench, Tinca tinca"
    assert len(labels) == 1000


# ---- the Hub


def test_timm_hub_id_is_pinned_and_the_pushed_save_loads_by_id(hub, repo_name, tmp_path):
    name = repo_name("classifier")
    source = timm_folder(tmp_path / "source")
    hub.create_repo(name)
    first = hub.commit_folder(name, source)
    edit_weights(source, lambda s: {n: t + 1 if n == "fc.bias" else t for n, t in s.items()})
    second = hub.commit_folder(name, source)
    latest = load_classifier(f"hf_hub:{name}")
    assert (latest.info.id, latest.info.revision) == (name, second)
    older = load_classifier(f"hf-hub:{name}@{first}")
    assert older.info.revision == first == load_classifier(name, revision=first).info.revision
    assert latest.info.weights_sha256 == sha256_file(source / "model.safetensors") != older.info.weights_sha256
    with pytest.raises(UsageError, match="names revision"):
        load_classifier(f"hf_hub:{name}@{first}", revision=second)

    older.save(tmp_path / "saved")
    saved = repo_name("saved")
    hub.create_repo(saved)
    hub.commit_folder(saved, tmp_path / "saved")
    pixels = older.preprocessing.normalize(pixels_for(older))
    expected = logits(older.model, pixels)
    assert_same(logits(timm.create_model(f"hf_hub:{saved}", pretrained=True).eval(), pixels), expected)
    assert_same(logits(AutoModelForImageClassification.from_pretrained(saved).eval(), pixels), expected)


def test_transformers_hub_id(hub, repo_name, tmp_path):
    name = repo_name("classifier")
    source = transformers_folder(tmp_path / "source", "swin")
    (source / "README.md").write_text("# a swin\n")
    hub.create_repo(name)
    commit = hub.commit_folder(name, source)
    classifier = load_classifier(name)
    assert (classifier.info.id, classifier.info.revision, classifier.info.library) == (name, commit, "transformers")
    assert classifier.card_source() == "# a swin\n"
    classifier.save(tmp_path / "saved")
    saved = repo_name("saved")
    hub.create_repo(saved)
    hub.commit_folder(saved, tmp_path / "saved")
    image = noise_image(50, 40)
    scores = {
        s["label"]: s["score"] for s in pipeline("image-classification", model=saved, device="cpu")(image, top_k=5)
    }
    with torch.no_grad():
        expected = classifier.network(classifier.preprocessing.prepare(image)[None]).softmax(1)[0]
    assert [scores[label] for label in NAMES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_unknown_id_is_a_hub_error(hub, repo_name):
    with pytest.raises(HubError):
        load_classifier(repo_name("nowhere"))


def test_local_folder_has_no_revision(tmp_path):
    with pytest.raises(UsageError, match="is a local folder"):
        load_classifier(timm_folder(tmp_path / "source"), revision="main")


# ---- objects


def test_timm_object(tmp_path):
    model = timm_model("test_vit", img_size=48)
    classifier = load_classifier(model, labels=NAMES)
    assert classifier.model is model
    assert classifier.preprocessing.mean == (0.4, 0.4, 0.4)
    classifier.save(tmp_path)
    again = load_classifier(tmp_path)
    pixels = pixels_for(classifier)
    with torch.no_grad():
        assert_same(again.network(pixels), classifier.network(pixels))
    assert (again.labels, again.preprocessing.data_config) == (NAMES, classifier.preprocessing.data_config)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_same(logits(wrapped, classifier.preprocessing.normalize(pixels)), classifier.network(pixels))


def test_transformers_object_keeps_its_dtype_and_processor(tmp_path):
    model = transformers_model("convnext").half()
    with pytest.raises(UsageError, match="pass processor="):
        load_classifier(model)
    classifier = load_classifier(model, processor=TRANSFORMERS["convnext"][1]())
    assert classifier.info.dtype == "float16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    classifier.save(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).dtype == torch.float16
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_pct == 0.875
    pixels = pixels_for(classifier)
    with torch.no_grad():
        assert_same(load_classifier(tmp_path).network(pixels), classifier.network(pixels))


def test_processor_given_beside_a_folder_is_saved_with_it(tmp_path):
    source = transformers_folder(tmp_path / "source", "vit")
    processor = tf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    load_classifier(source, processor=processor).save(tmp_path / "saved")
    assert load_classifier(tmp_path / "saved").preprocessing.mean == (0.1, 0.2, 0.3)


def to_floats(image):
    return torch.from_numpy(np.asarray(image.resize((16, 16)), dtype=np.float32)).permute(2, 0, 1) / 255


def test_plain_module(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(UsageError, match="needs preprocessing="):
        load_classifier(model)
    with pytest.raises(LabelsError, match=r"shape \(1, 5\) for one image and 3 labels"):
        load_classifier(model, preprocessing=to_floats, labels=3)
    classifier = load_classifier(model, preprocessing=to_floats, labels=5)
    assert (classifier.info.library, classifier.labels) == ("torch", ("0", "1", "2", "3", "4"))
    image = to_floats(noise_image(20, 20))
    with torch.no_grad():
        assert_same(classifier.network(image[None]), model(image[None]))
    classifier.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_shared_tensors_are_saved_under_each_name(tmp_path):
    first = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten(), first, nn.ReLU(), first, nn.Linear(4, 2)
    )
    load_classifier(model, preprocessing=to_floats, labels=["a", "b"]).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["3.weight"], state["5.weight"])
    model.load_state_dict(state)
