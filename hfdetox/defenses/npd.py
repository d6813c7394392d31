"""NPD, the neural polarizer (Zhu et al., NeurIPS 2023, arXiv 2306.16697).

One linear map g of the channels, put into the frozen network f, is trained to let clean features pass and to stop those
of a trigger:

    min over g of  ce(f_g(x), y) + λ_c · ce(f_g(x+δ), argmax f_g(x))
                   − λ_u · log(1 − p_{y'}(x+δ)) − λ_t · log(1 − p_t(x+δ))

where δ, in an ℓ2 ball, leads x to t, the likeliest class other than y, and y' is the likeliest other than y at x+δ.

The polarizer stands directly before one Conv2d or Linear, which is linear too: layer(g(x)) is the same layer with the
weight W·G (of a convolution Σ_m W[o, m] G[m, c] at each position of the kernel). So the trained polarizer is folded
into that layer exactly, and the result is the library's own model; f_g is computed with the folded weight throughout.

The authors' polarizer has a BatchNorm behind its 1×1 convolution. It is left out here: its shift would come before the
zero padding of the convolution that follows, where no weight and no bias of that convolution can put it (the border
would be wrong). What G can be is the same without it, what training makes of G in a given time is not: behind a norm of
deviation σ a step is about 1/σ² as large, and the norm moves the start away from f. So this NPD changes less than the
authors' in as many epochs, in accuracy and in attack success. Likewise the polarizer of a transformer stands before a
Linear within the last block, not on the residual stream before it.

−log(1 − p) is taken as it is; the authors' code adds 1e-4 to its argument, which bounds it where p is near 1.
"""

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hfdetox.defenses._perturbed import FrozenMethod, OwnState, neg_log_complement, require_pixels, runner_up
from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig
from hfdetox.errors import UsageError
from hfdetox.models.layers import head_layers, match_layers
from hfdetox.training.augment import Augmentation
from hfdetox.training.search import PIXEL
from hfdetox.values import Interval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# modules with more layers than this are whole networks or stages, not blocks
_BLOCK = 4
# projections beside a block, which some libraries register before its own layers
_SHORTCUTS = {"downsample", "shortcut"}


