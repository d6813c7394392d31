"""A model's own preprocessing, split where triggers and caches need it: resize and crop to uint8, then an affine map.

A float image never enters a library's transform (transformers' processors would rescale it again); what is cached is
uint8, and division and normalisation happen in the batch as (x · scale − mean) / std.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfdetox.errors import UsageError

# Two odd shapes, wide and tall: a transform that keeps each image's own shape gives itself away.
_PROBE_SIZES = ((97, 61), (53, 89))
# Float32 rounding of (x · scale − mean) / std stays far below this, a missed step of a processor far above.
_PROBE_TOLERANCE = 1e-4


AffineMap = tuple[tuple[float, ...], tuple[float, ...], float]  # mean, std, scale


class PreprocessingError(UsageError):
    """The model's preprocessing is missing, or cannot be split into a uint8 image and an affine map."""


class Preprocessing(ABC):
    """What turns a decoded image into the tensor that a model takes.

    Attributes:
        input_size: (C, H, W) of every prepared image.
        mean, std: one value a channel, in units of the scaled image (timm's and transformers' own numbers).
        scale: factor on the 0 to 255 range, 1/255 for most models.
        dtype: of prepared images: uint8, or float32 for a callable that normalises by itself.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    dtype: torch.dtype

    @abstractmethod
    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the image after resize and crop, C×H×W in `dtype` (range 0 to 255 when that is uint8)."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Map N×C×H×W images, uint8 or float32 in 0 to 255, to the model's float32; same shape and device."""
        if self.dtype != torch.uint8:
            return images
        return normalize(images, _channel_column(self.mean), _channel_column(self.std), self.scale)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, scale: float) -> torch.Tensor:
    """Return (images · scale − mean) / std as float32; `mean` and `std` are C×1×1."""
    return (images.to(torch.float32) * scale - mean.to(images.device)) / std.to(images.device)


