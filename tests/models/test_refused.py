"""What is no whole image classifier is refused: weights that do not fit, pickles, other tasks, untrusted code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hfdetox.errors import UsageError
from hfdetox.hub.download import PickleOnlyError
from hfdetox.models.classifier import load_classifier
from hfdetox.models.loaded import NotAClassifierError
from hfdetox.models.preprocessing import PreprocessingError
from hfdetox.models.weights import read_json
from tests.tiny_models import (
    REMOTE_CODE,
    assert_same,
    edit_json,
    edit_weights,
    make_folder,
    own_library,
    pixels_for,
    timm_folder,
    transformers_folder,
    transformers_model,
)

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
    native = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
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
    edit_weights(source, lambda s: {n: t for n, t in s.items() if n != table})
    load = load_file(source / "model.safetensors")
    save_file(load | {table: torch.zeros(16, 16, dtype=torch.int64)}, source / "model.safetensors", {"format": "pt"})
    load_classifier(source).save(tmp_path / "saved")
    written = {table} & transformers_model(
        "swin"
    ).state_dict().keys()  # the first transformers 5 write it by themselves
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load.keys() | written

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


FIELDS = [
    ("timm", {"label_names": ["a", ["b"], "c"]}, r"label_names(\[1\])? must be"),
    ("timm", {"label_names": 3}, "label_names must be"),
    ("timm", {"pretrained_cfg": []}, "pretrained_cfg must be a mapping"),
    ("timm", {"model_args": [1]}, "model_args must be"),
    ("timm", {"num_classes": "5"}, "num_classes must be a whole number, got '5'"),
    ("timm", {"num_classes": 10**12}, "num_classes must be .* got 1000000000000, not one from 0 to 1000000"),
    ("timm", {"num_classes": -5}, "got -5, not one from 0"),
    ("timm", {"pretrained_cfg.num_classes": 10**12}, "pretrained_cfg.num_classes must be a whole number, got 1"),
    ("vit", {"num_labels": 10**12}, "num_labels must be a whole number, got 1"),
    ("timm", {"pretrained_cfg.mean": [0.5, "x", 0.5]}, r"pretrained_cfg.mean\[1\] must be a number"),
    ("timm", {"pretrained_cfg.mean": []}, "pretrained_cfg.mean must be one number a channel"),
    ("timm", {"pretrained_cfg.std": [0.5, 0, 0.5]}, r"pretrained_cfg.std\[1\] must be above 0"),
    ("timm", {"pretrained_cfg.input_size": [3, [32], 32]}, r"pretrained_cfg.input_size\[1\] must be a whole number"),
    ("timm", {"pretrained_cfg.input_size": [3, 32]}, "pretrained_cfg.input_size must be channels, height and width"),
    ("timm", {"pretrained_cfg.input_size": [3, 10**9, 32]}, "from 1 to 4096"),
    ("timm", {"pretrained_cfg.interpolation": "NaN"}, "NaN"),
    ("timm", {"pretrained_cfg.crop_pct": -1}, "crop_pct must be"),
    ("timm", {"architecture": ["resnet18"]}, "architecture must be text"),
    # the first transformers 5 check no types, and stumble over them
    ("vit", {"image_size": "32"}, "image_size|unsupported operand"),
    ("vit", {"hidden_size": 32.0}, "hidden_size must be a whole number"),
    ("vit", {"id2label": ["a", "b"]}, "id2label must be a mapping"),
    ("vit", {"architectures": 3}, "architectures must be a list"),
    *[
        (
            kind,
            {field: dict.fromkeys(keys, "a")},
            f"{field.rpartition('.')[2]} must have the whole numbers 0 to {len(keys) - 1} as keys",
        )
        for keys in (["x", "y"], ["1", "2", "3"], ["0", "2", "5"], ["0", "00"], ["0", "1", "-1"], ["0", "1.0"])
        for kind, field in (("vit", "id2label"), ("timm", "label_names"), ("timm", "pretrained_cfg.label_names"))
    ],
    ("vit", {"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
    ("vit", {"model_type": {"a": 1}}, "model_type must be text"),
    ("vit", {"hidden_dropout_prob": [1]}, "hidden_dropout_prob|not supported between"),
    ("vit", {"problem_type": 3}, "problem_type must be text"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), FIELDS)
def test_a_field_of_a_wrong_type_is_named(kind, changes, said, tmp_path):
    source = timm_folder(tmp_path / "m") if kind == "timm" else transformers_folder(tmp_path / "m", "vit")
    config = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        holder, _, name = key.rpartition(".")
        (config[holder] if holder else config)[name] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=said) as caught:
        load_classifier(source)
    assert "config.json" in str(caught.value) or "transformers" in str(caught.value)


@pytest.mark.parametrize(("kind", "changes"), [
    ("timm/vit", {"model_args": {"embed_dim": 12_000}}), ("timm/vit", {"model_args": {"depth": 50_000}}),
    ("timm/vit", {"model_args": {"mlp_ratio": 9000}}),
    ("transformers/vit", {"hidden_size": 12_000}), ("transformers/vit", {"num_hidden_layers": 50_000}),
    ("transformers/vit", {"intermediate_size": 10**7}), ("transformers/vit", {"image_size": 10**6}),
])  # fmt: skip
def test_a_network_far_larger_than_its_weights_is_refused_before_it_fills_the_memory(kind, changes, tmp_path):
    source = make_folder(tmp_path / "m", kind)
    config = json.loads((source / "config.json").read_text())
    given = config.get("model_args", {}) | changes.pop("model_args", {})
    edit_json(source / "config.json", **({"model_args": given} if given else {}), **changes)
    with pytest.raises(
        UsageError, match=r"config.json of .* a network of more than [\d,]+ parameters, and its weights"
    ):
        load_classifier(source)


def test_a_loaded_models_label_names_have_every_number(tmp_path):
    model = transformers_model("vit")
    model.config.id2label = {0: "a", 1: "b", 5: "c"}
    processor = tf.AutoImageProcessor.from_pretrained(transformers_folder(tmp_path / "m", "vit"))
    with pytest.raises(UsageError, match=r"the config of ViT\w+: id2label must have .* got '0', '1', '5'"):
        load_classifier(model, processor=processor)


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"{", b"[" * 50_000, b'{"size": ' + b"9" * 5000 + b"}", b"\xff"])
def test_a_processors_configuration_that_is_none_is_one_line(content, tmp_path):
    source = transformers_folder(tmp_path / "source", "vit")
    (source / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json is not a JSON object"):
        load_classifier(source)


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
    with pytest.raises(
        PickleOnlyError, match=r"weights only as a pickle \(pytorch_model.bin\), which can run its author"
    ):
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


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"is not JSON|is not a JSON object"):
        read_json(tmp_path / "config.json")


SIGLIP2 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
           "num_patches": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "processor", "taken"),
    [
        (tf.ImageGPTConfig(n_embd=16, n_layer=1, n_head=2), tf.ImageGPTImageProcessor(), "colours as a row"),
        (tf.Siglip2Config(vision_config=SIGLIP2), tf.Siglip2ImageProcessor(), "patches of any number"),
    ],
    ids=["imagegpt", "siglip2"],
)
def test_models_that_take_no_pixels_say_so(tmp_path, config, processor, taken):
    config.num_labels = 5
    tf.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(NotAClassifierError, match=rf"takes {taken}.*; hfdetox handles models that take pixels of one"):
        load_classifier(tmp_path)


@pytest.mark.skipif(not hasattr(tf, "PPLCNetForImageClassification"), reason="needs a newer transformers")
def test_logits_by_the_name_of_features(tmp_path):
    tf.PPLCNetForImageClassification(tf.PPLCNetConfig(scale=0.25, num_labels=5)).save_pretrained(tmp_path)
    square = {"height": 32, "width": 32}
    tf.ViTImageProcessor(size=square).save_pretrained(tmp_path)
    assert load_classifier(tmp_path).network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)


def test_logits_beside_auxiliary_ones(tmp_path):
    inception = timm.create_model("inception_v3", num_classes=5, aux_logits=True,
                                  pretrained_cfg_overlay={"input_size": (3, 299, 299)})  # fmt: skip
    classifier = load_classifier(inception)
    assert classifier.network.train()(torch.zeros(2, 3, 299, 299, dtype=torch.uint8)).shape == (2, 5)


@pytest.mark.parametrize(("kind", "changes"), [
    ("vit", {"hidden_act": "nope"}), ("vit", {"patch_size": 0}), ("vit", {"layer_norm_eps": "small"}),
    ("timm", {"model_args": {"act_layer": "nope"}}), ("timm", {"model_args": {"nope": 1}}),
    ("timm", {"architecture": "nope"}), ("timm", {"model_args": {"norm_layer": "nope"}}),
])  # fmt: skip
def test_what_a_library_raises_over_a_configuration_has_advice(kind, changes, tmp_path):
    source = timm_folder(tmp_path / "m") if kind == "timm" else transformers_folder(tmp_path / "m", "vit")
    edit_json(source / "config.json", **changes)
    with pytest.raises(UsageError, match="; mend its config") as caught:
        load_classifier(source)
    assert not re.search(r": '?\w+'?;", str(caught.value))
