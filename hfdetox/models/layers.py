"""Which layers a defense acts on: the classifier head, layers chosen by name, and which feeds which."""

import fnmatch
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hfdetox.errors import UsageError
from hfdetox.models.network import Network, evaluating, library_logits
from hfdetox.models.preprocessing import timm_data_config

logger = logging.getLogger(__name__)

HEAD = "head"
# what is left of a change that rounding alone makes
_NOTHING = 1e-3
# how many norms that do not feed the head directly are tried
_TRIES = 4
_MIXING = (nn.Linear, _ConvNd)
# A convolutional network takes any; the others are usual sizes of those that take one only.
_SIDES = (64, 32, 224, 28, 48, 56, 96, 112, 128, 160, 192, 256, 299, 384, 448, 512)


class LayerPatternError(UsageError):
    """A layer pattern selects nothing."""


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the Linear and Conv2d modules that give the logits, in the model's order.

    Of timm models: those of `get_classifier()` and of their configuration's `classifier`; of transformers models: the
    last with num_labels outputs of each part outside the backbone; of the timm wrapper: those of its timm model; of
    others all, or the last Linear (or Conv2d) where no images can be had. Of several, those of whose weights each row
    makes one logit: no hidden layers.
    Raises LayerPatternError when the model has none.
    """
    prefix, inner = unwrapped(model)
    layers = _layers(inner)
    if hasattr(inner, "get_classifier") and hasattr(inner, "pretrained_cfg"):
        classifier, named = inner.get_classifier(), inner.pretrained_cfg.get("classifier") or ()
        parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
        inside = {module for part in parts for module in part.modules()}
        # auxiliary heads are in the configuration alone
        paths = (named,) if isinstance(named, str) else named
        names = [name for name, layer in layers.items()
                 if layer in inside or any(_matches(name, path) for path in paths)]  # fmt: skip
    elif hasattr(inner, "config") and hasattr(inner, "base_model_prefix"):
        fitting = [name for name, layer in layers.items() if layer.weight.shape[0] == inner.config.num_labels]
        outside = [name for name in fitting if name.split(".")[0] != inner.base_model_prefix]
        # of each part beside the backbone the last one: a distilled model has two such parts, a deep head one
        by_part = {name.split(".")[0]: name for name in outside}
        names = list(by_part.values()) or fitting[-1:]
    else:
        names = list(layers)
    if not names:
        raise LayerPatternError(f"{type(inner).__name__} has no classifier layer that can be found; name layers by "
                                f"pattern: {_selectable(inner)}")  # fmt: skip
    found = []
    if len(names) > 1:
        with probing(model) as (images, logits):
            if images is not None and logits is not None:
                found = [name for name in names if _makes_logits(inner, name, images, logits)]
    if not found and len(names) == len(layers):
        found = ([name for name in names if isinstance(layers[name], nn.Linear)] or names)[-1:]
    _refuse_computed(inner, found or names)
    return [prefix + name for name in found or names]


def _refuse_computed(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if "weight" not in model.get_submodule(name)._parameters:
            raise LayerPatternError(f"{name} is weight- or spectral-normed and cannot be selected; make it plain "
                                    "with torch.nn.utils.parametrize.remove_parametrizations")  # fmt: skip


def _makes_logits(model: nn.Module, name: str, images: torch.Tensor, logits: torch.Tensor) -> bool:
    """Tell whether each output of a layer makes one logit: a change of the first one moves no other logit."""
    layer = _layers(model)[name]
    if len(layer.weight) != logits.shape[1]:
        return False

    def change(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.select(1 if isinstance(module, nn.Conv2d) else -1, 0).add_(1)

    with layer.register_forward_hook(change):
        moved = (library_logits(model, images) - logits).abs().amax(0)
    return bool(moved[1:].max() < _NOTHING * moved[0])


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
        _refuse_computed(model, found)
        chosen.update(found)
    return [name for name in names if name in chosen]


def norms_before_head(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Return the names of the affine norms that feed the head directly (of ResNets none: ReLU and pooling lie between).

    With such a norm (W, γ, β) → (−W, −γ, −β) is the same function, so D3's distance would reward a change of nothing.
    The model itself is asked: from the head backwards, each module that has only scales and shifts has its signs
    flipped (several together, where none does it alone), and where that turns what the head is given, it is such a
    norm. `input_size` is (C, H, W); without it, the model's own or usual sizes are tried. Parameters and modes are bit
    for bit as before afterwards.
    """
    prefix, inner = unwrapped(model)
    heads = [name.removeprefix(prefix) for name in head_layers(model)]
    leaves = [name for name, module in inner.named_modules() if scales(module)]
    given: dict[str, torch.Tensor] = {}
    with on_last_inputs(inner, [*leaves, *heads], given), probing(model, input_size) as (images, _):
        if images is None:
            logger.warning(f"{type(inner).__name__} takes no usual size of images; norms before its head are unknown: "
                           "set its attribute image_size to (height, width)")  # fmt: skip
            return []
        order, before = list(given), {name: given[name] for name in heads if name in given}
        # features without a value below 0 come from a ReLU, not from a norm, and need no search
        before = {name: features for name, features in before.items() if features.min() < 0}
        feeding, found = list[str](), list[str]()
        for name in reversed([name for name in order if before and name not in heads]):
            turns = _turns(inner, before, [name], images)
            if turns:
                found.append(name)
            elif turns is False:
                feeding.append(name)
                if found or len(feeding) == _TRIES:
                    break
        together = (feeding[:count] for count in range(2, len(feeding) + 1))
        found = found or next((names for names in together if _turns(inner, before, names, images)), [])
    return [prefix + name for name in leaves if name in found]