@dataclass(frozen=True, kw_only=True)
class NPDConfig(TuningConfig):
    """Settings of NPD; the defaults are those of BackdoorBench on CIFAR-10.

    The authors draw the same number of clean images of each class; here they are taken as they come.

    Attributes:
        learning_rate: of SGD, constant, after the warm-up; `epochs` are those after it, too.
        augmentation: none, as in the authors' code.
        layer: the Conv2d (of one group) or Linear that the polarizer is put before; `auto` is the first one of the last
            block, shortcuts aside (`layer4.1.conv1` of a ResNet-18, `blocks.11.mlp.fc1` of a ViT-B).
        warmup: epochs at `warmup_rate` on the clean loss alone, before; at least 0.
        warmup_rate: learning rate of those, without momentum and weight decay.
        radius: of the ℓ2 ball of δ, in pixels of [0, 1]; None is 3 at 32 pixels of height and in proportion else.
        step: of one signed gradient step, in pixels of [0, 1].
        steps: gradient steps, at least 1.
        stop: share of a batch at its targets from which no further step is made, in (0, 1].
        consistency: λ_c, at least 0 (as the others).
        untargeted: λ_u.
        targeted: λ_t.
    """

    name = "npd"
    summary = "train one linear map of the channels inside the frozen model, then fold it in"
    paper = "arXiv 2306.16697 (NeurIPS 2023)"
    cost = "2 to 3"
    times = 4.0
    card_text = ("NPD, the neural polarizer (arXiv 2306.16697), trained a linear map of the channels before one layer "
                 "on {images} and adversarially perturbed copies of them, and folded it into that layer; every other "
                 "weight is the author's.")  # fmt: skip
    presets: ClassVar = {"paper": {}}

    epochs: int = 50
    batch_size: int = 128
    weight_decay: float = 5e-4
    augmentation: Augmentation = "none"
    layer: str = "auto"
    warmup: NonNegativeInt = 5
    warmup_rate: PositiveFloat = 1e-4
    radius: PositiveFloat | None = None
    step: PositiveFloat = 0.1
    steps: PositiveInt = 2
    stop: Annotated[float, Interval("(0, 1]")] = 0.6
    consistency: NonNegativeFloat = 0.4
    untargeted: NonNegativeFloat = 0.4
    targeted: NonNegativeFloat = 0.4

    def selected_layers(self, model: nn.Module) -> list[str]:
        return [polarized_layer(model, self.layer)]

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        return tuple(effort + self.warmup * images for effort in super().efforts(images, classes))

    def phases(self, network: Network) -> list[Phase | Pass]:
        require_pixels(network, self.name)
        polarized = Polarized(network, self)
        shared: dict[str, Any] = {"parameters": [polarized.polarizer], "schedule": "constant",
                                  "state": OwnState(polarized), "after_step": polarized.fold}  # fmt: skip

        def warm_up(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return model(batch, perturbed=False)

        # the network afterwards: to `reweight`, a phase on one of its own does not train the classifier; this one does
        main = replace(self.phase(name="npd", loss=operator.call, **shared), network=polarized)
        if not self.warmup:
            return [main]
        # what the classes lose is measured on images that no epoch trains on
        part = "all" if self.reweight == "none" else "fit"
        slowly = partial(torch.optim.SGD, lr=self.warmup_rate)
        first = replace(self, reweight="none").phase(name="npd-warmup", network=polarized, loss=warm_up,
                                                     epochs=self.warmup, optimizer=slowly, part=part,
                                                     **shared)  # fmt: skip
        return [first, main]

    def project(self, delta: Tensor) -> Tensor:
        """Return the point of each image's ball nearest to `delta` (N×C×H×W, pixels of [0, 1])."""
        radius = 3 * delta.shape[-2] / 32 if self.radius is None else self.radius
        size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return delta * (radius / size.clamp(min=radius))


class Polarized(FrozenMethod):
    """The frozen network, in eval mode, with the polarizer G (C×C, the identity at first) before one layer."""

    def __init__(self, network: Network, config: NPDConfig) -> None:
        super().__init__(network)
        self.config = config
        self.weight = f"model.{polarized_layer(network.model, config.layer)}.weight"
        weight = network.get_parameter(self.weight).detach()
        self.original = nn.Buffer(weight.clone())
        self.polarizer = nn.Parameter(torch.eye(weight.shape[1], dtype=weight.dtype))

    @torch.no_grad()
    def fold(self) -> None:
        """Write the layer's weight, with the polarizer as it is now in it, into the network."""
        self.network.get_parameter(self.weight).copy_(folded(self.original, self.polarizer))

    def forward(self, batch: Batch, perturbed: bool = True) -> dict[str, Tensor]:
        """Return the terms of a batch, or its clean loss alone."""
        x = batch.images.float()
        weight = folded(self.original, self.polarizer)
        if not perturbed:
            loss = batch.cross_entropy(self._logits(x, weight))
            return {"loss": loss, "clean_loss": loss}
        delta, targets = self.perturbation(x, batch.labels, weight.detach())
        clean, moved = self._logits(torch.cat([x, x + PIXEL * delta]), weight).float().chunk(2)
        return self.terms(batch, clean, moved, targets)

    def terms(self, batch: Batch, clean: Tensor, moved: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss and its terms (0-d) of a batch's logits at x and x+δ (N×K), and t (N, int64)."""
        config = self.config
        clean_loss, consistency = batch.cross_entropy(clean), batch.cross_entropy(moved, clean.detach().argmax(1))
        untargeted = batch.mean(neg_log_complement(moved, runner_up(moved, batch.labels)))
        targeted = batch.mean(neg_log_complement(moved, targets))
        loss = clean_loss + config.consistency * consistency
        loss = loss + config.untargeted * untargeted + config.targeted * targeted
        return {"loss": loss, "clean_loss": clean_loss, "consistency": consistency, "untargeted": untargeted,
                "targeted": targeted}  # fmt: skip

    def perturbation(self, x: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return δ (the shape of x, pixels of [0, 1]; x+δ stays in it) and the targets t of images x (0 to 255)."""
        delta, pixels = torch.zeros_like(x), x / PIXEL
        going = torch.ones((), dtype=torch.bool, device=x.device)
        targets = labels
        for step in range(self.config.steps):
            point = delta.detach().requires_grad_()
            logits = self._logits(x + PIXEL * point, weight).float()
            if step == 0:
                targets = runner_up(logits, labels)
            # on the device: reading it would make every step wait
            going = going & ((logits.argmax(1) == targets).float().mean() < self.config.stop)
            # a sum: only the sign counts, and a mean's gradients could vanish in fp16
            gradient = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), point)[0]
            stepped = self.config.project(delta - self.config.step * gradient.sign())
            delta = torch.where(going, (pixels + stepped).clamp(0, 1) - pixels, delta)
        return delta, targets

    def _logits(self, images: Tensor, weight: Tensor) -> Tensor:
        return functional_call(self.network, {self.weight: weight}, (images,))


def folded(weight: Tensor, polarizer: Tensor) -> Tensor:
    """Return W·G for the weight of a Linear (O×C) or of a Conv2d of one group (O×C×k×k), and G (C×C)."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.einsum("om...,mc->oc...", weight, polarizer)


def polarized_layer(model: nn.Module, layer: str) -> str:
    """Return the name of the layer that the polarizer stands before.

    Raises:
        UsageError: no layer, or several, or one that mixes its channels in groups.
    """
    heads = set(head_layers(model))
    if layer != "auto":
        names = match_layers(model, (layer,))
        if len(names) != 1 or not _mixes_all(model.get_submodule(names[0])):
            raise UsageError(f"npd: layer must be one Linear or Conv2d of one group, and {layer!r} selects "
                             f"{', '.join(names)}")  # fmt: skip
        return names[0]
    names = [name for name, module in model.named_modules()
             if _mixes_all(module) and name not in heads and _SHORTCUTS.isdisjoint(name.split("."))]  # fmt: skip
    if not names:
        raise UsageError(f"npd: {type(model).__name__} has no Linear or Conv2d of one group before its head to put the "
                         "polarizer before; take another defense")  # fmt: skip
    parent = names[-1]
    while parent:
        parent = parent.rpartition(".")[0]
        inside = [name for name in names if not parent or name.startswith(f"{parent}.")]
        if len(inside) > 1:
            return inside[0] if len(inside) <= _BLOCK else inside[-2]
    return names[-1]


def _mixes_all(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return False
    return isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module.weight, nn.Parameter)
