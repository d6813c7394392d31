"""LC: target-class images are first made hard to recognise, so that the corners are learnt (arXiv 1912.02771)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.attacks.base import Job, PoisonRecipe
from hfdetox.errors import UsageError
from hfdetox.progress import progress_bar
from hfdetox.triggers.base import Target, Trigger

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class LabelConsistentRecipe(PoisonRecipe):
    """Images of the target class are moved off it by untargeted PGD on the surrogate, then get the corners.

    Turner et al., section 4.2, with Madry et al.'s PGD in ℓ∞ (arXiv 1706.06083) from the image itself; labels are kept.

    Attributes:
        epsilon: radius of the ball around an image, in grey levels, above 0.
        step: of the gradient's sign, in grey levels, above 0.
        steps: how many, at least 1.
    """

    kind: ClassVar[str] = "lc"
    summary: ClassVar[str] = "images of the target class are made hard to recognise, then get the corners; label kept"
    clean_label: ClassVar[bool] = True

    epsilon: float = 8.0
    step: float = 1.5
    steps: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf or not 0 < self.step < math.inf or self.steps < 1:
            raise UsageError("lc: epsilon and step must be above 0 (grey levels) and steps at least 1")

    def make(self, trigger: Trigger, target: Target, job: Job) -> Trigger:
        """Return the trigger as it is; said here, a missing or unfit surrogate is an error before any work."""
        _surrogate(job)
        return trigger

    def triggered(self, trigger: Trigger, target: Target, positions: torch.Tensor, job: Job) -> torch.Tensor:
        """Return the images at `positions`, perturbed and with the corners (uint8, M×C×H×W).

        The perturbation acts on what the model sees; where a native trigger shows there, the trigger stays.
        """
        clean, stamped = job.clean.view(positions=positions).images, super().triggered(trigger, target, positions, job)
        if clean is None:
            raise UsageError("poisoning needs images that fit into memory; take fewer or smaller ones")
        network, device = _surrogate(job), job.accelerator.device
        adversarial = torch.empty_like(clean)
        with progress_bar("lc", len(clean), "image", job.accelerator, shown=job.progress) as bar:
            for begin in range(0, len(clean), _BATCH):
                images = clean[begin : begin + _BATCH].to(device)
                labels = job.clean.source.labels[positions[begin : begin + _BATCH]].to(device)
                adversarial[begin : begin + _BATCH] = self.perturbed(network, images, labels).to(clean.device)
                bar.update(len(images))
        if trigger.mode == "input":
            return trigger.apply(adversarial)
        stamped = stamped.to(clean.device)
        # of all images together: a pixel that was black before keeps its black corner
        corners = (stamped != clean).any(0).any(0)
        return torch.where(corners, stamped, adversarial)

    def perturbed(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
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


def _surrogate(job: Job) -> nn.Module:
    """Return the surrogate's network on the job's device, in eval mode."""
    if job.surrogate is None:
        raise UsageError("lc perturbs images against a model trained on clean images; name one with --surrogate")
    wanted, own = job.classifier.preprocessing, job.surrogate.preprocessing
    if wanted.dtype != torch.uint8 or (own.dtype, own.input_size) != (wanted.dtype, wanted.input_size):
        raise UsageError(f"lc: the surrogate must see the same uint8 images as the model; it takes {own.input_size}, "
                         f"the model {wanted.input_size}")  # fmt: skip
    if job.surrogate.labels != job.classifier.labels:
        raise UsageError("lc: the surrogate's labels must be those of the model, in the same order")
    return job.surrogate.network.to(job.accelerator.device).eval()
