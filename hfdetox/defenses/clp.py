"""CLP, channel Lipschitzness based pruning (Zheng et al., ECCV 2022, arXiv 2208.03111). It needs no images.

A channel that a trigger can drive far is one with a large Lipschitz constant. For a convolution W whose output goes
into BatchNorm, channel c is bounded by the spectral norm

    σ_c = ‖ (γ_c / √(var_c + ϵ)) · W_c ‖₂,   W_c reshaped to C_in × k²

and the channels with σ_c > mean + u · std over their layer are set to zero (γ_c = β_c = 0).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.defenses.base import Batch, DefenseConfig, Network, Pass, Phase
from hfdetox.errors import UsageError
from hfdetox.models.layers import direct_sources
from hfdetox.training.masks import mlp_layers
from hfdetox.values import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class OutlierConfig(DefenseConfig):
    """The setting of the methods that prune what stands out of its layer: `u` standard deviations above the mean."""

    u: NonNegativeFloat = 3.0


@dataclass(frozen=True, kw_only=True)
class CLPConfig(OutlierConfig):
    """Settings of CLP; the default is the paper's.

    Attributes:
        u: how many standard deviations above its layer's mean a channel's bound may lie, at least 0; 3 for CIFAR-10, 5
            for Tiny ImageNet. A layer of n channels has none beyond (n − 1) / √n deviations, whatever its weights.
    """

    name = "clp"
    summary = "prune the channels with outstanding Lipschitz bounds; needs no images"
    paper = "arXiv 2208.03111 (ECCV 2022)"
    data = "none"
    cost = "0"
    card_text = ("CLP, channel Lipschitzness based pruning (arXiv 2208.03111), set the channels to zero whose "
                 "Lipschitz bounds stand out from their layer's. It looks at weights only; {images} were given to the "
                 "run.")  # fmt: skip
    presets: ClassVar = {"paper": {}, "tiny-imagenet": {"u": 5.0}}

    def phases(self, network: Network) -> list[Phase | Pass]:
        clp = CLP(network.model, self.u)
        # the engine's passes go over images: this one takes no notice of the few of the smallest part
        return [Pass(name="clp", on_batch=_ignore, finish=clp.prune, part="held-out")]


class CLP:
    """The channels of a model with the bounds that CLP judges them by.

    Pairs are found by following tensors through the model: a BatchNorm that gets a convolution's output itself. One
    that reads a residual sum (pre-activation networks) has no convolution of its own and is left alone.

    Without such pairs, the hidden units of MLPs are judged: σ_j = ‖γ ⊙ w_j‖₂ · ‖u_j‖₂ for row w_j of the first layer,
    column u_j of the second and the scale γ of the norm that feeds the first (1 where none does directly); pruned are
    the columns. That is this project's reading for ViT, Swin and ConvNeXt, of which the paper does not speak.

    Args:
        model: the library's module.
        u: the outlier threshold.

    Raises:
        UsageError: the model has neither.
    """

    def __init__(self, model: nn.Module, u: float) -> None:
        self.model, self.u = model, u
        self.pairs = conv_norm_pairs(model)
        self.mlps = [] if self.pairs else mlp_layers(model)
        if not self.pairs and not self.mlps:
            raise UsageError(f"clp: no convolution of {type(model).__name__} that could be run is followed by "
                             "BatchNorm directly, and it has no MLP whose two layers can be found; use another "
                             "defense")  # fmt: skip
        self.feeding = norms_of_mlps(model, self.mlps) if self.mlps else {}

    @torch.no_grad()
    def prune(self, accelerator: Accelerator) -> dict[str, float]:
        """Set the outstanding channels to zero, in place, and return how many of how many, for the history."""
        outliers = Outliers(self.u)
        for conv, norm in self.pairs:
            scaled = self.model.get_submodule(norm)
            outliers.cut(conv_bounds(self.model.get_submodule(conv), scaled), *scaled.parameters(recurse=False))
        for first, second in self.mlps:
            scale = self.model.get_parameter(f"{self.feeding[first]}.weight") if first in self.feeding else None
            rows, columns = (self.model.get_parameter(f"{name}.weight") for name in (first, second))
            outliers.cut(unit_bounds(rows, columns, scale), columns.transpose(0, 1))
        return outliers.found()


class Outliers:
    """Cuts the channels off whose bounds exceed mean + u · std of their layer's, and counts."""

    def __init__(self, u: float) -> None:
        self.u, self.pruned, self.channels = u, 0, 0

    def cut(self, bounds: Tensor, *parameters: Tensor) -> None:
        """Set the rows of the outstanding channels of a layer to zero, in place; the others keep their bits."""
        chosen = outstanding(bounds, self.u)
        for parameter in parameters:
            parameter[chosen] = 0
        self.pruned += int(chosen.sum())
        self.channels += len(chosen)

    def found(self) -> dict[str, float]:
        """Return how many of how many `channels` were `pruned`, for the history."""
        return {"pruned": self.pruned, "channels": self.channels, "unchanged": float(not self.pruned)}


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the affine BatchNorms with running statistics by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.affine and module.running_var is not None}  # fmt: skip


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names (convolution, norm) of each affine BatchNorm with statistics and the Conv2d it follows."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    norms = running_norms(model)
    if not convs or not norms:
        return []
    sources = direct_sources(model, convs, norms)
    return [(sources[norm], norm) for norm in norms if norm in sources]


def norms_of_mlps(model: nn.Module, mlps: list[tuple[str, str]]) -> dict[str, str]:
    """Return, by the name of an MLP's first layer, the LayerNorm whose output it gets; layers without are left out."""
    norms = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
             and "norm" in type(m).__name__.lower()}  # fmt: skip
    firsts = {first: model.get_submodule(first) for first, _ in mlps}
    found = direct_sources(model, norms, firsts).items()
    width = {name: module.get_parameter("weight").shape for name, module in [*norms.items(), *firsts.items()]}
    return {first: norm for first, norm in found if width[norm] == width[first][1:2]}


def conv_bounds(conv: nn.Module, norm: nn.Module) -> Tensor:
    """Return σ (one a channel, float32) of a convolution (C × C_in × k × k) under the BatchNorm that follows it.

    The ϵ is BatchNorm's own, as in what it computes: without it a dead channel has no finite bound.
    """
    kernel, scale = conv.get_parameter("weight").float(), norm.get_parameter("weight").float()
    deviation = (norm.get_buffer("running_var").float() + float(norm.eps)).sqrt()  # type: ignore[arg-type]
    matrices = kernel.flatten(2) * (scale / deviation).reshape(-1, 1, 1)
    return torch.linalg.matrix_norm(matrices, ord=2)


def unit_bounds(rows: Tensor, columns: Tensor, scale: Tensor | None) -> Tensor:
    """Return σ (one a unit, float32) of an MLP's weights `rows` (units × in) and `columns` (out × units)."""
    inward = rows.float().flatten(1) if scale is None else rows.float().flatten(1) * scale.float()
    return torch.linalg.vector_norm(inward, dim=1) * torch.linalg.vector_norm(columns.float().flatten(1), dim=0)


def outstanding(bounds: Tensor, u: float) -> Tensor:
    """Return where bounds exceed mean + u · std of all of them (bool); a single channel never stands out."""
    if len(bounds) < 2:
        return torch.zeros_like(bounds, dtype=torch.bool)
    return bounds > bounds.mean() + u * bounds.std()


def _ignore(network: nn.Module, batch: Batch) -> None:
    """Look at nothing."""