def scales(module: nn.Module) -> list[nn.Parameter]:
    """Return the scales of a module that multiplies and shifts channels and does no more; of others nothing."""
    own = dict(module.named_parameters(recurse=False))
    vectors = all(p.numel() == max(p.shape, default=1) for p in own.values()) and not isinstance(module, _MIXING)
    if not vectors or len(own) < len(list(module.parameters())):
        return []
    return [p for name, p in own.items() if name not in ("bias", "beta")]


def _turns(model: nn.Module, before: Mapping[str, torch.Tensor], norms: Sequence[str],
           images: torch.Tensor) -> bool | None:  # fmt: skip
    """Tell whether flipped signs of norms turn what heads are given, if they change it at all; None where not.

    Up to a constant, which the bias of a layer between (CoaT's aggregation) leaves, and the head's own bias takes up.
    """
    after: dict[str, torch.Tensor] = {}
    signs = {f"{norm}.{name}": -p for norm in norms for name, p in model.get_submodule(norm).named_parameters()}
    with on_last_inputs(model, before, after):
        library_logits(model, images, signs)
    changed = [(x, after[name]) for name, x in before.items() if not torch.equal(after[name], x)]
    left = [((x + turned).std(0).max(), x.std(0).max()) for x, turned in changed]
    return all(bool(rest < _NOTHING * scale) for rest, scale in left) if changed else None


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

    with probing(model) as (images, _), on_inputs(model, consumers, look), ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(note))
        if images is not None:
            library_logits(unwrapped(model)[1], images)
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
def probing(model: nn.Module, input_size: tuple[int, int, int] | None = None,
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor] | tuple[None, None]]:  # fmt: skip
    """Give two images of noise in a size that the model takes, and its logits; None twice when no usual size fits.

    While inside, the model is in eval mode and no gradients are kept.
    """
    inner: nn.Module = unwrapped(model)[1]
    parameter, generator = next(inner.parameters()), torch.Generator().manual_seed(0)
    with evaluating(inner), torch.no_grad():
        for size in _candidate_sizes(model, input_size):
            images = torch.randn(2, *size, generator=generator).to(parameter.device, parameter.dtype)
            # a wrong size shows in as many ways as there are models
            with suppress(RuntimeError, ValueError, AssertionError, IndexError):
                logits = library_logits(inner, images)
                break
        else:
            yield None, None
            return
        yield images, logits


def _candidate_sizes(model: nn.Module, input_size: tuple[int, int, int] | None) -> Iterator[tuple[int, int, int]]:
    inner = unwrapped(model)[1]
    if input_size is not None or isinstance(model, Network):
        yield input_size or model.input_size  # type: ignore[misc]
        return
    if hasattr(inner, "pretrained_cfg"):
        yield timm_data_config(inner)["input_size"]
    convolution = next((m for m in inner.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else 3
    config = getattr(inner, "config", None)
    for holder in (getattr(config, "vision_config", None), config, inner):
        size = getattr(holder, "image_size", None)
        if isinstance(size, int):
            yield channels, size, size
        elif size is not None:
            height, width = size.values() if isinstance(size, Mapping) else size
            yield channels, height, width
    # the first convolution that is declared need not be the first that runs
    yield from ((depth, side, side) for side in _SIDES for depth in dict.fromkeys((channels, 3)))


def on_last_inputs(model: nn.Module, names: Iterable[str],
                   given: dict[str, torch.Tensor]) -> AbstractContextManager[None]:  # fmt: skip
    """Note in `given` what these modules are given in their last runs, in the order of these."""

    def note(name: str, features: torch.Tensor) -> None:
        given.pop(name, None)
        given[name] = features

    return on_inputs(model, names, note)


@contextmanager
def on_inputs(model: nn.Module, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, input)` with what these modules of `model` are given, at each of their runs while inside."""
    with ExitStack() as hooks:
        for name in names:

            def look(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if inputs:
                    see(name, inputs[0])

            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(look))
        yield
