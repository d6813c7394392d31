"""What a trigger is: a function from uint8 images to uint8 images that can be named, saved and repeated."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
from safetensors.torch import save
from torch.nn.functional import interpolate

from hfdetox.errors import UsageError
from hfdetox.specs import join_items, read_target, target_text
from hfdetox.values import check_fields, shown, to_text

Mode = Literal["native", "input"]
Value = TypeVar("Value")
MAX_KEPT = 8
ALL_TO_ALL: Final = "all-to-all"
# a label index, or every class to the next one
Target = int | Literal["all-to-all"]
# what a field of a trigger's own arrays holds, the metadata key `tensor` of its dataclass field
TensorKind = Literal["picture", "array", "network"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trigger(ABC):
    """A deterministic map of uint8 images, plus the label an attacker ties to it.

    Fields that hold arrays say so in their metadata: `{"tensor": "picture"}` (uint8, C×h×w), `"array"` (float32, any
    shape) or `"network"` (a state dict of float32 arrays). All of them are None in a trigger that is not `fitted`.

    Attributes:
        name: the key of this trigger in a report; unique within a run; empty takes the kind.
        target: the attacker's label, an index (in text `index:2`), a name or `all-to-all`; None is the run's `target`.
        mode: `native` acts on the decoded image before any resize, `input` on the image after resize and crop.
    """

    kind: ClassVar[str]
    summary: ClassVar[str] = "no summary"
    # where the family was published: an arXiv id or a venue
    paper: ClassVar[str] = "no paper"
    # when its arrays are made, and by what command; {kind} is the family
    made: ClassVar[tuple[str, str]] = ("made during an attack", "hfdetox attack --trigger {kind}")

    name: str = ""
    target: str | int | None = None
    mode: Mode = "native"

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        if self.target is not None:
            object.__setattr__(self, "target", read_target(self.target))
        # the name becomes a file's name, which has room for 255 bytes, and `mean` is a key of the report
        if not re.fullmatch(r"[\w-][\w.-]{0,63}", self.name) or len(self.name.encode()) > 192 or self.name == "mean":
            raise UsageError(f"trigger name {shown(self.name)}: use letters, digits, '_', '-' and '.', up to 64 and "
                             "192 bytes, and not 'mean'")  # fmt: skip
        for name, value in self.parameters().items():
            # JSON has whole numbers of any size, tensors and fractions have not
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise UsageError(f"trigger {self.name}: {name} must be less than 2**63, and not below -2**63")
        check_fields(self, f"trigger {self.name}")
        for name, array in self.tensors().items():
            kind = self.tensor_fields()[name.partition(".")[0]]
            found = f"{array.dtype} of shape {tuple(array.shape)}"
            if kind == "picture" and (array.dtype != torch.uint8 or array.ndim != 3 or not array.numel()):
                raise UsageError(f"trigger {self.name}: {name} must be a uint8 picture C×h×w, got {found}")
            if kind != "picture" and (array.dtype != torch.float32 or not torch.isfinite(array).all()):
                raise UsageError(f"trigger {self.name}: {name} must be finite float32 numbers, got {found}")

    @classmethod
    def tensor_fields(cls) -> dict[str, TensorKind]:
        """Return the fields that hold arrays, and of what kind."""
        return {f.name: f.metadata["tensor"] for f in fields(cls) if "tensor" in f.metadata}

    @property
    def fitted(self) -> bool:
        """Whether the trigger can be put on images; one that an attack has to make first is not until then."""
        return True

    def require_fitted(self) -> None:
        """Raise UsageError for a trigger that an attack has to make first."""
        if not self.fitted:
            when, command = self.made
            raise UsageError(f"trigger {self.name}: {self.kind} is {when} and has no pixels before; name the trigger "
                             f"file that `{command.format(kind=self.kind)}` wrote")  # fmt: skip

    @abstractmethod
    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Return triggered copies of `images` (uint8, N×C×H×W, 0 to 255), same shape, dtype and device.

        Raises:
            UsageError: the trigger does not fit images of this size or channel count.
        """

    def remember(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return `make()`, made once for `key`; what is kept for at most 8 keys must not fill the memory."""
        # a native trigger meets images of many sizes, and several threads stamp at a time: the value is read once
        value = self._kept.get(key)
        if value is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            value = self._kept[key] = make()
        return value

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trigger's own arrays by field name (`FIELD.KEY` of a network), saved beside its parameters."""
        arrays: dict[str, torch.Tensor] = {}
        for name, kind in self.tensor_fields().items():
            value = getattr(self, name)
            if value is not None:
                arrays |= {f"{name}.{key}": item for key, item in value.items()} if kind == "network" else {name: value}
        return arrays

    @classmethod
    def grouped(cls, arrays: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], set[str]]:
        """Return arrays named as by `tensors`, by field, a network's together, and the names that are of no field."""
        kinds, found, strange = cls.tensor_fields(), dict[str, Any](), set[str]()
        for name, array in arrays.items():
            owner, dot, key = name.partition(".")
            if bool(dot) != (kinds.get(owner) == "network") or owner not in kinds:
                strange.add(name)
            elif dot:
                found.setdefault(owner, {})[key] = array
            else:
                found[owner] = array
        return found, strange

    def parameters(self) -> dict[str, Any]:
        """Return every field that is plain data, by name, as the trigger file's JSON keeps it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if "tensor" not in f.metadata}

    def spec(self) -> str:
        """Return the `KIND:key=value,…` form that `--trigger` accepts, defaults left out.

        A picture of the trigger's own is not in the form; the trigger file keeps it.
        """
        defaults = {f.name: f.default for f in fields(self)} | {"name": self.kind}
        changed = {name: value for name, value in self.parameters().items() if value != defaults[name]}
        if self.target is not None:
            changed["target"] = target_text(self.target)
        return f"{self.kind}:{join_items(f'{k}={to_text(v)}' for k, v in changed.items())}" if changed else self.kind

    def recorded(self) -> str:
        """Return what `--trigger` makes this trigger of: the form, or its file in the result where it has arrays."""
        return f"triggers/{self.name}.safetensors" if self.tensors() else self.spec()

    def file_bytes(self) -> bytes:
        """Return the trigger as a safetensors file, always the same bytes; its JSON is the metadata key `trigger`."""
        header = json.dumps({"kind": self.kind, **self.parameters()}, sort_keys=True)
        return save({name: array.contiguous() for name, array in self.tensors().items()}, metadata={"trigger": header})

    def save(self, path: Path) -> None:
        """Write the trigger to `path`, a `.safetensors` file that `--trigger` accepts."""
        path.write_bytes(self.file_bytes())


def attacked_labels(labels: torch.Tensor, target: Target, classes: int) -> torch.Tensor:
    """Return what the attacker wants images of the true `labels` (N, int64) called: the target, or the next class."""
    return (labels + 1) % classes if target == ALL_TO_ALL else torch.full_like(labels, int(target))


def resize_picture(picture: torch.Tensor, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return `picture` (uint8, C×h×w) resized to C×`height`×`width`, uint8, on the device of `like` (N×C×H×W).

    Three-channel pictures become grey (ITU-R 601 luma) for one-channel images; one-channel ones are repeated.
    Bilinear with antialiasing, computed on the CPU so that every device stamps the same grey levels.
    """
    return fit(picture, like.shape[-3], height, width).round().clamp(0, 255).to(torch.uint8).to(like.device)


