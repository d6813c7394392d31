"""A GPU that is not there: which tensors would lie on it, and which lines would wait for it.

Tensors that a program makes without naming a device (random draws, lists) are the host's, and so is what is computed of
them alone; all others (weights, images, what is sent to a device) are the device's. Seen are Python's calls of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

PACKAGE = Path("hfdetox")
# they give a number or a list, or tensors whose size depends on values
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__complex__",
         "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "equal", "allclose", "is_nonzero",
         "bincount"}  # fmt: skip
# from something that is no tensor
MADE = {"tensor", "as_tensor", "from_numpy", "asarray"}
FACTORIES = {"rand", "randn", "randint", "randperm", "zeros", "ones", "empty", "full", "arange", "linspace", "eye",
             "normal", *MADE}  # fmt: skip
# they compute nothing; a copy is told of tensors that were copied before
UNSEEN = {"__get__", "__set__", "__delete__", "__repr__", "__format__", "__hash__", "__deepcopy__"}


@dataclass
class Waits(TorchFunctionMode):
    """Notes, while it is entered, what would wait for the device or mix it with the host.

    Attributes:
        in_steps: what happened within the steps of the engine's epochs: `LINE of FILE: what`.
        mixed: what computed with tensors of both, anywhere: on a GPU that is an error.
    """

    in_steps: set[str] = field(default_factory=set)
    mixed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:  # fmt: skip
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in UNSEEN:
            return func(*args, **kwargs)
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        here = [on_host(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        if name in FACTORIES and resolve_name(func) in (f"torch.{name}", None):
            return self._made(name, kwargs, here, result)
        if name in ("to", "cuda", "type_as"):
            return self._sent(args, kwargs, tensors, here, result)
        if name == "cpu":
            if not here[0]:
                self._note("cpu()")
                result = as_host(result.view_as(result))
            return result
        if name in ("__getitem__", "__setitem__"):
            self._indexed(name, args)
            if name == "__getitem__" and here[0]:
                as_host(result)
            return result
        if name in READS and not all(here):
            self._note(f"{name}()")
        elif name == "where" and len(args) == 1 and not all(here):
            self._note("where() of a condition alone")
        if name == "copy_":
            if here[0] != here[1] and tensors[1].ndim and not kwargs.get("non_blocking"):
                self._note("copy_() between host and device")
            return result
        if (
            any(here)
            and not all(here)
            and any(flag and tensor.ndim for flag, tensor in zip(here, tensors, strict=True))
        ):
            self._note(f"{name}() of tensors of the host and of the device", mixed=True)
        in_place = name.endswith("_") and not name.endswith("__")
        if tensors and all(here) and not in_place:
            for item in tree_leaves(result):
                if isinstance(item, torch.Tensor):
                    as_host(item)
        return result

    def _made(self, name: str, kwargs: dict[str, Any], here: list[bool], result: Any) -> Any:
        """Take a tensor that is made: the host's unless a device is named."""
        if kwargs.get("device") in (None, "cpu"):
            if not here or all(here):
                as_host(result)
        elif name in MADE and not (here and not any(here)):
            self._note(f"{name}(…, device=…)")
            return result.view_as(result) if on_host(result) else result
        return result

    def _sent(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], here: list[bool],
              result: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """Take a tensor that is sent, or turned into another type where it is."""
        places = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.device | str)]
        if not places and len(tensors) < 2:
            return as_host(result) if here[0] else result
        to_host = here[1] if len(tensors) > 1 else "cpu" in [place for place in places if isinstance(place, str)]
        if here[0] == to_host:
            return as_host(result) if to_host else result
        if to_host or not kwargs.get("non_blocking"):
            self._note("to(), which waits" + ("" if to_host else ": non_blocking=True"))
        # on a CPU the result is the very tensor
        fresh = result.view_as(result)
        return as_host(fresh) if to_host else fresh

    def _indexed(self, name: str, args: tuple[Any, ...]) -> None:
        """Look at what a tensor is indexed with."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        scalar = name == "__setitem__" and not (isinstance(args[2], torch.Tensor) and args[2].numel() > 1)
        for item in index:
            if on_host(args[0]):
                if isinstance(item, torch.Tensor) and not on_host(item):
                    self._note("the host's tensor indexed by the device's", mixed=True)
            elif isinstance(item, list) or (isinstance(item, torch.Tensor) and on_host(item)):
                self._note("the device's tensor indexed by the host's")
            elif isinstance(item, torch.Tensor) and (not item.ndim or (item.dtype == torch.bool and not scalar)):
                self._note("an index whose values are read")

    def _note(self, what: str, *, mixed: bool = False) -> None:
        frames = []
        frame = sys._getframe(2)
        while frame is not None:
            frames.append((frame.f_code.co_name, Path(frame.f_code.co_filename), frame.f_lineno))
            frame = frame.f_back  # type: ignore[assignment]
        ours = [
            (name, path, line)
            for name, path, line in frames
            if PACKAGE.name in path.parts and "tests" not in path.parts
        ]
        place = next((f"{path.parent.name}/{path.name}:{line}" for _, path, line in ours), "outside")
        functions = [name for name, path, _ in ours if path.name == "engine.py"]
        if mixed:
            self.mixed.add(f"{place}: {what}")
        if "epoch" in functions and "_means" not in functions:
            self.in_steps.add(f"{place}: {what}")


def on_host(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor would be the host's."""
    return bool(vars(tensor).get("_of_host"))


def as_host(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as the host's."""
    tensor._of_host = True  # type: ignore[attr-defined]
    return tensor
