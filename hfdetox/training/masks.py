"""Masks on channels: on the scales of norms, or on hidden units and attention heads; exact to fold into the weights.

A mask m (one number a channel) acts by multiplying a parameter:

- of a network with BatchNorm (or GroupNorm): γ_c → m_c γ_c for every affine norm of that kind; β_c stays.
- of a network without: the columns of the projection that reads the units. m_j multiplies column j of an MLP's second
  layer (fc2; ConvNeXt's pointwise convolution), and the columns of one head in attention's output projection. The
  scales of LayerNorm are left alone: they act on all tokens' residual streams, not on one unit.

Masks are applied by calling the network with multiplied parameters in place of its own, without hooks or changed
modules (timm's BatchNormAct2d has its activation inside), so a folded network computes the same numbers bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Stateful
from hfdetox.training.sharpness import frozen_statistics

# the layers of an MLP by the names that timm, transformers and torch give them
_MLP = (("fc1", "fc2"), ("pwconv1", "pwconv2"), ("linear1", "linear2"), ("intermediate.dense", "output.dense"))
_ATTENTION_OUTPUT = ("proj", "o_proj", "out_proj")
# an MLP on so few numbers reads coordinates (relative position biases), no features of images
_COORDINATES = 3

Noise = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MaskedLayer:
    """What the masks of one layer multiply.

    Attributes:
        weight: the parameter's name in the network: a norm's γ, a convolution's kernels or a projection's weight.
        shift: the name of a norm's β or of a convolution's bias; None for projections and layers without.
        units: how many masks the layer has.
        width: columns of one unit of a projection, a head's size or 1; 0 of layers whose units are rows.
    """

    weight: str
    shift: str | None
    units: int
    width: int = 0

    def spread(self, mask: torch.Tensor, dimensions: int) -> torch.Tensor:
        """Return the layer's masks (`units`) in the shape that multiplies its weight of so many dimensions."""
        if not self.width:
            return mask.reshape(-1, *[1] * (dimensions - 1))
        return mask.repeat_interleave(self.width).reshape(1, -1, *[1] * (dimensions - 2))