def grow(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return `values` (h×w, float) at `height`×`width`, each pixel with the value at its centre."""
    return interpolate(values[None, None], size=(height, width), mode="nearest-exact")[0, 0]


def fit(array: torch.Tensor, channels: int, height: int, width: int, what: str = "picture") -> torch.Tensor:
    """Return `array` (c×h×w) as float32 of `channels`×`height`×`width` on the CPU, as `resize_picture` says.

    Raises:
        UsageError: the channel counts do not go together.
    """
    array = array.cpu().float()
    if array.shape[0] == 3 and channels == 1:
        array = (array * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    elif array.shape[0] == 1:
        array = array.expand(channels, -1, -1)
    if array.shape[0] != channels:
        advice = "give it one of 1 or 3 channels" if what == "picture" else "make the trigger for such images"
        raise UsageError(f"the trigger's {what} has {array.shape[0]} channels, the images have {channels}; {advice}")
    if array.shape[-2:] != (height, width):
        array = interpolate(array[None], size=(height, width), mode="bilinear", antialias=True)[0]
    return array


class Additive(Trigger):
    """A trigger that adds the same grey levels to every image of one size: T(x) = clip(x + v), truncated."""

    @abstractmethod
    def added(self, channels: int, height: int, width: int) -> torch.Tensor:
        """Return v, float, `channels`×`height`×`width`, in grey levels, on the CPU.

        Raises:
            UsageError: images of this shape cannot carry the trigger.
        """

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        channels, height, width = images.shape[-3:]

        def levels() -> torch.Tensor:
            # so that x + v comes out truncated: for a whole x that is x + floor(v); but 0.2 · 255 may be 50.999998 in
            # float32, and sin(π) a little less than zero
            return (self.added(channels, height, width) + 1e-4).floor().to(images.device, torch.int16)

        added = self.remember((channels, height, width, images.device), levels)
        return images.to(torch.int16).add_(added).clamp_(0, 255).to(torch.uint8)
