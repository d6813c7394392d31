"""Sharpness-aware minimisation: the gradient is taken where the loss near the weights is highest."""

import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.errors import UsageError
from hfdetox.specs import read_pairs
from hfdetox.values import read


@dataclass(frozen=True)
class SharpnessAware:
    """The perturbation e = ρ·T²g / ‖T g‖₂ of the weights w before the gradient of a step is taken.

    T = |w| elementwise (adaptive, Kwon et al., arXiv 2102.11600) or the identity (Foret et al., arXiv 2010.01412);
    the norm is over all trained parameters together.

    Attributes:
        rho: radius ρ, above 0; 1 to 3 is usual for adaptive, 0.05 for plain.
        adaptive: scale each weight's perturbation by the weight.
    """

    rho: float = 2.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise UsageError(f"sam: rho must be above 0, got {self.rho}")

    def spec(self) -> str:
        """Return the `sam:key=value,…` form that `parse_adaptive` reads."""
        return f"sam:rho={self.rho},adaptive={str(self.adaptive).lower()}"

    @contextmanager
    def perturbed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Hold the parameters at w + e, where their gradients are g; on leaving they are w again, bit for bit.

        The gradients are cleared on entering, so that a backward pass inside leaves those at w + e.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        kept = [parameter.detach().clone() for parameter in trained]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        scaled = [g * w.abs() for g, w in zip(gradients, kept, strict=True)] if self.adaptive else gradients
        # scale-free, so a loss scaled for fp16 needs no unscaling; the small number keeps a zero gradient at zero
        norm = torch.stack([tensor.float().norm() for tensor in scaled]).norm() + 1e-12
        with torch.no_grad():
            for parameter, weight, direction in zip(trained, kept, scaled, strict=True):
                parameter.add_((direction * weight.abs() if self.adaptive else direction) * (self.rho / norm))
                parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(trained, kept, strict=True):
                    parameter.copy_(weight)


def parse_adaptive(text: str | None) -> SharpnessAware | None:
    """Return what `--adaptive sam:rho=2.0,adaptive=true` asks for; either key may be left out. None for None.

    Raises:
        UsageError: not `sam`, an unknown or repeated key, or a wrong value.
    """
    if text is None:
        return None
    method, _, rest = text.partition(":")
    if method != "sam":
        raise UsageError(f"--adaptive {text!r}: the adaptive attack is sam, as in sam:rho=2.0,adaptive=true")
    where, hints = f"--adaptive {text!r}", typing.get_type_hints(SharpnessAware)
    texts = read_pairs(where, filter(None, rest.split(",")), hints, "rho=…, adaptive=true|false")
    return SharpnessAware(**{k: read(f"{where}: {k}", hints[k], v, text=True) for k, v in texts.items()})


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BatchNorm, which still normalises by its batch in train mode."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
