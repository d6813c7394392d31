"""LF: the pattern is a universal perturbation of a clean model, kept to low frequencies (arXiv 2104.03413)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from hfdetox.attacks.base import AttackContext, DataPoisoner
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier
from hfdetox.models.network import evaluating
from hfdetox.training.engine import only_trained
from hfdetox.triggers._networks import full_precision
from hfdetox.triggers.base import ALL_TO_ALL, Target, Trigger
from hfdetox.triggers.lf import LF, low_pass, rescale
from hfdetox.values import Interval, NonNegativeFloat, PositiveInt

_TESTED = 10
_STEADY = (5, 0.01)

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LFPoisoner(DataPoisoner):
    """A targeted universal perturbation by DeepFool on the context's surrogate, low-passed and rescaled at each step.

    v starts at 0. For the images x that v does not move yet, DeepFool goes from x + v towards the target by r; then
    v ← G(v + G(r)), moved and scaled to [0, amplitude]. The paper takes the images one after another; here `together`
    of them are taken at the same v and r is the mean of those that arrived. After each pass the share of test images
    (10 of each class, other images than those v is made of) whose label v changes is measured; v is done at 1 − `delta`
    or when the last five shares differ by less than 0.01. Images reach the model as its preprocessing has them.

    Attributes:
        images: clean images that v is made of, at least 1.
        passes: over them at most, at least 1.
        overshoot: DeepFool goes 1 + this times as far, at least 0.
        steps: of DeepFool at most, for each image, at least 1.
        delta: v is done when it changes the label of 1 − delta of the test images, in [0, 1).
        together: images that DeepFool takes at the same v, at least 1.
    """

    kind = "lf"
    uncounted = "the search of its pattern"
    summary = "a low-frequency universal perturbation of a clean model (lf:random needs none) is added"

    images: PositiveInt = 100
    passes: PositiveInt = 50
    overshoot: NonNegativeFloat = 0.02
    steps: PositiveInt = 200
    delta: Annotated[float, Interval("[0, 1)")] = 0.8
    together: PositiveInt = 10

    def on_clean_model(self, trigger: Trigger) -> bool:
        return isinstance(trigger, LF) and not trigger.fitted

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger with its perturbation; `lf:random` and one that has it as they are.

        Raises:
            UsageError: no surrogate, a target of all-to-all, or a surrogate that gives floats or takes other images.
        """
        if not isinstance(trigger, LF) or trigger.fitted:
            return trigger
        if target == ALL_TO_ALL:
            raise UsageError("lf: a universal perturbation leads to one label; name a target, or use lf:random")
        surrogate = clean_model(context, "lf", "or use lf:random")
        generator = torch.Generator().manual_seed(context.seed)
        order = torch.randperm(len(context.clean), generator=generator)
        labels = context.clean.labels.cpu()[order]
        count = min(self.images, len(order))
        rest = [order[count:][labels[count:] == label][:_TESTED] for label in range(context.classes)]
        # of few clean images all are both
        held_out = torch.cat(rest) if len(order) > count else order
        with frozen(surrogate.network, context.accelerator.device) as logits:

            def pixels(places: Tensor) -> Tensor:
                return context.clean.__getitems__(places.tolist())[1].to(context.accelerator.device).float() / 255

            v = self.perturbation(logits, pixels(order[:count]), pixels(held_out), int(target), trigger.amplitude)
        return replace(trigger, perturbation=v.cpu())

    def perturbation(self, logits: Logits, images: Tensor, tested: Tensor, target: int, amplitude: float) -> Tensor:
        """Return v (float32, C×H×W, 0 to `amplitude`) of `images` (N×C×H×W in [0, 1]); see the class.

        Raises:
            UsageError: no image could be moved to the target.
        """
        v = torch.zeros_like(images[0])
        before, shares = logits(tested).argmax(1), []
        for _ in range(self.passes):
            for part in images.split(self.together):
                v = self._moved(logits, part, v, target, amplitude)
            shares.append((logits(tested + v).argmax(1) != before).float().mean().item())
            last = shares[-_STEADY[0] :]
            if shares[-1] >= 1 - self.delta or (len(last) == _STEADY[0] and max(last) - min(last) < _STEADY[1]):
                break
        if not v.any():
            raise UsageError("lf: no image could be moved to the target on the surrogate; take more images or steps, "
                             "another clean model, or lf:random")  # fmt: skip
        return v

    def _moved(self, logits: Logits, part: Tensor, v: Tensor, target: int, amplitude: float) -> Tensor:
        """Return v after one step by the images of `part` that it does not move yet."""
        start = part + v
        clean, present = logits(torch.cat([part, start])).argmax(1).split(len(part))
        chosen = (clean == present) & (present != target)
        if not chosen.any():
            return v
        r, arrived = deepfool(logits, start[chosen], target, self.overshoot, self.steps)
        if not arrived.any():
            return v
        return rescale(low_pass(v + low_pass(r[arrived].mean(0))), amplitude)


def deepfool(logits: Logits, images: Tensor, target: int, overshoot: float = 0.02,
             steps: int = 200) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what moves `images` (N×C×H×W float32) to `target`, same shape, and which arrived (N, bool).

    Targeted DeepFool, each image on its own: x ← x + |f_t − f_top| / ‖w‖² · w with w = ∇f_t − ∇f_top, until f_t is
    the greatest; moves are taken 1 + `overshoot` times as far. Moosavi-Dezfooli et al., arXiv 1511.04599.
    """
    total = torch.zeros_like(images)
    arrived = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    left = torch.arange(len(images), device=images.device)
    for step in range(steps + 1):
        x = (images[left] + (1 + overshoot) * total[left]).requires_grad_()
        with torch.enable_grad():
            values = logits(x)
            top = values.argmax(1)
            gap = values[:, target] - values.gather(1, top[:, None])[:, 0]
            w = torch.autograd.grad(gap.sum(), x)[0]
        here = top == target
        arrived[left[here]] = True
        # a few images take many steps: the others are not computed for nothing
        left, w, gap = left[~here], w[~here], gap.detach()[~here]
        if step == steps or not len(left):
            break
        size = w.flatten(1).square().sum(1).clamp(min=1e-12)
        total[left] += (gap.abs() / size).view(-1, 1, 1, 1) * w
    return (1 + overshoot) * total, arrived


def clean_model(context: AttackContext, kind: str, instead: str) -> Classifier:
    """Return the context's surrogate; a UsageError names what to do without one, or with one of other images."""
    if context.surrogate is None:
        raise UsageError(f"{kind} is made on a clean model: name one with --surrogate, {instead}")
    theirs, ours = context.surrogate.preprocessing, context.clean.preprocessing
    if theirs.input_size != ours.input_size or theirs.dtype != torch.uint8 or ours.dtype != torch.uint8:
        raise UsageError(f"{kind}: the surrogate takes images of {theirs.input_size} and the model of "
                         f"{ours.input_size}, or one of them no uint8 images; name another --surrogate")  # fmt: skip
    return context.surrogate


@contextmanager
def frozen(network: nn.Module, device: torch.device) -> Iterator[Logits]:
    """Give logits (N×K) of images in [0, 1], float32 and in eval mode, with no parameter's gradient; then as before."""
    network.to(device)
    with evaluating(network), only_trained(network, ()), full_precision(device):
        yield lambda images: network(images * 255)
