"""Loading, refusing, rounding and saving classifiers; every saved folder is read back by the library that owns it."""

from __future__ import annotations

import json
import resource
import shutil

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hfdetox.checksums import sha256_file
from hfdetox.errors import HubError, RunError, UsageError
from hfdetox.hub import PickleOnlyError
from hfdetox.models import LabelsError, NotAClassifierError, load_classifier
from hfdetox.preprocessing import PreprocessingError
from tests.tiny_models import (
    NAMES,
    TRANSFORMERS,
    noise_image,
    timm_folder,
    timm_model,
    transformers_folder,
    transformers_model,
)

TIMM = {
    "resnet": ("test_resnet", {}),
    "grey": ("test_resnet", {"in_chans": 1}),
    "vit": ("test_vit", {}),
    "vit-img-size": ("test_vit", {"img_size": 48}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
}
FOLDERS = [f"timm/{name}" for name in TIMM] + [f"transformers/{name}" for name in TRANSFORMERS]


def make_folder(path, kind, dtype=torch.float32):
    library, name = kind.split("/")
    if library == "timm":
        architecture, options = TIMM[name]
        return timm_folder(path, architecture, dtype, **options)
    return transformers_folder(path, name, dtype)


def own_library(folder, kind):
    """Load a folder with the call that its library documents, in float32."""
    if kind.startswith("timm"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, pixels):
    output = model(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(found, expected):
    # the tensors are compared bit by bit elsewhere; a loader's memory alignment may choose another convolution kernel
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def pixels_for(classifier):
    return torch.randint(
        0, 256, (3, *classifier.preprocessing.input_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    save_file(edit(state), folder / "model.safetensors", metadata={"format": "pt"})


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
    assert "num_classes" not in config["model_args"]
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


# ---- strictness


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("timm/resnet", "fc"),
        ("timm/vit", "head"),
        ("transformers/vit", "classifier"),
        ("transformers/resnet", "classifier.1"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, kind, head):
    source = make_folder(tmp_path / "source", kind)
    whole = (source / "model.safetensors").read_bytes()
    edits = {
        rf"missing: {head}.weight": lambda s: {n: t for n, t in s.items() if n != f"{head}.weight"},
        r"unexpected: stranger.weight": lambda s: {**s, "stranger.weight": torch.zeros(2)},
        rf"of another shape: {head}.weight \(6, \d+\) instead of \(5, \d+\)": lambda s: {
            **s, f"{head}.weight": torch.zeros(6, s[f"{head}.weight"].shape[1])
        },
    }  # fmt: skip
    for message, edit in edits.items():
        (source / "model.safetensors").write_bytes(whole)
        edit_weights(source, edit)
        with pytest.raises(UsageError, match=message):
            load_classifier(source)


def test_checkpoint_with_a_background_class_is_converted_by_timm_and_saved_native(tmp_path):
    source = timm_folder(tmp_path / "source")
    native = load_file(source / "model.safetensors")
    background = {"fc.weight": torch.ones(1, 96), "fc.bias": torch.ones(1)}
    edit_weights(source, lambda s: s | {n: torch.cat([b, s[n]]) for n, b in background.items()})
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"]["label_offset"] = 1
    (source / "config.json").write_text(json.dumps(config))
    classifier = load_classifier(source)
    assert torch.equal(classifier.model.fc.weight, native["fc.weight"])
    classifier.save(tmp_path / "saved")
    assert torch.equal(own_library(tmp_path / "saved", "timm").fc.weight, native["fc.weight"])


def test_tables_that_the_model_computes_are_not_unexpected(tmp_path):
    source = transformers_folder(tmp_path / "source", "swin")
    table = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    load = load_file(source / "model.safetensors")
    assert table not in load
    save_file(load | {table: torch.zeros(16, 16, dtype=torch.int64)}, source / "model.safetensors", {"format": "pt"})
    load_classifier(source).save(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load.keys()

    config = tf.Swinv2Config(image_size=32, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    tf.Swinv2ForImageClassification(config).save_pretrained(tmp_path / "v2")
    shutil.copy(source / "preprocessor_config.json", tmp_path / "v2")
    tables = {
        f"swinv2.encoder.layers.0.blocks.0.attention.self.relative_{n}": torch.zeros(4)
        for n in ("coords_table", "position_index")
    }
    edit_weights(tmp_path / "v2", lambda state: state | tables)
    load_classifier(tmp_path / "v2")
    edit_weights(tmp_path / "v2", lambda state: state | {"swinv2.relative_something": torch.zeros(4)})
    with pytest.raises(UsageError, match=r"unexpected: swinv2.relative_something"):
        load_classifier(tmp_path / "v2")


def test_loading_and_saving_write_nothing_to_the_screen(tmp_path, capfd):
    source = transformers_folder(tmp_path / "source", "vit")
    capfd.readouterr()
    load_classifier(source).save(tmp_path / "saved")
    edit_weights(source, lambda state: state | {"stranger.weight": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"unexpected: stranger.weight"):
        load_classifier(source)
    assert capfd.readouterr() == ("", "")


def test_adapter_is_refused(tmp_path):
    source = transformers_folder(tmp_path / "source", "vit")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter on another model"):
        load_classifier(source)


def test_pickles_are_never_read(tmp_path):
    source = timm_folder(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"not read")
    load_classifier(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(PickleOnlyError, match=r"weights only as pickle \(pytorch_model.bin\), which can run any code"):
        load_classifier(source)


@pytest.mark.parametrize("kind", ["timm/resnet", "transformers/vit"])
def test_file_that_is_no_safetensors_is_refused(tmp_path, kind):
    source = make_folder(tmp_path / "source", kind)
    (source / "model.safetensors").write_bytes(b"\x80\x04" * 200)
    with pytest.raises(UsageError, match=r"model.safetensors is not a safetensors file"):
        load_classifier(source)


def test_sharded_source(tmp_path):
    source = transformers_folder(tmp_path / "source", "vit")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, source / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, part in shards.items() for n in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    classifier = load_classifier(source)
    classifier.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[n], t) for n, t in state.items())
    (source / next(iter(shards))).unlink()
    with pytest.raises(UsageError, match=r"lacks model-00001-of-00002.safetensors"):
        load_classifier(source)


@pytest.mark.parametrize("content", ['{"metadata": {}}', "[]", '{"weight_map": ["model"]}', '{"weight_map": {"a": 1}}',
                                     '{"weight_map": {}}', "{"])  # fmt: skip
def test_an_index_that_is_none_is_one_line(tmp_path, content):
    source = transformers_folder(tmp_path / "source", "vit")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UsageError, match=r"model.safetensors.index.json (has no weight_map|is not)") as caught:
        load_classifier(source)
    assert "\n" not in str(caught.value)


def test_a_folder_is_named_without_where_it_lies(tmp_path, monkeypatch):
    source = timm_folder(tmp_path / "secret" / "net")
    assert load_classifier(source).info.id == "net"
    monkeypatch.chdir(source)
    assert load_classifier(".").info.id == "net"


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification model; hfdetox handles one label"),
        ({"problem_type": "regression"}, "is a regression model"),
        ({"id2label": {"0": "only"}, "label2id": {"only": 0}}, "has a single output"),
        ({"architectures": ["ViTModel"]}, "not an image classifier but a ViTModel"),
        ({"model_type": "bert"}, r"not an image classifier \(model type bert\)"),
        ({"model_type": "no-such-type"}, "cannot read the config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantized"),
    ],
)
def test_transformers_model_that_is_no_single_label_classifier_is_refused(tmp_path, changes, message):
    source = transformers_folder(tmp_path / "source", "vit")
    edit_json(source / "config.json", **changes)
    with pytest.raises(UsageError, match=message):
        load_classifier(source)


@pytest.mark.parametrize(("num_classes", "message"), [(0, "no classification head"), (1, "a single output")])
def test_timm_model_without_two_outputs_is_refused(tmp_path, num_classes, message):
    with pytest.raises(NotAClassifierError, match=message):
        load_classifier(timm_folder(tmp_path / "source", num_classes=num_classes))


def test_folder_of_no_library_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"has no config.json"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="neither architecture nor model_type"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_net"}')
    with pytest.raises(UsageError, match=r"timm .* cannot build .*no_such_net"):
        load_classifier(tmp_path)


def test_missing_processor_and_wrong_input_size(tmp_path):
    source = transformers_folder(tmp_path / "source", "vit")
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(PreprocessingError, match=r"no usable preprocessor_config.json"):
        load_classifier(source)
    tf.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(source)
    with pytest.raises(UsageError, match="does not take the 3×48×48 images of its own preprocessing"):
        load_classifier(source)


REMOTE_CODE = """
import os
from transformers import ViTForImageClassification
os.environ["REMOTE_CODE_RAN"] = "yes"
class Strange(ViTForImageClassification):
    def forward(self, pixel_values, **options):
        output = super().forward(pixel_values, **options)
        output.logits = output.logits * 3
        return output
"""


def test_remote_code_runs_only_when_trusted(tmp_path, monkeypatch):
    monkeypatch.delenv("REMOTE_CODE_RAN", raising=False)
    source = transformers_folder(tmp_path / "source", "vit")
    plain = load_classifier(source)
    (source / "strange.py").write_text(REMOTE_CODE)
    edit_json(
        source / "config.json",
        architectures=["Strange"],
        auto_map={"AutoModelForImageClassification": "strange.Strange"},
    )
    with pytest.raises(UsageError):
        load_classifier(source)
    import os

    assert "REMOTE_CODE_RAN" not in os.environ
    classifier = load_classifier(source, trust_remote_code=True)
    assert os.environ["REMOTE_CODE_RAN"] == "yes"
    pixels = pixels_for(plain)
    with torch.no_grad():
        torch.testing.assert_close(classifier.network(pixels), 3 * plain.network(pixels))
    classifier.save(tmp_path / "saved")
    again = load_classifier(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert_same(again.network(pixels), classifier.network(pixels))


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
