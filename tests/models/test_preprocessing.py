"""Preprocessing in two steps equals each library's own transform in one."""

from __future__ import annotations

import pytest
import timm.data
import torch
import transformers as tf
from PIL import Image
from timm.data import create_transform

from hfdetox.models.preprocessing import (
    CallablePreprocessing,
    PreprocessingError,
    ProcessorPreprocessing,
    TimmPreprocessing,
)
from tests.tiny_models import TRANSFORMERS, noise_image

SIZES = [(32, 32), (45, 77), (101, 38), (19, 23)]
SQUARE, EDGE = {"height": 32, "width": 32}, {"shortest_edge": 32}
# each library version has two backends, and names the one it prefers without a suffix: PIL's in the first 5.x
OTHER = "Pil" if hasattr(tf, "ViTImageProcessorPil") else "Fast"
TENSOR_VIT = tf.ViTImageProcessor if OTHER == "Pil" else tf.ViTImageProcessorFast
PROCESSORS = {
    **{family: processor for family, (_, processor) in TRANSFORMERS.items()},
    "clip": lambda: tf.CLIPImageProcessor(size=EDGE, crop_size=SQUARE),
    "bit-bilinear": lambda: tf.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE, resample=2),
    "nearest": lambda: tf.ViTImageProcessor(size=SQUARE, resample=0),
    "lanczos": lambda: tf.ViTImageProcessor(size=SQUARE, resample=1),
    "convnext-warped": lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 384}),
    "efficientnet": lambda: tf.EfficientNetImageProcessor(size=SQUARE, rescale_offset=True, rescale_factor=1 / 127.5),
    "mobilenet-v2": lambda: tf.MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "poolformer": lambda: tf.PoolFormerImageProcessor(size=EDGE, crop_size=SQUARE, crop_pct=0.9),
    "perceiver": lambda: tf.PerceiverImageProcessor(size=SQUARE, crop_size={"height": 40, "width": 40}),
    "siglip": lambda: tf.SiglipImageProcessor(size=SQUARE),
    "no-normalize": lambda: tf.ViTImageProcessor(size=SQUARE, do_normalize=False),
    "no-rescale": lambda: tf.ViTImageProcessor(size=SQUARE, do_rescale=False, image_mean=90.0, image_std=60.0),
    "other-backend": lambda: getattr(tf, f"ViTImageProcessor{OTHER}")(size=SQUARE),
    "other-backend-convnext": lambda: getattr(tf, f"ConvNextImageProcessor{OTHER}")(size=EDGE, crop_pct=0.875),
}  # fmt: skip


def two_steps(preprocessing, image):
    prepared = preprocessing.prepare(image)
    assert prepared.dtype == torch.uint8
    assert tuple(prepared.shape) == preprocessing.input_size
    return preprocessing.normalize(prepared[None])[0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_in_two_steps_equals_its_own_call(name):
    processor = PROCESSORS[name]()
    preprocessing = ProcessorPreprocessing(processor)
    for seed, (width, height) in enumerate(SIZES):
        image = noise_image(width, height, seed)
        whole = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])
        torch.testing.assert_close(two_steps(preprocessing, image), whole.float(), rtol=1e-5, atol=1e-5)


def test_processor_takes_grey_images_for_a_model_of_one_channel():
    processor = TENSOR_VIT(size=SQUARE, image_mean=[0.3], image_std=[0.2])
    preprocessing = ProcessorPreprocessing(processor, channels=1)
    image = noise_image(40, 50, mode="L")
    assert preprocessing.input_size == (1, 32, 32)
    whole = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(two_steps(preprocessing, image), whole)


def test_declared_mean_and_std_are_kept_as_they_are():
    preprocessing = ProcessorPreprocessing(tf.ViTImageProcessor(size=SQUARE, image_mean=[0.1, 0.2, 0.3], image_std=0.7))
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.std == (0.7, 0.7, 0.7)
    assert preprocessing.scale == 1 / 255


