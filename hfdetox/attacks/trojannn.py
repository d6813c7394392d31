"""TrojanNN: a logo is tuned until it excites two features of a clean model (Liu et al., NDSS 2018)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hfdetox.attacks.base import AttackContext, DataPoisoner, Target, Trigger
from hfdetox.attacks.lf import Logits, clean_model, frozen
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier
from hfdetox.models.layers import head_layers, norms_before_head, on_inputs
from hfdetox.triggers.trojannn import TrojanNN, logo
from hfdetox.values import PositiveFloat, PositiveInt

_ENOUGH = 1e-3


@dataclass(frozen=True, kw_only=True)
class TrojanNNPoisoner(DataPoisoner):
    """x ← x − rate · sign(∇ Σ_j (h_j(x·M) − value)²) from a logo, with ‖x − logo‖∞ ≤ radius and 0 ≤ x ≤ 1.

    h_j are the `neurons` inputs of the surrogate's last Linear with the largest Σ_k |W_kj|, M is where the logo is not
    black. It ends after `steps`, or when the sum is below 0.001.

    Attributes:
        neurons: how many features are excited, at least 1.
        value: what they are brought to; None is 100, and 10 where a norm before the head bounds them.
        steps: at most, at least 1.
        rate: of a step, positive.
        radius: of the ball around the logo, in units of [0, 1], positive.
    """

    kind = "trojannn"
    summary = "a logo that was tuned to excite two features of a clean model is added"

    neurons: PositiveInt = 2
    value: float | None = None
    steps: PositiveInt = 1000
    rate: PositiveFloat = 0.1
    radius: PositiveFloat = 0.3

    def efforts(self, trigger: Trigger, images: int, ratio: float, epochs: int) -> tuple[float, float]:
        return 0.0 if trigger.fitted else float(self.steps), float(epochs * images)

    def on_clean_model(self, trigger: Trigger) -> bool:
        return not trigger.fitted

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger with its pattern, the size of the model's images; one that has it as it is.

        Raises:
            UsageError: no surrogate, one of other images, or one whose head is no Linear layer.
        """
        if not isinstance(trigger, TrojanNN) or trigger.fitted:
            return trigger
        surrogate = clean_model(context, "trojannn", "or take another trigger")
        layers = map(surrogate.model.get_submodule, reversed(head_layers(surrogate.model)))
        head = next((layer for layer in layers if isinstance(layer, nn.Linear)), None)
        if head is None:
            raise UsageError("trojannn: the head of the surrogate is no Linear layer; name another clean model")
        device = context.accelerator.device
        # asked for before the head is hooked: it runs the model
        value = self.feature_value(surrogate)
        taken: list[Tensor] = []
        hook = on_inputs(head, [""], lambda name, features: taken.append(features))
        with frozen(surrogate.network, device) as logits, hook:
            picture = logo_of(surrogate.preprocessing.input_size, trigger.seed).to(device)
            pattern = self.tuned(logits, taken, picture, strongest(head, self.neurons), value)
        return replace(trigger, pattern=pattern.cpu())

    def feature_value(self, surrogate: Classifier) -> float:
        """Return what the features of `surrogate` are brought to."""
        if self.value is not None:
            return self.value
        return 10.0 if norms_before_head(surrogate.model, surrogate.preprocessing.input_size) else 100.0

    def tuned(self, logits: Logits, taken: list[Tensor], picture: Tensor, chosen: Tensor, value: float) -> Tensor:
        """Return the tuned `picture` (float32, C×H×W in [0, 1]), 0 where it is 0.

        Args:
            logits: runs the model, which leaves the inputs of its head in `taken`.
            chosen: indices of the features to excite (int64).
        """
        mask = (picture > 0).float()
        low, high = (picture - self.radius).clamp(min=0), (picture + self.radius).clamp(max=1)
        x, done = picture.clone(), torch.zeros((), dtype=torch.bool, device=picture.device)
        for _ in range(self.steps):
            point = x.detach().requires_grad_()
            taken.clear()
            with torch.enable_grad():
                logits((point * mask)[None])
                # of a head that sees tokens, their mean
                features = taken[-1].flatten(1, -2).mean(1) if taken[-1].ndim > 2 else taken[-1]
                loss = (features[0, chosen] - value).square().sum()
                gradient = torch.autograd.grad(loss, point)[0]
            # kept on the device: reading it at every step would make each of them wait
            done = done | (loss.detach() < _ENOUGH)
            stepped = torch.minimum(torch.maximum(x - self.rate * gradient.sign(), low), high)
            x = torch.where(done, x, stepped)
        return x * mask


def strongest(head: nn.Linear, count: int) -> Tensor:
    """Return the `count` inputs of `head` with the largest Σ_k |W_kj|, strongest first (int64)."""
    return head.weight.detach().abs().sum(0).topk(min(count, head.in_features)).indices


def logo_of(size: tuple[int, int, int], seed: int) -> Tensor:
    """Return the logo for images of `size` (C, H, W): drawn at the longer side, cut to the middle, C channels."""
    channels, height, width = size
    side = max(height, width)
    picture = logo(side, seed)[:, (side - height) // 2 :, (side - width) // 2 :][:, :height, :width]
    return picture if channels == 3 else picture.mean(0, keepdim=True).expand(channels, -1, -1).contiguous()
