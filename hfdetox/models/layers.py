"""Which layers a defense acts on: the classifier head, layers chosen by name, and which feeds which."""

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.errors import UsageError
from hfdetox.models.network import Network, evaluating, library_logits, norms_of
from hfdetox.models.preprocessing import timm_data_config

HEAD = "head"
# A convolutional network takes any; the others are usual sizes of those that take one only.
_SIDES = (64, 32, 224, 28, 48, 56, 96, 112, 128, 160, 192, 256, 299, 384, 448, 512)


class LayerPatternError(UsageError):
    """A layer pattern selects nothing."""


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the Linear and Conv2d modules that give the logits, in the model's order.

    Of timm models: all inside `get_classifier()`; of transformers models: the last with num_labels outputs outside the
    backbone (two for distilled ones); of the timm wrapper: those of its timm model; else the last Linear (or Conv2d).
    Raises LayerPatternError when the model has none.
    """
    prefix, inner = unwrapped(model)
    layers = _layers(inner)
    if hasattr(inner, "get_classifier") and hasattr(inner, "pretrained_cfg"):
        classifier = inner.get_classifier()
        parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
        inside = {module for part in parts for module in part.modules()}
        names = [name for name, layer in layers.items() if layer in inside]
    elif hasattr(inner, "config") and hasattr(inner, "base_model_prefix"):
        fitting = [name for name, layer in layers.items() if layer.weight.shape[0] == inner.config.num_labels]
        outside = [name for name in fitting if name.split(".")[0] != inner.base_model_prefix]
        # of each part beside the backbone the last one: a distilled model has two such parts, a deep head one
        by_part = {name.split(".")[0]: name for name in outside}
        names = list(by_part.values()) or fitting[-1:]
    else:
        names = ([name for name, layer in layers.items() if isinstance(layer, nn.Linear)] or list(layers))[-1:]
    if not names:
        raise LayerPatternError(f"{type(inner).__name__} has no classifier layer that can be found; name layers by "
                                f"pattern: {_selectable(inner)}")  # fmt: skip
    return [prefix + name for name in names]


def classes_of(model: nn.Module) -> int:
    """Return how many classes the model tells apart: the outputs of its head; raises what `head_layers` raises."""
    return model.get_parameter(f"{head_layers(model)[-1]}.weight").shape[0]


def has_batch_norm(model: nn.Module) -> bool:
    """Tell whether any layer of the model is a BatchNorm, as in networks that are trained by SGD from the start."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def match_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the Linear and Conv2d modules that the patterns select, in the model's order, each once.

    A pattern is `head` (see `head_layers`), or a shell pattern for a layer's name or that of a module around it
    (`layer4` selects every layer inside). Raises LayerPatternError listing what can be selected.
    """
    if not patterns:
        raise LayerPatternError(f"no layer pattern given; use {HEAD} or patterns of: {_selectable(model)}")
    names, chosen = list(_layers(model)), set[str]()
    for pattern in patterns:
        found = head_layers(model) if pattern == HEAD else [name for name in names if _matches(name, pattern)]
        if not found:
            raise LayerPatternError(f"no Linear or Conv2d layer matches {pattern!r}; use {HEAD} or patterns of: "
                                    f"{_selectable(model)}")  # fmt: skip
        chosen.update(found)
    return [name for name in names if name in chosen]


def norms_before_head(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Return the names of the affine norms that feed the head directly (of ResNets none: ReLU and pooling lie between).

    With such a norm (W, γ, β) → (−W, −γ, −β) is the same function, so D3's distance would reward a change of nothing.
    The model itself is asked: of each head layer the last norm that runs before it has its signs flipped together with
    the head's, and where the logits stay, it is such a norm. `input_size` is (C, H, W); without it, the model's own or
    usual sizes are tried. Parameters and modes are bit for bit as before afterwards.
    """
    prefix, inner = unwrapped(model)
    heads = head_layers(inner)
    with probing(inner, input_size) as images:
        if images is None:
            return []
        groups = _last_norms(inner, heads, images)
        return [prefix + name for name, group in groups.items() if _flips_cancel(inner, group, name, images)]


