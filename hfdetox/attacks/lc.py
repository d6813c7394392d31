"""LC: target-class images are first made hard to recognise, so that the corners are learnt (arXiv 1912.02771)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.attacks.base import AttackContext, DataPoisoner, Target, Trigger, of_main
from hfdetox.attacks.lf import clean_model
from hfdetox.data.cache import Pixels
from hfdetox.progress import progress_bar
from hfdetox.values import PositiveFloat, PositiveInt

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class LabelConsistentPoisoner(DataPoisoner):
    """Images of the target class are moved off it by untargeted PGD on the surrogate, then get the corners.

    Turner et al., section 4.2, with Madry et al.'s PGD in ℓ∞ (arXiv 1706.06083) from the image itself; labels are kept.

    Attributes:
        epsilon: radius of the ball around an image, in grey levels, above 0.
        step: of the gradient's sign, in grey levels, above 0.
        steps: how many, at least 1.
    """

    kind = "lc"
    summary = "images of the target class are made hard to recognise, then get the corners; label kept"
    how = "clean label"

    epsilon: PositiveFloat = 8.0
    step: PositiveFloat = 1.5
    steps: PositiveInt = 100

    def efforts(self, trigger: Trigger, images: int, ratio: float, epochs: int) -> tuple[float, float]:
        return self.steps * ratio * images, float(epochs * images)

    def on_clean_model(self, trigger: Trigger) -> bool:
        """Return True: the images are always perturbed against one."""
        return True

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger as it is; said here, a missing or unfit surrogate is an error before any work."""
        clean_model(context, "lc", "or take another trigger")
        return trigger

    def triggered(self, trigger: Trigger, target: Target, positions: Tensor, context: AttackContext) -> Pixels:
        """Return the images at `positions`, perturbed and with the corners, kept in memory: each took long to make.

        The perturbation acts on what the model sees; where a native trigger shows there, the trigger stays.
        """
        device = context.accelerator.device
        network = clean_model(context, "lc", "or take another trigger").network.to(device).eval()
        clean, stamped = context.clean.view(positions=positions), super().triggered(trigger, target, positions, context)
        parts = []
        with progress_bar("lc", len(clean), "image", shown=context.progress) as bar:
            for _, images, labels in clean.batches(_BATCH):
                perturbed = self.perturbed(network, images.to(device), labels.to(device))
                perturbed = of_main(perturbed, context.accelerator).cpu()
                parts.append(trigger.apply(perturbed) if trigger.mode == "input" else perturbed)
                bar.update(len(images))
        adversarial = torch.cat(parts)
        if trigger.mode == "native":
            adversarial = _with_corners(adversarial, clean, stamped)
        stamped.images = adversarial.to(stamped.labels.device)
        return stamped

    def perturbed(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return `images` (uint8, N×C×H×W) at which the cross-entropy of `labels` (N, int64) is higher, uint8.

        x ← clip(x + step · sign(∂L/∂x)) to ±epsilon of the image and to 0…255, `steps` times, in float32; the result
        is rounded and no pixel is further than ⌊epsilon⌋ from its image.
        """
        start = images.float()
        low, high = (start - self.epsilon).clamp(min=0), (start + self.epsilon).clamp(max=255)
        x = start
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            loss = cross_entropy(network(x).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = (x.detach() + self.step * gradient.sign()).clamp(low, high)
        whole = math.floor(self.epsilon)
        return x.detach().round().clamp(start - whole, start + whole).to(torch.uint8)


def _with_corners(adversarial: Tensor, clean: Pixels, stamped: Pixels) -> Tensor:
    """Return the `adversarial` images (uint8, M×C×H×W, CPU) with the pixels of `stamped` where it is not as `clean`."""
    corners = torch.zeros(adversarial.shape[-2:], dtype=torch.bool)
    for (_, images, _), (_, seen, _) in zip(clean.batches(_BATCH), stamped.batches(_BATCH), strict=True):
        # of all images together: a pixel that was black before keeps its black corner
        corners |= (seen.cpu() != images.cpu()).any(0).any(0)
    pairs = zip(adversarial.split(_BATCH), stamped.batches(_BATCH), strict=True)
    return torch.cat([torch.where(corners, seen.cpu(), part) for part, (_, seen, _) in pairs])