class ChannelMasks:
    """The masks of a network, all layers' in one flat tensor of `count` numbers in the model's order.

    Layers are kept by name, so that a copy of the network takes the same masks.

    Args:
        network: its norms are masked, or its hidden units and heads when it has none; or the `layers` named.
        method: who asks, for the error.

    Raises:
        UsageError: the network has neither.
    """

    def __init__(self, network: nn.Module, method: str, layers: list[MaskedLayer] | None = None) -> None:
        self.layers = layers or norm_layers(network) or unit_layers(network)
        if not self.layers:
            name = type(getattr(network, "model", network)).__name__
            raise UsageError(f"{method}: prunes channels of BatchNorm, hidden units of MLPs or attention heads, and "
                             f"{name} has none that can be found; use another defense")  # fmt: skip
        self.sizes = [layer.units for layer in self.layers]
        self.count = sum(self.sizes)

    def tensors(self, network: nn.Module, mask: torch.Tensor,
                shift: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return the multiplied parameters by name; `shift` (flat, like `mask`) multiplies the βs that there are."""
        found: dict[str, torch.Tensor] = {}
        scales = mask.split(self.sizes)
        # the same pieces of the same mask: gradients are summed in one order
        shifts = scales if shift is mask else [None] * len(scales) if shift is None else shift.split(self.sizes)
        for layer, scale, factor in zip(self.layers, scales, shifts, strict=True):
            weight = network.get_parameter(layer.weight)
            found[layer.weight] = weight * layer.spread(scale, weight.ndim)
            if factor is not None and layer.shift is not None:
                found[layer.shift] = network.get_parameter(layer.shift) * factor
        return found

    def logits(self, network: nn.Module, images: torch.Tensor, mask: torch.Tensor,
               shift: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Return the network's logits (N×K) under masks, differentiable in them; the network stays as it is."""
        return functional_call(network, self.tensors(network, mask, shift), (images,))

    @torch.no_grad()
    def fold(self, network: nn.Module, mask: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        """Multiply the masks into the network's own parameters; those of masks equal to 1 keep every bit."""
        for name, tensor in self.tensors(network, mask, shift).items():
            network.get_parameter(name).copy_(tensor)


class MaskedNetwork(nn.Module):
    """A network under trainable masks, which start at 1 (`mask`, float32); running statistics stand still.

    In train mode BatchNorm normalises by the batch, as the pruning papers train their masks.
    """

    def __init__(self, network: nn.Module, masks: ChannelMasks) -> None:
        super().__init__()
        self.network = network
        self.masks = masks
        self.mask = nn.Parameter(torch.ones(masks.count))

    def forward(self, images: torch.Tensor, *noises: Noise | None) -> tuple[torch.Tensor, ...]:
        """Return logits (N×K) for each noise: None for the masks alone, (δ, ξ) for scales m + δ and shifts 1 + ξ."""
        with frozen_statistics(self.network):
            factors = [(self.mask, None) if noise is None else (self.mask + noise[0], 1 + noise[1]) for noise in noises]
            return tuple(self.masks.logits(self.network, images, mask, shift) for mask, shift in factors)

    @torch.no_grad()
    def project(self) -> None:
        """Put every mask back into [0, 1], in place."""
        self.mask.clamp_(0, 1)


@dataclass
class ThresholdSearch:
    """Prunes the units whose mask is at most τ, with the highest τ that keeps the accuracy on the images of its pass.

    From the lowest candidate upwards, τ rises while the accuracy is at most `budget` below that of the whole network;
    the first candidate that costs more ends the search. No image with a trigger takes part.

    Args:
        network: what is pruned, by folding 0 into its parameters; all other masks count as 1.
        values: gives the trained masks once the pass starts.
        thresholds: the candidates τ, ascending.
        budget: allowed drop in accuracy, a share of the images.
    """

    network: nn.Module
    masks: ChannelMasks
    values: Callable[[], torch.Tensor]
    thresholds: Sequence[float]
    budget: float

    def as_pass(self, name: str, state: Stateful) -> Pass:
        """Return the pass over the held-out part that finds τ and prunes."""
        return Pass(name=name, start=self.start, on_batch=self.on_batch, finish=self.finish, part="held-out",
                    state=state)  # fmt: skip

    def start(self) -> None:
        """List the candidates that differ: of thresholds that prune the same units only the highest is measured."""
        values = self.values().detach()
        # the first is the whole network
        distinct = {0: (-1.0, torch.ones_like(values))}
        for threshold in self.thresholds:
            kept = (values > threshold).to(values.dtype)
            if pruned := int(values.numel() - kept.sum()):
                distinct[pruned] = (threshold, kept)
        self.candidates = list(distinct.values())
        # right answers under every candidate, then the images
        self.counts = torch.zeros(len(self.candidates) + 1, device=values.device)

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Count the right answers under every candidate."""
        answers = [self.masks.logits(network, batch.images, kept) for _, kept in self.candidates]
        right = [(logits.argmax(1) == batch.labels).sum() for logits in answers]
        self.counts += torch.stack([*right, right[0].new_tensor(len(batch.labels))])

    def finish(self, accelerator: Accelerator) -> dict[str, float]:
        """Fold the chosen candidate into the network; return `threshold` (−1 for none), `pruned` and accuracies."""
        *right, images = accelerator.reduce(self.counts, reduction="sum").tolist()
        # a whole number of images is compared: rounding must not refuse a drop that is just the budget
        least = right[0] - self.budget * images - 1e-6
        last = len(list(takewhile(lambda count: count >= least, right))) - 1
        threshold, kept = self.candidates[last]
        pruned = int(kept.numel() - kept.sum())
        self.masks.fold(self.network, kept)
        return {"threshold": threshold, "pruned": pruned, "unchanged": float(not pruned), "units": self.masks.count,
                "held_out_accuracy_before": right[0] / images, "held_out_accuracy": right[last] / images}  # fmt: skip


def norm_layers(network: nn.Module) -> list[MaskedLayer]:
    """Return the affine norms with a scale a channel: BatchNorm of any kind, and GroupNorm of more groups than one."""
    found = []
    for name, module in network.named_modules():
        grouped = isinstance(module, nn.GroupNorm) and module.num_groups > 1
        if (isinstance(module, _BatchNorm) or grouped) and isinstance(module.weight, nn.Parameter):
            shift = f"{name}.bias" if isinstance(module.bias, nn.Parameter) else None
            found.append(MaskedLayer(f"{name}.weight", shift, module.weight.numel()))
    return found


def unit_layers(network: nn.Module) -> list[MaskedLayer]:
    """Return the projections that read hidden units of MLPs and attention heads, in the network's order."""
    modules = dict(network.named_modules())
    widths = {second: 1 for _, second in mlp_layers(network)}
    for name, module in modules.items():
        heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if not isinstance(heads, int):
            continue
        # the first transformers 5 have the projection in a module of its own, beside the one with the heads
        outputs = [*(f"{name}.{child}" for child in _ATTENTION_OUTPUT), f"{name.rpartition('.')[0]}.output.dense"]
        for output in (path.removeprefix(".") for path in outputs):
            layer = modules.get(output)
            if isinstance(layer, nn.Linear) and layer.in_features % heads == 0:
                widths.setdefault(output, layer.in_features // heads)
    inputs = {name: module.get_parameter("weight").shape[1] for name, module in modules.items() if name in widths}
    return [MaskedLayer(f"{name}.weight", None, inputs[name] // widths[name], widths[name]) for name in inputs]


def mlp_layers(network: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each MLP's two layers (Linear or 1×1 convolutions): by name, or next to each other in a
    Sequential with nothing that has parameters between them."""
    modules = dict(network.named_modules())
    pairs: dict[tuple[str, str], None] = {}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        for first, second in [*_MLP, *_neighbours(module)]:
            if _fit(modules.get(prefix + first), modules.get(prefix + second)):
                pairs[prefix + first, prefix + second] = None
    return list(pairs)


def _neighbours(module: nn.Module) -> Iterator[tuple[str, str]]:
    before = None
    for name, child in module.named_children() if isinstance(module, nn.Sequential) else ():
        if pointwise(child):
            if before is not None:
                yield before, name
            before = name
        elif next(child.parameters(), None) is not None:
            before = None


def pointwise(layer: nn.Module | None) -> bool:
    """Tell whether a layer is a Linear or a 1×1 convolution of all channels: a matrix at every position."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def _fit(first: nn.Module | None, second: nn.Module | None) -> bool:
    if first is None or second is None or not pointwise(first) or not pointwise(second):
        return False
    hidden, read = first.get_parameter("weight").shape[:2]
    return read > _COORDINATES and second.get_parameter("weight").shape[1] == hidden