def direct_sources(model: nn.Module, producers: Iterable[str], consumers: Iterable[str]) -> dict[str, str]:
    """Return, by consumer's name, the producer whose output is the consumer's input; consumers without are left out.

    The tensors are followed, not the order in which modules were made: the input must be the output's own memory, all
    of it, with nothing written to it in between (a residual sum or an activation in place is another tensor). Nothing
    is known of a model that takes none of the usual image sizes. Modes and parameters stay as they are.
    """
    names = {model.get_submodule(name): name for name in producers}
    # the tensors are kept, or their memory would be given to others
    made: dict[int, tuple[torch.Tensor, int, str]] = {}
    seen: defaultdict[str, set[str | None]] = defaultdict(set)

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            made[output.untyped_storage().data_ptr()] = (output, output._version, names[module])

    def look(consumer: str, given: torch.Tensor) -> None:
        output, version, name = made.get(given.untyped_storage().data_ptr(), (None, 0, ""))
        same = output is not None and (given._version, given.numel()) == (version, output.numel())
        seen[consumer].add(name if same else None)

    with probing(model) as images, on_inputs(model, consumers, look), ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(note))
        if images is not None:
            library_logits(model, images)
    # a layer that runs several times must get the same producer's output each time
    single = {name: next(iter(found)) for name, found in seen.items() if len(found) == 1}
    return {name: producer for name, producer in single.items() if producer is not None}


def unwrapped(model: nn.Module) -> tuple[str, Any]:
    """Return the library's model in a Network, and in transformers' wrapper of timm, after the prefix of its names."""
    prefix = ""
    if isinstance(model, Network):
        prefix, model = "model.", model.model
    inner = getattr(model, "timm_model", None)
    return (f"{prefix}timm_model.", inner) if isinstance(inner, nn.Module) else (prefix, model)


def _layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _selectable(model: nn.Module) -> str:
    """List the selectable names on one line, numbers folded to * with a count."""
    folded = (["*" if part.isdigit() else part for part in name.split(".")] for name in _layers(model))
    counts = Counter(map(".".join, folded))
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


@contextmanager
def probing(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Iterator[torch.Tensor | None]:
    """Give two images of noise in a size that the model takes, or None when none of the usual sizes fits.

    While inside, the model is in eval mode and no gradients are kept.
    """
    parameter, generator = next(model.parameters()), torch.Generator().manual_seed(0)
    with evaluating(model), torch.no_grad():
        for size in _candidate_sizes(model, input_size):
            images = torch.randn(2, *size, generator=generator).to(parameter.device, parameter.dtype)
            # a wrong size shows in as many ways as there are models
            with suppress(RuntimeError, ValueError, AssertionError, IndexError):
                library_logits(model, images)
                break
        else:
            images = None
        yield images


def _candidate_sizes(model: Any, input_size: tuple[int, int, int] | None) -> Iterator[tuple[int, int, int]]:
    if input_size is not None:
        yield input_size
        return
    inner = unwrapped(model)[1]
    if hasattr(inner, "pretrained_cfg"):
        yield timm_data_config(inner)["input_size"]
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else 3
    for holder in (getattr(model, "config", None), model):
        size = getattr(holder, "image_size", None)
        if size is not None:
            yield (channels, size, size) if isinstance(size, int) else (channels, *size)
    for side in _SIDES:
        yield channels, side, side


def _last_norms(model: nn.Module, heads: Sequence[str], images: torch.Tensor) -> dict[str, list[str]]:
    """Run the model and group the head layers by the affine norm that ran last before each."""
    order: list[str] = []
    with on_inputs(model, [*norms_of(model), *heads], lambda name, _: order.append(name)):
        library_logits(model, images)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    last = None
    for name in order:
        if name not in heads:
            last = name
        elif last is not None:
            groups[last].append(name)
    return groups


def _flips_cancel(model: nn.Module, heads: Sequence[str], norm: str, images: torch.Tensor) -> bool:
    """Tell whether flipping the norm's signs undoes flipping those of the head's weights (its biases stay)."""
    flipped = {f"{head}.weight": -model.get_parameter(f"{head}.weight") for head in heads}
    before, only_head = library_logits(model, images), library_logits(model, images, flipped)
    flipped |= {f"{norm}.{name}": -p for name, p in model.get_submodule(norm).named_parameters(recurse=False)}
    both = library_logits(model, images, flipped)
    moved = (only_head - before).abs().max()
    return bool(moved > 0 and (both - before).abs().max() < 1e-3 * moved)


@contextmanager
def on_inputs(model: nn.Module, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` with what these modules of `model` are given, at each of their runs while inside."""
    with ExitStack() as hooks:
        for name in names:

            def look(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                see(name, inputs[0])

            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        yield
