"""Where an attack starts: architectures, bare configs, trained models; and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.models.initial import InitialModel, init_model
from hfdetox.models.layers import head_layers
from hfdetox.runs.publish import comes_backdoored
from tests.tiny_models import (
    NAMES,
    TRANSFORMERS,
    assert_same,
    edit_weights,
    make_folder,
    pixels_for,
    timm_folder,
    timm_model,
    transformers_folder,
    transformers_model,
)

CLASSES = ("left", "right", "up")


def start(model: Any, **options: Any) -> InitialModel:
    """Open a start for a dataset of CLASSES."""
    return init_model(model, class_names=lambda: CLASSES, is_backdoored=comes_backdoored, **options)


def weights(opened: InitialModel) -> list[torch.Tensor]:
    """Return all weights."""
    return [tensor.clone() for tensor in opened.classifier.model.state_dict().values()]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {}),
        ("test_vit", {"patch_size": 4, "depth": 2}),
        ("test_convnext", {}),
        ("resnet18", {"layers": [1, 1, 1, 1], "in_chans": 1}),
    ],
)
def test_a_new_architecture_is_saved_and_loaded_as_it_is(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    opened = start(f"timm-arch:{name}", model_args=arguments, input_size=32)
    assert opened.from_scratch
    classifier = opened.classifier
    assert classifier.labels == CLASSES
    assert classifier.preprocessing.input_size == (arguments.get("in_chans", 3), 32, 32)
    assert (classifier.info.id, classifier.info.weights_sha256) == (f"timm-arch:{name}", None)
    classifier.save(tmp_path / "saved")
    again = load_classifier(tmp_path / "saved")
    images = torch.arange(2 * classifier.preprocessing.input_size[0] * 32 * 32) % 256
    images = images.view(2, *classifier.preprocessing.input_size).to(torch.uint8)
    with torch.inference_mode():
        assert torch.equal(again.network(images), classifier.network(images))
    assert again.labels == CLASSES
    assert again.preprocessing.input_size == classifier.preprocessing.input_size


def test_images_are_shown_whole_and_mean_and_std_are_the_architectures_own() -> None:
    import timm

    config = timm.models.get_pretrained_cfg("resnet18")
    assert config is not None
    preprocessing = start(
        "timm-arch:resnet18", model_args={"layers": [1, 1, 1, 1]}, input_size=32
    ).classifier.preprocessing
    assert preprocessing.mean == config.mean
    assert preprocessing.std == config.std
    assert preprocessing.data_config["crop_pct"] == 1.0  # type: ignore[attr-defined]


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (start("timm-arch:test_resnet", input_size=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def headless(folder: Path, kind: str) -> Path:
    """Write a backbone alone, as it is published: of timm without classes, of transformers the inner model."""
    if kind.startswith("timm"):
        return timm_folder(folder, "test_vit", num_classes=0)
    transformers_model("vit").base_model.save_pretrained(folder)
    TRANSFORMERS["vit"][1]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "bare"),
    [("timm/resnet", False), ("timm/vit", False), ("timm/vit", True), ("timm/convnext", False),
     ("transformers/vit", False), ("transformers/vit", True), ("transformers/resnet", False),
     ("transformers/swin", False), ("transformers/mobilevit", False)],
)  # fmt: skip
def test_a_new_head_stands_on_the_trained_weights(kind: str, bare: bool, tmp_path: Path) -> None:
    folder = headless(tmp_path / "model", kind) if bare else make_folder(tmp_path / "model", kind)
    trained = timm_model("test_vit", num_classes=0) if bare and kind == "timm/vit" else (
        transformers_model("vit") if bare else load_classifier(folder).model)  # fmt: skip
    before = trained.state_dict()
    opened, again, other = (start(folder, init="head", seed=seed) for seed in (1, 1, 2))
    assert (opened.from_scratch, opened.new_head, opened.trained) == (False, True, False)
    classifier = opened.classifier
    assert (classifier.labels, len(head_layers(classifier.model))) == (CLASSES, 1)
    (head,) = head_layers(classifier.model)
    state = classifier.model.state_dict()
    assert state[f"{head}.weight"].shape[0] == len(CLASSES)
    kept = [name for name in state if name.rpartition(".")[0] != head]
    assert len(kept) == len(state) - 2
    assert all(torch.equal(state[name], before[name]) for name in kept)
    assert all(torch.equal(a, b) for a, b in zip(weights(opened), weights(again), strict=True))
    weight = other.classifier.model.state_dict()[f"{head}.weight"]
    assert not torch.equal(weight, state[f"{head}.weight"])
    classifier.save(tmp_path / "saved")
    loaded = load_classifier(tmp_path / "saved")
    assert loaded.labels == CLASSES
    with torch.inference_mode():
        assert_same(loaded.network(pixels_for(loaded)), classifier.network(pixels_for(classifier)))


def test_a_head_of_as_many_classes_is_drawn_too(tmp_path: Path) -> None:
    for kind, head in (("timm/resnet", "fc"), ("transformers/vit", "classifier")):
        folder = make_folder(tmp_path / kind, kind)
        opened = init_model(folder, class_names=lambda: NAMES, is_backdoored=comes_backdoored, init="head")
        found = opened.classifier.model.get_parameter(f"{head}.weight")
        assert not torch.equal(found, load_file(folder / "model.safetensors")[f"{head}.weight"])


def test_a_new_head_needs_the_weights_below_it(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "vit", "vit")
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if "layer.1" not in k})
    with pytest.raises(UsageError, match=r"do not fit its config.json \(missing: vit\..*layers?\.1\."):
        start(folder, init="head")
    with pytest.raises(UsageError, match="is an architecture without trained weights; leave --init out"):
        start("timm-arch:test_resnet", init="head")
    with pytest.raises(UsageError, match="--init head draws weights of a folder or Hub id; a loaded model has its own"):
        start(timm_model(), init="head")


def test_classes_without_names_are_numbered() -> None:
    opened = init_model("timm-arch:test_resnet", class_names=lambda: 4, is_backdoored=comes_backdoored, input_size=32)
    assert opened.classifier.labels == ("0", "1", "2", "3")
    assert not opened.classifier.labels_are_names


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_bare_config_needs_init_random_and_gets_the_datasets_classes(library: str, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m") if library == "timm" else transformers_folder(tmp_path / "m", "vit")
    trained = load_classifier(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has a config\.json and no weights; draw them with --init random"):
        start(folder)
    opened = start(folder, init="random")
    assert opened.from_scratch
    assert opened.classifier.labels == CLASSES
    assert opened.classifier.preprocessing.input_size == trained.preprocessing.input_size
    opened.classifier.save(tmp_path / "saved")
    assert load_classifier(tmp_path / "saved").labels == CLASSES


def test_a_full_folder_is_a_trained_model_unless_its_weights_are_drawn_anew(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m")
    trained = start(folder)
    assert not trained.from_scratch
    assert trained.classifier.labels == NAMES
    drawn = start(folder, init="random")
    kept, fresh = weights(trained)[0], weights(drawn)[0]
    assert kept.shape == fresh.shape
    assert not torch.equal(kept, fresh)


def test_a_config_alone_on_the_hub_is_enough(hub: Any, repo_name: Any, tmp_path: Path) -> None:
    name = repo_name()
    folder = timm_folder(tmp_path / "m")
    hub.create_repo(name)
    commit = hub.commit(name, {"config.json": (folder / "config.json").read_bytes()})
    opened = start(name, init="random")
    assert (opened.classifier.info.id, opened.classifier.info.revision) == (name, commit)
    assert opened.classifier.labels == CLASSES


def test_the_card_of_a_hub_model_says_that_it_is_backdoored(hub: Any, repo_name: Any, tmp_path: Path) -> None:
    name = repo_name()
    folder = timm_folder(tmp_path / "m")
    hub.create_repo(name)
    files = {file: (folder / file).read_bytes() for file in ("config.json", "model.safetensors")}
    hub.commit(name, files | {"README.md": b"---\ntags: [hfdetox]\n---\n"})
    assert not start(name).backdoored
    hub.commit(name, {"README.md": b"---\ntags: [hfdetox, deliberately-backdoored]\n---\n"})
    assert start(name).backdoored
    # nothing of its weights is taken
    assert not start(name, init="random").backdoored


REFUSED = {
    "unknown": ("timm-arch:resnot18", {}, "no architecture 'resnot18'; close to it: resnet18"),
    "argument": ("timm-arch:resnet18", {"model_args": {"depht": 2}}, "with depht=2 .*unexpected keyword argument"),
    "value": ("timm-arch:resnet18", {"model_args": {"layers": "x"}}, "cannot build resnet18 with layers=x"),
    "classes": ("timm-arch:resnet18", {"model_args": {"num_classes": 2}}, "num_classes cannot be given"),
    "pickle": ("timm-arch:resnet18", {"model_args": {"checkpoint_path": "x"}}, "checkpoint_path cannot be given"),
    "channels": ("timm-arch:test_resnet", {"model_args": {"in_chans": "x"}}, "--model-arg in_chans=x: .* or 1"),
    "no-channels": ("timm-arch:test_resnet", {"model_args": {"in_chans": 0}}, "--model-arg in_chans=0: .* or 1"),
    "half-channels": ("timm-arch:test_resnet", {"model_args": {"in_chans": 1.0}}, "--model-arg in_chans=1.0: "),
    "true-channels": ("timm-arch:test_resnet", {"model_args": {"in_chans": True}}, "--model-arg in_chans=True: "),
    "size": ("timm-arch:test_resnet", {"input_size": 0}, "--input-size 0"),
    "revision": ("timm-arch:test_resnet", {"revision": "main"}, "has no revisions"),
    "init": ("timm-arch:test_resnet", {"init": "zeros"}, "--init zeros is not known"),
    "not-an-architecture": ("org/model", {"input_size": 32}, "--input-size describe a timm-arch:NAME"),
}


@pytest.mark.parametrize(("model", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_one_line(model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        start(model, **options)
    assert "\n" not in str(caught.value)


def test_a_loaded_model_keeps_its_weights() -> None:
    with pytest.raises(UsageError, match="a loaded model has its own"):
        start(timm_model(), init="random")
