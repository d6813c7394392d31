"""UNIT's bounds on activations (arXiv 2407.11372), the masked teacher among the ideas of `bets.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.models.network import Network


def bound(network: Network, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Cut the activations of `network` at UNIT's bounds from now on."""
    layers = [module for module in network.modules() if isinstance(module, (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU))]
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [layer.register_forward_hook(lambda _module, _given, out, place=place: seen[place].append(_channels(out)))
             for place, layer in enumerate(layers)]  # fmt: skip
    with torch.no_grad():
        for part in images[:1000].split(250):
            network(part)
    for hook in hooks:
        hook.remove()
    bounds = [(torch.cat(kept).mean(0) + 4 * torch.cat(kept).std(0)).requires_grad_() for kept in seen]
    best: list[Tensor] | None = None
    current: list[list[Tensor] | None] = [None]

    def cut(place: int) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
            if current[0] is None:
                return out
            value = current[0][place]
            return torch.minimum(out, value.view(-1, 1, 1) if out.dim() == 4 else value)

        return hook

    for place, layer in enumerate(layers):
        layer.register_forward_hook(cut(place))
    kept = len(images) * 4 // 5

    @torch.no_grad()
    def accuracy() -> float:
        right = [network(part).argmax(1) for part in images[kept:].split(250)]
        return float((torch.cat(right) == labels[kept:]).float().mean())

    came, current[0] = accuracy(), bounds
    adam, weight, good, bad = torch.optim.Adam(bounds, 1e-2, (0.5, 0.9)), 1e-3, 0, 0
    drawn, smallest = torch.Generator().manual_seed(0), math.inf
    for step in range(300):
        chosen = torch.randperm(kept, generator=drawn)[:128]
        logits = network(images[chosen])
        loss = cross_entropy(logits, labels[chosen]) + weight * torch.stack([value.mean() for value in bounds]).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        fine = float((logits.argmax(1) == labels[chosen]).float().mean()) >= came - 0.03
        good, bad = (good + 1, 0) if fine else (0, bad + 1)
        if good == 5:
            weight, good = weight * 2, 0
        if bad == 5:
            weight, bad = weight / 2**1.5, 0
        size = sum(float(value.detach().mean()) for value in bounds)
        if step % 20 == 19 and size < smallest and accuracy() >= came - 0.03:
            smallest, best = size, [value.detach().clone() for value in bounds]
    current[0] = best
    return {"layers": len(layers), "taken": float(best is not None)}


def _channels(out: Tensor) -> Tensor:
    """Return the activations (M×C), a few of each image."""
    rows = out.detach().permute(0, 2, 3, 1).flatten(0, 2) if out.dim() == 4 else out.detach().flatten(0, -2)
    return rows[:: max(1, len(rows) // 20_000)]
