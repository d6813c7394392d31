"""Corrections: what a network does differently for inputs it gives to a backdoor's target, without changed weights.

A correction holds, for a target label t, a map of the outputs of some norms: per channel z' = min(s z + b, u). f̃ is the
network f with these maps. The answer is that of f, but where f says t it is that of f̃; an input with f(x) = t
and f̃(x) ≠ t is flagged as triggered. f stays an ordinary model of its library, saved as such; the maps lie beside it in
`correction.safetensors`, which `load_classifier` reads. timm and transformers know nothing of them: loaded there, the
model is the uncorrected one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hfdetox.errors import UsageError, refusing

FILE_NAME = "correction.safetensors"
_PARTS = ("scale", "shift", "bound")


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


class Correction:
    """The maps of f̃ by the names of the model's norms, for inputs that f gives to `target`."""

    def __init__(self, target: int, maps: Mapping[str, UnitMap]) -> None:
        self.target = target
        self.maps = dict(maps)

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
    with refusing(f"{path} cannot be read as a correction"), safe_open(str(path), framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("correction", "null"))
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