def test_a_map_that_the_attributes_do_not_say_is_fitted():
    processor = tf.EfficientNetImageProcessor(
        size=SQUARE, rescale_offset=True, rescale_factor=1 / 127.5, include_top=True,
        image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.5, 1.0],
    )  # fmt: skip
    preprocessing = ProcessorPreprocessing(processor)
    # y = ((2u − 1) − 0.5) / s / s for u = x / 255, which is (u − 0.75) / (s² / 2)
    assert preprocessing.mean == pytest.approx((0.75, 0.75, 0.75), abs=1e-5)
    assert preprocessing.std == pytest.approx((0.03125, 0.125, 0.5), rel=1e-5)


class GammaProcessor(tf.ViTImageProcessor):
    def preprocess(self, images, **options):
        batch = super().preprocess(images, **options)
        if options.get("do_normalize", True):
            batch["pixel_values"] = batch["pixel_values"].abs() ** 0.5
        return batch


class FloatResizeProcessor(TENSOR_VIT):
    def resize(self, image, size, **options):
        return super().resize(image.float() / 255, size, **options)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: GammaProcessor(size=SQUARE), "GammaProcessor does more than"),
        (lambda: FloatResizeProcessor(size=SQUARE), "FloatResizeProcessor resizes float images"),
        (lambda: tf.ViTImageProcessor(do_resize=False), "leaves images in their own shapes"),
        (lambda: tf.CLIPImageProcessor(size=EDGE, do_center_crop=False), "leaves images in their own shapes"),
        (lambda: tf.Siglip2ImageProcessor(), "Siglip2ImageProcessor"),
    ],
)
def test_processor_that_cannot_be_split_is_refused(processor, message):
    with pytest.raises(PreprocessingError, match=message):
        ProcessorPreprocessing(processor())


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.875},
        {
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 0.95,
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        },
        {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border"},
        {"input_size": (3, 24, 40), "interpolation": "lanczos", "crop_pct": 0.8},
        {"input_size": (1, 32, 32), "interpolation": "bicubic", "mean": (0.3,), "std": (0.4,)},
    ],
    ids=lambda config: "-".join(str(value) for value in config.values()),
)
def test_timm_transform_in_two_steps_equals_it_in_one(config):
    data_config = timm.data.resolve_data_config(config, pretrained_cfg=config)
    preprocessing = TimmPreprocessing(data_config)
    transform = create_transform(**data_config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    for seed, (width, height) in enumerate(SIZES):
        image = noise_image(width, height, seed, mode)
        torch.testing.assert_close(two_steps(preprocessing, image), transform(image), rtol=1e-5, atol=1e-6)


def test_normalize_takes_float_images_between_the_grey_levels():
    preprocessing = TimmPreprocessing(timm.data.resolve_data_config({"input_size": (3, 8, 8)}))
    levels = torch.full((2, 3, 8, 8), 127.5)
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(preprocessing.normalize(levels)[1, :, 0, 0], expected)


def test_callable_is_left_alone():
    preprocessing = CallablePreprocessing(lambda image: torch.full((3, 6, 5), float(image.width)))
    assert preprocessing.input_size == (3, 6, 5)
    assert preprocessing.dtype == torch.float32
    image = preprocessing.prepare(noise_image(40, 20))
    assert preprocessing.normalize(image[None]).unique().tolist() == [40.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image, "got Image"),
        (lambda image: torch.zeros(3, 4, 4, dtype=torch.uint8), r"got torch.uint8 \(3, 4, 4\)"),
        (lambda image: torch.zeros(1, 3, 4, 4), r"got torch.float32 \(1, 3, 4, 4\)"),
        (lambda image: torch.zeros(3, image.height, image.width), "differing shapes"),
    ],
)
def test_callable_of_the_wrong_kind_is_refused(function, message):
    with pytest.raises(PreprocessingError, match=message):
        CallablePreprocessing(function)


def test_images_of_other_modes_are_converted():
    preprocessing = TimmPreprocessing(timm.data.resolve_data_config({"input_size": (3, 8, 8)}))
    assert preprocessing.prepare(Image.new("L", (20, 20), 9)).unique().tolist() == [9]
