"""Where a network's feature maps come from: its stages (or transformer blocks), and a look at their outputs."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfdetox.errors import UsageError
from hfdetox.models.layers import head_layers, probing, unwrapped
from hfdetox.models.network import library_logits

Layout = Literal["NCHW", "NHWC", "NTC"]
# a network has up to five stages; longer rows are blocks, of which those that end a resolution are the stages
_STAGES = 5
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Stage:
    """A module whose output is a feature map, by its name in the model.

    Attributes:
        layout: how the output is laid out: channels first, channels last, or tokens.
        prefix: tokens before those of the image's positions (class, distillation, registers).
    """

    name: str
    layout: Layout
    prefix: int = 0

    def features(self, output: torch.Tensor) -> torch.Tensor:
        """Return an output of the module as N×positions×channels."""
        if self.layout == "NCHW":
            return output.flatten(2).transpose(1, 2)
        return output.flatten(1, 2) if self.layout == "NHWC" else output[:, self.prefix :]


def last_stages(model: nn.Module, count: int, input_size: tuple[int, int, int] | None = None) -> list[Stage]:
    """Return the last `count` stages of a library's model, in their order; fewer where it has fewer.

    Of timm models: what `feature_info` lists (stages, or a ViT's blocks). Else the row of sibling modules (members of
    a list, or children numbered like layer1, layer2) that holds most parameters; of a row longer than five whose
    outputs shrink, the last module of each size. The model is run once on noise of `input_size` (C, H, W), or without
    it of its own or usual sizes, in eval mode, and left as it was.

    Raises:
        UsageError: the model has no such row with feature maps over positions, or cannot be run on noise.
    """
    prefix, inner = unwrapped(model)
    heads = {inner.get_submodule(name) for name in head_layers(inner)}
    modules = dict(inner.named_modules())
    listed = _listed_by_timm(inner, modules)
    rows = [[name for name in row if _has_weights(modules[name], heads)] for row in _rows(modules)]
    names = sorted({name for row in (listed, *rows) for name in row})
    with probing(model, input_size) as (images, _), captured(inner, names) as outputs:
        if images is not None:
            library_logits(inner, images)
    chosen = _stages(inner, listed, outputs)
    if not chosen:
        chosen = _ends_of_sizes(_main_row([_stages(inner, row, outputs) for row in rows], modules), outputs)
    if not chosen:
        raise UsageError(f"{type(inner).__name__} has no stages or blocks that give feature maps, or takes no noise of "
                         "a usual size; use a method that needs none, such as ft-sam or d3")  # fmt: skip
    return [Stage(prefix + stage.name, stage.layout, stage.prefix) for stage in chosen[-count:]]


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the outputs of the named modules while inside: of tuples the first, of repeated calls the last."""
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple | list) and output else output
                if isinstance(first, torch.Tensor):
                    outputs[name] = first

            stack.enter_context(model.get_submodule(name).register_forward_hook(keep))
        yield outputs


def _listed_by_timm(model: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    entries = list(getattr(model, "feature_info", None) or [])
    # an entry of another hook type means a module's input
    if any(entry.get("hook_type", "forward") != "forward" for entry in entries):
        return []
    return [entry["module"] for entry in entries if entry["module"] in modules]


def _rows(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return the rows of sibling modules, outer ones first: lists, sequences, and children numbered alike."""
    rows: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(filter(None, modules), key=lambda name: name.count(".")):
        parent, _, child = name.rpartition(".")
        if isinstance(modules[parent], nn.ModuleList | nn.Sequential):
            rows[parent, ""].append(name)
        elif child[-1].isdigit():
            rows[parent, child.rstrip("0123456789")].append(name)
    return list(rows.values())


def _has_weights(module: nn.Module, heads: set[nn.Module]) -> bool:
    """Tell whether a module computes features: it has weight matrices or kernels and does not hold the head."""
    return any(p.ndim > 1 for p in module.parameters()) and not any(m in heads for m in module.modules())


def _stages(model: Any, row: Sequence[str], outputs: Mapping[str, torch.Tensor]) -> list[Stage]:
    """Return those of a row that ran and gave a feature map over positions."""
    return [stage for name in row if name in outputs and (stage := _stage(model, name, outputs[name]))]


def _stage(model: Any, name: str, output: torch.Tensor) -> Stage | None:
    if output.ndim == 3:
        # noise is square, so that a square number of tokens has none in front of it
        tokens = output.shape[1]
        return Stage(name, "NTC", 0 if math.isqrt(tokens) ** 2 == tokens else _prefix_tokens(model))
    if output.ndim != 4:
        return None
    _, first, second, third = output.shape
    last = getattr(model, "output_fmt", None) == "NHWC" or (first == second != third)
    return Stage(name, "NHWC" if last else "NCHW")


def _prefix_tokens(model: Any) -> int:
    known = getattr(model, "num_prefix_tokens", None)
    if isinstance(known, int):
        return known
    return sum(p.shape[1] for name, p in model.named_parameters()
               if re.search(r"(?<!mask)_tokens?$", name) and p.ndim == 3)  # fmt: skip


def _main_row(rows: Sequence[list[Stage]], modules: Mapping[str, nn.Module]) -> list[Stage]:
    """Return the row with most parameters; in place of a lone module the row inside that has nearly all of it."""
    sizes = [sum(p.numel() for stage in row for p in modules[stage.name].parameters()) for row in rows]
    least = _NEARLY_ALL * max(sizes, default=0)
    large = [(len(row) > 1, size, row) for row, size in zip(rows, sizes, strict=True) if size >= least]
    return max(large, key=lambda entry: entry[:2], default=(False, 0, []))[2]


def _ends_of_sizes(row: list[Stage], outputs: Mapping[str, torch.Tensor]) -> list[Stage]:
    sizes = [stage.features(outputs[stage.name]).shape[1] for stage in row]
    if len(row) <= _STAGES or len(set(sizes)) == 1:
        return row
    return [stage for place, stage in enumerate(row) if place + 1 == len(row) or sizes[place + 1] != sizes[place]]
