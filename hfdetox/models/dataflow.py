"""Which layer's output another layer gets, unchanged: asked of the model itself by running it on noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfdetox.models.layers import library_logits, probe_input


def direct_sources(
    model: nn.Module, producers: Mapping[str, nn.Module], consumers: Mapping[str, nn.Module]
) -> dict[str, str] | None:
    """Return, by consumer's name, the producer whose output is the consumer's input; consumers without are left out.

    The tensors are followed, not the order in which modules were made: the input must be the output's own memory, all
    of it, with nothing written to it in between (a residual sum or an activation in place is another tensor). None
    when the model takes none of the usual image sizes. Modes and parameters stay as they are.
    """
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            images = probe_input(model, None)
            return None if images is None else _observed(model, producers, consumers, images)
    finally:
        for module, training in was_training:
            module.training = training


def _observed(model: nn.Module, producers: Mapping[str, nn.Module], consumers: Mapping[str, nn.Module],
              images: torch.Tensor) -> dict[str, str]:  # fmt: skip
    names = {module: name for name, module in producers.items()}
    readers = {module: name for name, module in consumers.items()}
    # the tensors are kept, or their memory would be given to others
    made: dict[int, tuple[torch.Tensor, int, str]] = {}
    seen: dict[str, set[str | None]] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            made[output.untyped_storage().data_ptr()] = (output, output._version, names[module])

    def look(module: nn.Module, inputs: Any) -> None:
        found = None
        if inputs and isinstance(inputs[0], torch.Tensor):
            entry = made.get(inputs[0].untyped_storage().data_ptr())
            if entry is not None and (inputs[0]._version, inputs[0].numel()) == (entry[1], entry[0].numel()):
                found = entry[2]
        seen.setdefault(readers[module], set()).add(found)

    handles = [module.register_forward_hook(note) for module in names]
    handles += [module.register_forward_pre_hook(look) for module in readers]
    try:
        library_logits(model, images)
    finally:
        for handle in handles:
            handle.remove()
    # a layer that runs several times must get the same producer's output each time
    single = {name: next(iter(found)) for name, found in seen.items() if len(found) == 1}
    return {name: producer for name, producer in single.items() if producer is not None}
