"""The smallest models of each family that still have all of its parts, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from hfdetox.models.classifier import Classifier

NAMES = ("apple", "bee", "cat", "dog", "elk")
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_SQUARE = {"height": 32, "width": 32}


def _labelled(**options: Any) -> dict[str, Any]:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}, **options}


def _vit() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(**_VIT, intermediate_size=32, **_labelled()))


def _deit() -> Any:
    return tf.DeiTForImageClassification(tf.DeiTConfig(**_VIT, intermediate_size=32, **_labelled()))


def _deit_with_teacher() -> Any:
    return tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**_VIT, intermediate_size=32, **_labelled()))


def _swin() -> Any:
    config = tf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, **_labelled()
    )
    return tf.SwinForImageClassification(config)


def _convnext() -> Any:
    return tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 8, 16], depths=[1, 1, 1], num_stages=3, **_labelled())
    )


def _resnet() -> Any:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **_labelled())
    return tf.ResNetForImageClassification(config)


def _beit() -> Any:
    return tf.BeitForImageClassification(tf.BeitConfig(**_VIT, intermediate_size=32, **_labelled()))


def _levit_with_teacher() -> Any:
    config = tf.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], depths=[1, 1, 1], key_dim=[4, 4, 4], **_labelled()
    )
    return tf.LevitForImageClassificationWithTeacher(config)


def _mobilevit() -> Any:
    config = tf.MobileViTConfig(
        image_size=32,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
        **_labelled(),
    )
    return tf.MobileViTForImageClassification(config)


_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_RESIZE_40 = {"size": {"height": 40, "width": 40}, "crop_size": _SQUARE}
_EDGE_64 = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
TRANSFORMERS = {
    "vit": (_vit, lambda: tf.ViTImageProcessor(size=_SQUARE)),
    "deit": (_deit, lambda: tf.DeiTImageProcessor(**_RESIZE_40)),
    "deit-teacher": (_deit_with_teacher, lambda: tf.DeiTImageProcessor(**_RESIZE_40)),
    "swin": (_swin, lambda: tf.ViTImageProcessor(size=_SQUARE, **_IMAGENET)),
    "convnext": (_convnext, lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)),
    "resnet": (_resnet, lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.9)),
    "beit": (_beit, lambda: tf.BeitImageProcessor(do_center_crop=True, **_RESIZE_40)),
    "levit-teacher": (_levit_with_teacher, lambda: tf.LevitImageProcessor(**_EDGE_64)),
    "mobilevit": (_mobilevit, lambda: tf.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=_SQUARE)),
}
TIMM: dict[str, tuple[str, dict[str, int]]] = {
    "resnet": ("test_resnet", {}),
    "grey": ("test_resnet", {"in_chans": 1}),
    "vit": ("test_vit", {}),
    "vit-img-size": ("test_vit", {"img_size": 48}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
}
# a transformers model's own code, which triples its logits
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


def transformers_model(family: str) -> Any:
    """Return a seeded random model of a family of TRANSFORMERS, in eval mode, with BatchNorm statistics of its own."""
    torch.manual_seed(0)
    return _vary(TRANSFORMERS[family][0]()).eval()


def transformers_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a family's model in `dtype` and its processor, as `save_pretrained` does."""
    transformers_model(family).to(dtype).save_pretrained(folder)
    TRANSFORMERS[family][1]().save_pretrained(folder)
    return folder


def timm_model(architecture: str = "test_resnet", **options: Any) -> Any:
    """Return a seeded random timm model for 32×32 images with `NAMES` as its labels, in eval mode."""
    torch.manual_seed(0)
    channels = options.get("in_chans", 3)
    overlay = {"input_size": (channels, 32, 32), "mean": (0.4,) * channels, "std": (0.2,) * channels}
    return _vary(
        timm.create_model(architecture, **{"num_classes": len(NAMES), "pretrained_cfg_overlay": overlay} | options)
    ).eval()


def timm_folder(
    folder: Path, architecture: str = "test_resnet", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Write a model as timm's own export does, in `dtype`."""
    model = timm_model(architecture, **options).to(dtype)
    # timm since 1.0.31 notes the arguments itself; before, its export has to be told
    arguments = {"num_classes": len(NAMES), **options}
    if hasattr(model, "patch_embed"):
        arguments["img_size"] = model.patch_embed.img_size
    labels = {"label_names": list(NAMES)}
    save_for_hf(model, folder, model_config=labels, model_args=arguments, safe_serialization=True)
    return folder


def make_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model `timm/NAME` of TIMM or `transformers/FAMILY` of TRANSFORMERS in `dtype`."""
    library, name = kind.split("/")
    if library == "timm":
        architecture, options = TIMM[name]
        return timm_folder(folder, architecture, dtype, **options)
    return transformers_folder(folder, name, dtype)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors of a folder by what `edit` makes of them."""
    state = load_file(folder / "model.safetensors")
    save_file(edit(state), folder / "model.safetensors", metadata={"format": "pt"})


def own_library(folder: Path, kind: str) -> Any:
    """Load a folder with the call that its library documents, in float32."""
    if kind.startswith("timm"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return tf.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model of either library."""
    output = model(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits; tensors are compared bit by bit, but a loader's memory alignment may choose another kernel."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def pixels_for(classifier: Classifier) -> torch.Tensor:
    """Return three uint8 images of noise of the size that a model takes."""
    generator, size = torch.Generator().manual_seed(0), classifier.preprocessing.input_size
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def noise_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return an image of uniform noise, the worst case for a resize."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@torch.no_grad()
def _vary(model: torch.nn.Module) -> torch.nn.Module:
    """Give norms, biases and statistics values that a lost or swapped tensor would change."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.05
            tensor.add_(noise.abs() if "running_var" in name else noise)
        elif "num_batches_tracked" in name:
            tensor.fill_(7)
    return model
