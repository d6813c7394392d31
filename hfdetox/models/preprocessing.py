"""A model's own preprocessing, split where triggers and caches need it: resize and crop to uint8, then an affine map.

A float image never enters a library's transform (transformers' processors would rescale it again); what is cached is
uint8, and division and normalisation happen in the batch as (x · scale − mean) / std.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hfdetox.errors import UsageError, refusing

# Two odd shapes, wide and tall: a transform that keeps each image's own shape gives itself away.
_PROBE_SIZES = ((97, 61), (53, 89))
# Float32 rounding of (x · scale − mean) / std stays far below this, a missed step of a processor far above.
_PROBE_TOLERANCE = 1e-4


AffineMap = tuple[tuple[float, ...], tuple[float, ...], float]  # mean, std, scale
_BYTE_SCALE = 1 / 255


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
    scale: float = _BYTE_SCALE
    dtype: torch.dtype = torch.uint8

    @abstractmethod
    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the image after resize and crop, C×H×W in `dtype` (range 0 to 255 when that is uint8)."""

    def _probed(self, channels: int, differing: str) -> list[torch.Tensor]:
        """Prepare the probes, and take their shape; PreprocessingError `differing` where they have no common one."""
        prepared = [self.prepare(probe) for probe in _probe_images(channels)]
        if prepared[0].shape != prepared[1].shape:
            raise PreprocessingError(differing)
        depth, height, width = prepared[0].shape
        self.input_size = (depth, height, width)
        return prepared

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Map N×C×H×W images, uint8 or float32 in 0 to 255, to the model's float32; same shape and device."""
        if self.dtype != torch.uint8:
            return images
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32)[..., None, None]
        return normalize(images, mean, std, self.scale)


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
        self.mean, self.std = (_per_channel(data_config[name], self.input_size[0]) for name in ("mean", "std"))
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
        self._channels = channels
        # efficientnet normalises a second time whatever do_normalize says, unless include_top is off
        self._raw = {"do_rescale": False, "do_normalize": False}
        self._raw |= {"include_top": False} if hasattr(processor, "include_top") else {}
        with refusing(f"the image processor {type(processor).__name__} cannot process a plain image",
                      "; pass preprocessing=… through the API", PreprocessingError):  # fmt: skip
            raw = self._probed(channels, "it leaves images in their own shapes, having no fixed size or crop")
            full = [self._call(probe).to(torch.float32) for probe in _probe_images(channels)]
        # the processor's own numbers or, where they do not fit, those of the images
        self.mean, self.std, self.scale = self._declared_map()
        if not self._agrees(raw, full):
            self.mean, self.std, self.scale = _fitted_map(raw, full)
            if not self._agrees(raw, full):
                raise self._refused("does more than (x · scale − mean) / std after resize and crop")

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the resized and cropped image, uint8 C×H×W."""
        pixels = self._call(_with_channels(image, self._channels), **self._raw)
        if pixels.dtype != torch.uint8:
            raise self._refused("resizes float images, which cannot be cached as uint8")
        return pixels

    def _refused(self, why: str) -> PreprocessingError:
        name = type(self.processor).__name__
        return PreprocessingError(f"the image processor {name} {why}; pass preprocessing=… through the API")

    def _call(self, image: Image.Image, **options: Any) -> torch.Tensor:
        pixels = self.processor(images=image, return_tensors="pt", **options)["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[0] != 1:
            raise self._refused(f"gives a tensor of shape {tuple(pixels.shape)} instead of one image")
        return pixels[0]

    def _agrees(self, raw: list[torch.Tensor], full: list[torch.Tensor]) -> bool:
        errors = [(self.normalize(x[None])[0] - y).abs().max() for x, y in zip(raw, full, strict=True)]
        limits = [_PROBE_TOLERANCE * y.abs().max().clamp(min=1) for y in full]
        return all(bool(error <= limit) for error, limit in zip(errors, limits, strict=True))

    def _declared_map(self) -> AffineMap:
        processor, channels = self.processor, self._channels
        normalizes = getattr(processor, "do_normalize", False)
        mean, std = (processor.image_mean, processor.image_std) if normalizes else (0.0, 1.0)
        scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
        return _per_channel(mean, channels), _per_channel(std, channels), scale


class CallablePreprocessing(Preprocessing):
    """A user's function from a PIL image to the model's float tensor; only `mode=native` triggers fit it."""

    scale = 1.0
    dtype = torch.float32

    def __init__(self, function: Callable[[Image.Image], Any], *, channels: int = 3) -> None:
        """Wrap `function`; raises PreprocessingError when it does not give one C×H×W tensor of a fixed shape."""
        self._function = function
        self._channels = channels
        self._probed(channels, "preprocessing gives images of differing shapes; let it resize and crop to one")
        self.mean, self.std = (0.0,) * self.input_size[0], (1.0,) * self.input_size[0]

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the function's own result, float32 C×H×W."""
        result = self._function(_with_channels(image, self._channels))
        if isinstance(result, torch.Tensor) and result.ndim == 3 and result.is_floating_point():
            return result.to(torch.float32)
        tensor = isinstance(result, torch.Tensor)
        found = f"{result.dtype} {tuple(result.shape)}" if tensor else type(result).__name__
        raise PreprocessingError(f"preprocessing must return a float tensor C×H×W, got {found}")


def _fitted_map(raw: list[torch.Tensor], full: list[torch.Tensor]) -> AffineMap:
    """Fit y = a·x + b per channel by least squares in float64, as mean and std of x / 255."""
    mean, std = [], []
    by_channel = (torch.stack(images, 1).flatten(1).double().numpy() for images in (raw, full))
    for x, y in zip(*by_channel, strict=True):
        slope, intercept = np.polyfit(x, y, 1)
        # a constant channel has no std; 1 keeps the numbers finite and the caller's comparison decides
        std.append(float(1 / (255 * slope)) if slope else 1.0)
        mean.append(float(-intercept) * std[-1])
    return tuple(mean), tuple(std), _BYTE_SCALE


def _per_channel(value: float | Sequence[float] | None, channels: int) -> tuple[float, ...]:
    if value is None or isinstance(value, (int, float)):
        return (float(value or 0.0),) * channels
    values = tuple(float(v) for v in value)
    return values * channels if len(values) == 1 else values


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
    return image if image.mode == mode else image.convert(mode)


def _probe_images(channels: int) -> list[Image.Image]:
    sizes = ((height, width, channels) for width, height in _PROBE_SIZES)
    pixels = [np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8) for size in sizes]
    return [Image.fromarray(each[..., 0] if channels == 1 else each) for each in pixels]
