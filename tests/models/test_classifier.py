"""Loading, rounding and saving classifiers; every saved folder is read back by the library that owns it."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hfdetox.errors import RunError, UsageError
from hfdetox.files import sha256_file
from hfdetox.models.classifier import load_classifier
from tests.tiny_models import (
    NAMES,
    TIMM,
    TRANSFORMERS,
    assert_same,
    edit_json,
    edit_weights,
    logits,
    make_folder,
    noise_image,
    own_library,
    pixels_for,
    timm_folder,
    timm_model,
    transformers_folder,
    transformers_model,
)

FOLDERS = [f"timm/{name}" for name in TIMM] + [f"transformers/{name}" for name in TRANSFORMERS]


# ---- round trips


@pytest.mark.parametrize("kind", FOLDERS)
def test_saved_folder_gives_the_same_logits_in_its_own_library(tmp_path, kind):
    source = make_folder(tmp_path / "source", kind)
    (source / "LICENSE").write_text("MIT")
    classifier = load_classifier(source)
    assert classifier.labels == NAMES
    assert classifier.labels_are_names
    pixels = classifier.preprocessing.normalize(pixels_for(classifier))
    assert_same(logits(classifier.model, pixels), logits(own_library(source, kind), pixels))

    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.add_(0.01)
    classifier.round_weights()
    sha256 = classifier.save(tmp_path / "saved")
    expected = logits(classifier.model, pixels)
    assert_same(logits(own_library(tmp_path / "saved", kind), pixels), expected)
    assert sha256 == sha256_file(tmp_path / "saved" / "model.safetensors")

    again = load_classifier(tmp_path / "saved")
    assert_same(logits(again.model, pixels), expected)
    assert again.info.weights_sha256 == sha256
    assert (again.labels, again.preprocessing.input_size) == (NAMES, classifier.preprocessing.input_size)
    assert (tmp_path / "saved" / "LICENSE").read_text() == "MIT"
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert all(torch.equal(t, before[n]) for n, t in after.items() if not t.is_floating_point())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_config_files_are_kept_byte_for_byte(tmp_path, family):
    source = transformers_folder(tmp_path / "source", family)
    edit_json(source / "config.json", a_key_of_the_author={"kept": True})
    load_classifier(source).save(tmp_path / "saved")
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", TIMM)
def test_saved_timm_folder_also_loads_with_transformers(tmp_path, name):
    source = make_folder(tmp_path / "source", f"timm/{name}")
    assert "num_classes" in json.loads((source / "config.json").read_text())["model_args"]
    classifier = load_classifier(source)
    classifier.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "num_classes" not in config.get("model_args", {})
    assert config["label_names"] == list(NAMES)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    pixels = classifier.preprocessing.normalize(pixels_for(classifier))
    assert_same(logits(wrapped, pixels), logits(classifier.model, pixels))
    assert wrapped.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize(
    "kind", ["timm/vit", "timm/resnet", "transformers/vit", "transformers/convnext", "transformers/swin"]
)
def test_pipeline_on_the_saved_folder_gives_the_networks_probabilities(tmp_path, kind):
    classifier = load_classifier(make_folder(tmp_path / "source", kind))
    classifier.save(tmp_path / "saved")
    image = noise_image(71, 50)
    scores = pipeline("image-classification", model=str(tmp_path / "saved"), device="cpu")(image, top_k=5)
    with torch.no_grad():
        expected = classifier.network(classifier.preprocessing.prepare(image)[None]).softmax(1)[0]
    found = {score["label"]: score["score"] for score in scores}
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_timm_wrapper_folder_round_trip(tmp_path):
    timm_saved = tmp_path / "timm"
    load_classifier(timm_folder(tmp_path / "source", "test_vit")).save(timm_saved)
    wrapper = tmp_path / "wrapper"
    AutoModelForImageClassification.from_pretrained(timm_saved).save_pretrained(wrapper)
    classifier = load_classifier(wrapper)
    assert (classifier.info.library, classifier.info.architecture) == (
        "transformers",
        "TimmWrapperForImageClassification",
    )
    pixels = pixels_for(classifier)
    with torch.no_grad():
        assert_same(classifier.network(pixels), load_classifier(timm_saved).network(pixels))
        for parameter in classifier.model.parameters():
            parameter.add_(0.01)
        classifier.save(tmp_path / "saved")
        expected = classifier.network(pixels)
        assert_same(load_classifier(tmp_path / "saved").network(pixels), expected)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(wrapper / "model.safetensors").keys()


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["timm/resnet", "transformers/vit", "transformers/resnet", "transformers/swin"])
def test_half_precision_source_trains_in_float32_and_is_saved_as_it_came(tmp_path, kind, dtype):
    classifier = load_classifier(make_folder(tmp_path / "source", kind, dtype))
    assert classifier.info.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.add_(1e-3)
    pixels = pixels_for(classifier)
    with torch.no_grad():
        unrounded = classifier.network(pixels)
        classifier.round_weights()
        rounded = classifier.network(pixels)
    assert not torch.equal(unrounded, rounded)
    classifier.save(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    normalized = classifier.preprocessing.normalize(pixels)
    assert_same(logits(own_library(tmp_path / "saved", kind), normalized), logits(classifier.model, normalized))
    if kind.startswith("transformers"):
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "saved").dtype == dtype


@pytest.mark.parametrize("kind", ["timm/vit", "transformers/vit"])
def test_each_tensor_keeps_its_own_dtype(tmp_path, kind):
    source = make_folder(tmp_path / "source", kind)
    edit_weights(source, lambda state: {n: t if "norm" in n or "query" in n else t.half() for n, t in state.items()})
    before = load_file(source / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.float32, torch.float16}
    classifier = load_classifier(source)
    assert classifier.info.dtype == "float16"
    classifier.round_weights()
    classifier.save(tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_value_beyond_the_sources_dtype_is_an_error(tmp_path):
    classifier = load_classifier(timm_folder(tmp_path / "source", dtype=torch.float16))
    with torch.no_grad():
        classifier.model.fc.weight[0, 0] = 70000.0
    with pytest.raises(RunError, match=r"fc.weight has values that float16, the source's dtype, cannot hold"):
        classifier.round_weights()
    with pytest.raises(RunError, match=r"fc.weight has values"):
        classifier.save(tmp_path / "saved")


# ---- network and saving


def test_network_is_the_model_behind_its_normalisation_even_under_autocast(tmp_path):
    classifier = load_classifier(timm_folder(tmp_path / "source"))
    pixels = pixels_for(classifier)
    expected = (pixels.float() / 255 - 0.4) / 0.2
    seen = []
    classifier.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        classifier.network(pixels)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert list(classifier.network.state_dict()) == [f"model.{name}" for name in classifier.model.state_dict()]


@pytest.mark.parametrize(
    ("kind", "convolutional"),
    [("timm/resnet", True), ("timm/convnext", True), ("timm/efficientnet", True), ("timm/vit", False),
     ("transformers/resnet", True), ("transformers/convnext", True), ("transformers/swin", False),
     ("transformers/mobilevit", False)],
)  # fmt: skip
def test_convolutional_networks_are_told_from_the_others(kind, convolutional):
    library, name = kind.split("/")
    model = timm_model(TIMM[name][0]) if library == "timm" else transformers_model(name)
    options = {} if library == "timm" else {"processor": TRANSFORMERS[name][1]()}
    assert load_classifier(model, **options).network.convolutional is convolutional


def test_loading_and_saving_write_nothing_to_the_screen(tmp_path, capfd):
    source = transformers_folder(tmp_path / "source", "vit")
    capfd.readouterr()
    load_classifier(source).save(tmp_path / "saved")
    edit_weights(source, lambda state: state | {"stranger.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"unexpected: stranger.weight"):
        load_classifier(source)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["timm/resnet", "transformers/vit"])
def test_full_disk_is_a_run_error(tmp_path, kind):
    classifier = load_classifier(make_folder(tmp_path / "source", kind))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write the model to .*saved.*free some space"):
            classifier.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shutil.rmtree(tmp_path / "saved")
    classifier.save(tmp_path / "saved")


@pytest.mark.parametrize(("card", "said"), [
    ("---\nlicense: [mit\n---\n# x\n", "cannot be read"), ("---\nlicense: mit\nlicense: gpl\n---\n", "is there twice"),
    ("---\nlicense: mit\n# no end\n", "no line --- at its end"), ("---\na: !!python/name:x y\n---\n", "cannot be read"),
    ("\ufeff---\nlicense: {a: 1}\n---\n", "no text"), ("---\nlicense: 3\n---\n", "is 3, no text"),
    ("---\nlicense: [mit, 2]\n---\n", "no text"),
])  # fmt: skip
def test_a_card_whose_licence_cannot_be_read_is_said(tmp_path, card, said):
    source = timm_folder(tmp_path / "m")
    (source / "README.md").write_text(card)
    (line,) = load_classifier(source).warnings
    assert "README.md" in line
    assert said in line
    assert line.endswith("of the licence is not taken over; see to that before you publish")


@pytest.mark.parametrize("card", ["", "# x\n", "---\nlicense: mit\n---\n", "---\nlicense:\n---\n", "---\n\ntext",
                                  "---\nlicense: [mit, gpl]\n---\n", "\ufeff---\nlicense: mit\n---\n"])  # fmt: skip
def test_a_card_that_can_be_read_is_not(tmp_path, card):
    source = timm_folder(tmp_path / "m")
    (source / "README.md").write_text(card)
    assert load_classifier(source).warnings == ()