class TimmPreprocessing(Preprocessing):
    """timm's evaluation transform for one data config (as `timm.data.resolve_model_data_config` gives)."""

    def __init__(self, data_config: dict[str, Any]) -> None:
        """Build the transform; `data_config` has input_size, interpolation, crop_pct, crop_mode, mean and std."""
        from timm.data import create_transform

        self.data_config = dict(data_config)
        self.input_size = tuple(data_config["input_size"])
        channels = self.input_size[0]
        self.mean = _per_channel(data_config["mean"], channels)
        self.std = _per_channel(data_config["std"], channels)
        self.scale = 1 / 255
        self.dtype = torch.uint8
        self._transform = create_transform(**data_config, is_training=False, normalize=False)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the resized and cropped image, uint8 C×H×W."""
        return self._transform(_with_channels(image, self.input_size[0]))


def timm_data_config(model: Any) -> dict[str, Any]:
    """Return the data config of a timm model as it stands: with its own channels and, where it takes one only, size."""
    from timm.data import resolve_data_config

    try:
        from timm.data.model_config import resolve_input_data_config
    except ImportError:  # before timm 1.0.31: what it resolves is that of the weights, however the model was built
        patches: Any = getattr(model, "patch_embed", None)
        given = model.pretrained_cfg.get("input_size", (3, 224, 224))
        size = patches.img_size if getattr(patches, "strict_img_size", False) and patches.img_size else given[1:]
        stem = model.pretrained_cfg.get("first_conv")
        channels = model.get_submodule(stem).in_channels if isinstance(stem, str) else given[0]
        config: dict[str, Any] = resolve_data_config({"input_size": (channels, *size)}, model.pretrained_cfg, model)
        for name in ("mean", "std"):
            values = tuple(config[name])
            config[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
        return config
    return resolve_input_data_config(model)


class ProcessorPreprocessing(Preprocessing):
    """A transformers image processor, in the backend in which it was loaded (`pipeline` takes the default one)."""

    def __init__(self, processor: Any, *, channels: int = 3) -> None:
        """Wrap `processor` and find its affine map.

        Raises:
            PreprocessingError: it keeps each image's own shape, or does more than an affine map after resize and crop.
        """
        self.processor = processor
        self.dtype = torch.uint8
        self._channels = channels
        # efficientnet normalises a second time whatever do_normalize says, unless include_top is off
        self._raw = {"do_rescale": False, "do_normalize": False}
        self._raw |= {"include_top": False} if hasattr(processor, "include_top") else {}
        probes = [_probe_image(size, channels) for size in _PROBE_SIZES]
        try:
            raw = [self.prepare(probe) for probe in probes]
            full = [self._call(probe).to(torch.float32) for probe in probes]
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise PreprocessingError(
                f"{self._name} cannot process a plain image ({_first_line(error)}); "
                "pass preprocessing=… through the API"
            ) from error
        if raw[0].shape != raw[1].shape:
            raise PreprocessingError(
                f"{self._name} leaves images in their own shapes; give it a fixed size or crop in "
                "preprocessor_config.json, or pass preprocessing=… through the API"
            )
        self.input_size = _shape3(raw[0])
        self._find_affine_map(raw, full)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the resized and cropped image, uint8 C×H×W."""
        pixels = self._call(_with_channels(image, self._channels), **self._raw)
        if pixels.dtype != torch.uint8:
            raise PreprocessingError(
                f"{self._name} resizes float images, which cannot be cached as uint8; "
                "pass preprocessing=… through the API"
            )
        return pixels

    @property
    def _name(self) -> str:
        return f"the image processor {type(self.processor).__name__}"

    def _call(self, image: Image.Image, **options: Any) -> torch.Tensor:
        pixels = self.processor(images=image, return_tensors="pt", **options)["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[0] != 1:
            raise PreprocessingError(f"{self._name} gives a tensor of shape {tuple(pixels.shape)} instead of one image")
        return pixels[0]

    def _find_affine_map(self, raw: list[torch.Tensor], full: list[torch.Tensor]) -> None:
        """Take mean, std and scale from the processor's attributes; where they do not fit, from the images."""
        candidates: tuple[Callable[..., AffineMap], ...] = (self._declared_map, _fitted_map)
        for candidate in candidates:
            self.mean, self.std, self.scale = candidate(raw, full)
            if all(self._agrees(x, y) for x, y in zip(raw, full, strict=True)):
                return
        raise PreprocessingError(
            f"{self._name} does more than (x · scale − mean) / std after resize and crop; "
            "pass preprocessing=… through the API"
        )

    def _agrees(self, raw: torch.Tensor, full: torch.Tensor) -> bool:
        error = (self.normalize(raw[None])[0] - full).abs().max()
        return bool(error <= _PROBE_TOLERANCE * full.abs().max().clamp(min=1))

    def _declared_map(self, *_: list[torch.Tensor]) -> AffineMap:
        processor = self.processor
        scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
        if not getattr(processor, "do_normalize", False):
            return (0.0,) * self._channels, (1.0,) * self._channels, scale
        return (
            _per_channel(processor.image_mean, self._channels),
            _per_channel(processor.image_std, self._channels),
            scale,
        )


class CallablePreprocessing(Preprocessing):
    """A user's function from a PIL image to the model's float tensor; only `mode=native` triggers fit it."""

    def __init__(self, function: Callable[[Image.Image], Any], *, channels: int = 3) -> None:
        """Wrap `function`; raises PreprocessingError when it does not give one C×H×W tensor of a fixed shape."""
        self._function = function
        self._channels = channels
        self.dtype = torch.float32
        self.scale = 1.0
        prepared = [self.prepare(_probe_image(size, channels)) for size in _PROBE_SIZES]
        if prepared[0].shape != prepared[1].shape:
            raise PreprocessingError(
                "preprocessing gives images of differing shapes; resize and crop to one size in it"
            )
        self.input_size = _shape3(prepared[0])
        self.mean = (0.0,) * self.input_size[0]
        self.std = (1.0,) * self.input_size[0]

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the function's own result, float32 C×H×W."""
        result = self._function(_with_channels(image, self._channels))
        if not isinstance(result, torch.Tensor) or result.ndim != 3 or not result.is_floating_point():
            found = (
                f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
            )
            raise PreprocessingError(f"preprocessing must return a float tensor C×H×W, got {found}")
        return result.to(torch.float32)


def _fitted_map(raw: list[torch.Tensor], full: list[torch.Tensor]) -> AffineMap:
    """Fit y = a·x + b per channel by least squares in float64, as mean and std of x / 255."""
    mean, std = [], []
    for channel in range(raw[0].shape[0]):
        x = np.concatenate([image[channel].flatten().numpy() for image in raw]).astype(np.float64)
        y = np.concatenate([image[channel].flatten().numpy() for image in full]).astype(np.float64)
        slope, intercept = np.polyfit(x, y, 1)
        # a constant channel has no std; 1 keeps the numbers finite and the caller's comparison decides
        std.append(float(1 / (255 * slope)) if slope else 1.0)
        mean.append(float(-intercept) * std[-1])
    return tuple(mean), tuple(std), 1 / 255


def _per_channel(value: float | Sequence[float] | None, channels: int) -> tuple[float, ...]:
    if value is None or isinstance(value, (int, float)):
        return (float(value or 0.0),) * channels
    values = tuple(float(v) for v in value)
    return values * channels if len(values) == 1 else values


def _channel_column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
    return image if image.mode == mode else image.convert(mode)


def _probe_image(size: tuple[int, int], channels: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _shape3(image: torch.Tensor) -> tuple[int, int, int]:
    channels, height, width = image.shape
    return channels, height, width


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
