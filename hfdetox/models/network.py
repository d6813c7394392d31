"""The module that the engine trains and the metrics evaluate: images in 0 to 255 in, logits out.

A correction is what a network does differently for inputs it gives to a backdoor's target, without changed weights.

It holds, for a target label t, a map of the outputs of some norms: per channel z' = min(s z + b, u). f̃ is the
network f with these maps. The answer is that of f, but where f says t it is that of f̃; an input with f(x) = t
and f̃(x) ≠ t is flagged as triggered. f stays an ordinary model of its library, saved as such; the maps lie beside it in
`correction.safetensors`, which `load_classifier` reads. timm and transformers know nothing of them: loaded there, the
model is the uncorrected one.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from hfdetox.documents import parse_json
from hfdetox.errors import UsageError, refusing
from hfdetox.models.preprocessing import Preprocessing, normalize

FILE_NAME = "correction.safetensors"
_PARTS = ("scale", "shift", "bound")


class Network(nn.Module):
    """A library's classifier behind its own normalisation, so that triggers and augmentation act on pixel values.

    The state dict is that of the classifier under the prefix `model.`; mean and std are non-persistent buffers.
    `correction` (None for most) changes the answers to inputs that the classifier gives to a label.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        """Wrap `model`, which stays the same object."""
        super().__init__()
        self.model = model
        self.correction: Correction | None = None
        self.input_size = preprocessing.input_size
        self.scale = preprocessing.scale
        self.normalizes = preprocessing.dtype == torch.uint8
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(-1, 1, 1), persistent=False)
        self.convolutional = is_convolutional(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits N×K of prepared images N×C×H×W: uint8 or float32 in 0 to 255, or a callable's own floats."""
        if self.normalizes:
            # 8 bits of mantissa would lose pixel values before the network sees them
            with torch.autocast(images.device.type, enabled=False):
                images = normalize(images, self.mean, self.std, self.scale)
        if self.convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        run = partial(library_logits, self.model)
        logits = run(images)
        return logits if self.correction is None else self.correction.logits(self.model, run, images, logits)


@contextmanager
def uncorrected(network: Network) -> Iterator[None]:
    """Make a network be the model alone while inside, as timm or transformers loads it."""
    correction, network.correction = network.correction, None
    try:
        yield
    finally:
        network.correction = correction


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold the network in eval mode; on leaving, every module is in its mode again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply and convolve float32 as such (no TF32), whatever the process allows; undone at the end."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # set by its newer name, which the older ones refuse to know
        precision = None
    if precision is None:
        products.fp32_precision = "ieee"
    elif precision != "highest":
        torch.set_float32_matmul_precision("highest")
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before[1]
        if precision is None:
            products.fp32_precision = before[0]
        elif precision != "highest":
            torch.set_float32_matmul_precision(precision)


def library_logits(model: nn.Module, images: torch.Tensor,
                   changed: dict[str, torch.Tensor] | None = None) -> torch.Tensor:  # fmt: skip
    """Return the logits (N×K) that a library's own model gives for images it takes as they are (normalised already).

    `changed` has tensors, by name, in place of the model's own.
    """
    # transformers models may take other inputs first (Perceiver, remote code); `pipeline` passes this name too
    keyword = getattr(model, "main_input_name", None) == "pixel_values"
    args, kwargs = ((), {"pixel_values": images}) if keyword else ((images,), {})
    output: Any = functional_call(model, changed, args, kwargs) if changed else model(*args, **kwargs)
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        return output[0]  # timm's Inception v3 gives auxiliary logits too
    # transformers' PP-LCNet gives its logits by the name of features
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def is_convolutional(model: nn.Module) -> bool:
    """Tell whether channels_last pays: convolutions that overlap (so not patch embeddings), and no attention.

    Nor any strided 1×1 convolution of two to seven channels, whose backward pass on CPUs then writes beyond its memory
    (oneDNN on AVX2, torch 2.15; docs/development.md has a reproduction).
    """
    if any("attention" in type(module).__name__.lower() for module in model.modules()):
        return False
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    crashes = any(max(c.kernel_size) == 1 < max(c.stride) and 1 < c.in_channels < 8 for c in convolutions)
    return not crashes and any(max(c.kernel_size) > 1 and tuple(c.kernel_size) != tuple(c.stride) for c in convolutions)


@dataclass
class UnitMap:
    """The map of one norm's channels: z' = min(scale · z + shift, bound), each of C numbers (float32)."""

    scale: torch.Tensor
    shift: torch.Tensor
    bound: torch.Tensor

    def __call__(self, output: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the mapped output of a norm whose channels lie on `axis`, in its dtype."""
        shape = [1] * output.ndim
        shape[axis] = -1
        scale, shift, bound = (part.to(output.device).view(shape) for part in (self.scale, self.shift, self.bound))
        return (output.float() * scale + shift).minimum(bound).to(output.dtype)


@dataclass
class Correction:
    """The maps of f̃ by the names of the model's norms, for inputs that f gives to `target`."""

    target: int
    maps: Mapping[str, UnitMap]

    def logits(self, model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor,
               logits: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """Return f's logits (N×K) with f̃'s in the rows that f gives to the target; `run` asks `model`."""
        rows = (logits.argmax(1) == self.target).nonzero().flatten()
        if not len(rows):
            return logits
        with self.applied(model):
            corrected = run(images[rows])
        return logits.index_copy(0, rows, corrected.to(logits.dtype))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Make `model` be f̃ while inside."""
        with ExitStack() as stack:
            for name, unit_map in self.maps.items():
                stack.enter_context(on_output(model.get_submodule(name), unit_map))
            yield

    def save(self, folder: Path) -> None:
        """Write the maps to `correction.safetensors` in `folder`."""
        tensors = {f"{name}.{part}": getattr(each, part).cpu().contiguous()
                   for name, each in self.maps.items() for part in _PARTS}  # fmt: skip
        header = {"version": 1, "target": self.target}
        save_file(tensors, folder / FILE_NAME, metadata={"correction": json.dumps(header)})


def load_correction(folder: Path, model: nn.Module, labels: int) -> Correction | None:
    """Return the correction that lies beside a model, or None without one.

    Raises:
        UsageError: the file is damaged, or of another model.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    advice = "; remove it to use the model without"
    with refusing(f"{path} cannot be read as a correction", advice), safe_open(str(path), framework="pt") as file:
        header = parse_json((file.metadata() or {}).get("correction", "null"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    target = header.get("target") if isinstance(header, dict) and header.get("version") == 1 else None
    if type(target) is not int or not 0 <= target < labels:
        raise UsageError(f"{path} is not a correction that this hfdetox reads; remove it to use the model without")
    modules = dict(model.named_modules())
    maps = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        parts = [tensors.get(f"{name}.{part}") for part in _PARTS]
        size = channels_of(modules[name]) if name in modules else 0
        if any(part is None or part.shape != (size,) or part.dtype != torch.float32 for part in parts):
            raise UsageError(f"{path} is a correction of another model: its part {name!r} does not fit")
        maps[name] = UnitMap(*(part for part in parts if part is not None))
    return Correction(target, maps)


def norms_of(model: nn.Module) -> list[str]:
    """Return the names of the affine norms of any kind, in the model's order."""
    return [name for name, module in model.named_modules() if channels_of(module)]


def channels_of(module: nn.Module) -> int:
    """Return how many channels an affine norm has, 0 for any other module."""
    weight, kind = getattr(module, "weight", None), type(module).__name__.lower()
    # by name and shape: timm and transformers have their own LayerNorm2d, RMSNorm and BatchNormAct; ConvNeXt V2's
    # global response normalisation rescales by what the whole image has, and is none of them
    known = "norm" in kind and "response" not in kind
    return weight.numel() if known and isinstance(weight, nn.Parameter) and weight.ndim == 1 else 0


@contextmanager
def on_output(norm: nn.Module, change: Callable[[torch.Tensor, int], torch.Tensor | None]) -> Iterator[None]:
    """Call `change(output, axis of the channels)` on a norm's output while inside; a tensor it returns replaces it.

    Of timm's norms with an activation inside it is what enters the activation.
    """

    def changed(output: torch.Tensor) -> torch.Tensor | None:
        return change(output, channel_axis(norm, output))

    inner = getattr(norm, "drop", None)
    if isinstance(inner, nn.Module) and isinstance(getattr(norm, "act", None), nn.Module):
        hook = inner.register_forward_pre_hook(lambda module, inputs: changed(inputs[0]))
    else:
        hook = norm.register_forward_hook(lambda module, inputs, output: changed(output))
    with hook:
        yield


def channel_axis(norm: nn.Module, output: torch.Tensor) -> int:
    """Return the axis of a norm's channels in its output: the last of a LayerNorm's, else (and of a 2d one's) 1."""
    name = type(norm).__name__.lower()
    last = ("layer" in name or "rms" in name) and "2d" not in name
    return output.ndim - 1 if last and getattr(norm, "data_format", "channels_last") == "channels_last" else 1
