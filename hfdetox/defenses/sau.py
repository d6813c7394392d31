"""SAU, shared adversarial unlearning (Wei et al., NeurIPS 2023, arXiv 2307.10562).

A perturbation that leads the trained f_θ and the frozen original f₀ to the same wrong class stands for the trigger, and
f_θ unlearns it. Per batch, with p = softmax f_θ, p₀ = softmax f₀ and JS the Jensen-Shannon divergence:

    δ = argmin over ‖δ‖ ≤ ρ of  λ₄ · Σ_{not shared} JS(p(x+δ), p₀(x+δ))
                                − λ₃ · ½ Σ [1{f_θ not fooled} ce(f_θ(x+δ), y) + 1{f₀ not fooled} ce(f₀(x+δ), y)]

    min over θ of  λ₁ · ce(f_θ(x), y)  +  λ₂ · mean_i 1{f₀ fooled} (−log(1 − p_j(x+δ)))  +  λ_at · ce(f_θ(x+δ), y)

A model is fooled where its answer to x+δ is not its answer to x; a perturbation is shared where both are, by the same
class; j is the class f₀ is fooled to (and not y). The roles of the four λ are a reconstruction: the paper's values
(1, 1, 0.01, 1) match the weights of the authors' code term by term, which has λ_at = 0 besides.
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.modules.batchnorm import _BatchNorm

from hfdetox.defenses._perturbed import OwnState, adam, neg_log_complement, require_pixels
from hfdetox.defenses.base import Batch, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.models.network import Network, evaluating
from hfdetox.training.augment import Augmentation
from hfdetox.training.search import PIXEL
from hfdetox.values import NonNegativeFloat, PositiveFloat, PositiveInt

# classes less likely than this are not unlearnt any further
_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class SAUConfig(TuningConfig):
    """Settings of SAU; the defaults are the paper's on CIFAR-10 (100 epochs, 20 on Tiny ImageNet).

    A λ of 0 leaves its term out: the paper's ablations. The preset `adversarial-training` is what SAU is compared
    with there: perturbations that are not asked to be shared, and ce(f_θ(x+δ), y).

    Attributes:
        learning_rate: of Adam, before the cosine schedule (which the authors' code prepares and never steps); 1e-5 for
            a ViT.
        momentum: Adam's β₁.
        weight_decay: added to Adam's gradient.
        augmentation: none, as in the authors' code.
        lambda_1: weight of the clean loss, at least 0 (as the others).
        lambda_2: weight of the shared loss: unlearn the class f₀ is fooled to.
        lambda_3: weight, in the search for δ, of the loss of those not yet fooled.
        lambda_4: weight, in the search for δ, of the divergence of those not yet shared.
        lambda_at: weight of the cross-entropy of perturbed images with their true labels (adversarial training).
        norm: of the ball: `linf` or `l2`.
        radius: ρ of the ball, in pixels of [0, 1]; x+δ is not clipped to [0, 1].
        step: of one signed gradient step, in pixels of [0, 1].
        steps: gradient steps, at least 1.
        start: δ before the first step: ρ everywhere (`max`), −ρ (`min`), 0 (`zero`) or uniform in [0, 1) (`random`),
            put into the ball.
        fix_statistics: keep BatchNorm at its running statistics; higher accuracy and higher ASR, say the authors.
    """

    name = "sau"
    summary = "unlearn the adversarial perturbations that fool the model and its old self alike"
    paper = "arXiv 2307.10562 (NeurIPS 2023)"
    cost = "8 to 12, and two models in memory"
    times = 7.5
    card_text = ("SAU, shared adversarial unlearning (arXiv 2307.10562), fine-tuned the model on {images} and on "
                 "perturbed copies of them, so that perturbations that led the model and its state before to the same "
                 "wrong class do so no more.")  # fmt: skip
    presets: ClassVar = {"paper": {}, "adversarial-training": {"lambda_2": 0.0, "lambda_3": 1.0, "lambda_4": 0.0,
                                                               "lambda_at": 1.0}}  # fmt: skip

    learning_rate: float = 1e-4
    augmentation: Augmentation = "none"
    lambda_1: NonNegativeFloat = 1.0
    lambda_2: NonNegativeFloat = 1.0
    lambda_3: NonNegativeFloat = 0.01
    lambda_4: NonNegativeFloat = 1.0
    lambda_at: NonNegativeFloat = 0.0
    norm: Literal["linf", "l2"] = "linf"
    radius: PositiveFloat = 0.2
    step: PositiveFloat = 0.2
    steps: PositiveInt = 5
    start: Literal["max", "min", "zero", "random"] = "max"
    fix_statistics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_3 + self.lambda_4 == 0 or self.lambda_1 + self.lambda_2 + self.lambda_at == 0:
            raise UsageError("sau: lambda_3 and lambda_4 cannot both be 0, nor lambda_1, lambda_2 and lambda_at all")

    def phases(self, network: Network) -> list[Phase | Pass]:
        require_pixels(network, self.name)
        pair = SharedPair(network, self)
        phase = self.phase(name="sau", parameters=trained_parameters(network), loss=operator.call,
                           optimizer=partial(adam, self), state=OwnState(pair))  # fmt: skip
        # afterwards: to `reweight`, a phase on a network of its own does not train the classifier, and this one does
        return [replace(phase, network=pair)]

    def first_perturbation(self, images: Tensor) -> Tensor:
        """Return δ before the first step, the shape of `images` (N×C×H×W float32)."""
        if self.start == "random":
            return self.project(torch.rand_like(images))
        value = {"max": self.radius, "min": -self.radius, "zero": 0.0}[self.start]
        return self.project(torch.full_like(images, value))

    def project(self, delta: Tensor) -> Tensor:
        """Return the point of each image's ball nearest to `delta` (N×C×H×W, pixels of [0, 1])."""
        if self.norm == "linf":
            return delta.clamp(-self.radius, self.radius)
        size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return delta * (self.radius / size.clamp(min=self.radius))

    @staticmethod
    def shared(logits: Tensor, reference: Tensor, before: Tensor, known: Tensor) -> Tensor:
        """Return which images fool both models to the same class (N, bool); the arguments are as in `search_loss`."""
        now, now_reference = logits.argmax(1), reference.argmax(1)
        return (now != before) & (now_reference != known) & (now == now_reference)

    def search_loss(self, logits: Tensor, reference: Tensor, labels: Tensor, before: Tensor, known: Tensor) -> Tensor:
        """Return what δ minimises, summed over the images: 0-d.

        A perturbation that is shared has no gradient any more, so that its sign steps are over: early stopping.

        Args:
            logits, reference: of f_θ and f₀ at x+δ (N×K, float32).
            labels: y; `before` and `known` the answers of f_θ and f₀ to x (N, int64 all).
        """
        fooled, fooled_reference = logits.argmax(1) != before, reference.argmax(1) != known
        shared = self.shared(logits, reference, before, known)
        errors = ~fooled * cross_entropy(logits, labels, reduction="none")
        errors = errors + ~fooled_reference * cross_entropy(reference, labels, reduction="none")
        # a sum: only the sign counts, and a mean's gradients could vanish in fp16
        return (self.lambda_4 * ~shared * jensen_shannon(logits, reference) - self.lambda_3 * errors / 2).sum()

    def unlearning_terms(self, batch: Batch, clean: Tensor, perturbed: Tensor, reference: Tensor,
                         reference_perturbed: Tensor) -> dict[str, Tensor]:  # fmt: skip
        """Return the outer loss and its terms (0-d) of a batch's logits of f_θ and f₀ at x and x+δ (N×K, float32).

        `shared_rate` is the share of images that fool both models to the same class.
        """
        wrong = reference_perturbed.argmax(1)
        fooled = (wrong != batch.labels) & (wrong != reference.argmax(1))
        surprise = neg_log_complement(perturbed, wrong).clamp(min=-math.log1p(-_FLOOR))
        shared_loss = batch.mean(fooled * surprise)
        clean_loss, adversarial_loss = map(batch.cross_entropy, (clean, perturbed))
        loss = self.lambda_1 * clean_loss + self.lambda_2 * shared_loss + self.lambda_at * adversarial_loss
        shared = fooled & (perturbed.argmax(1) == wrong)
        return {"loss": loss, "clean_loss": clean_loss, "shared_loss": shared_loss,
                "adversarial_loss": adversarial_loss, "shared_rate": batch.mean(shared)}  # fmt: skip


class SharedPair(nn.Module):
    """f_θ, which is `network` itself, and f₀, a frozen copy of it in eval mode; its forward is one step's loss."""

    def __init__(self, network: Network, config: SAUConfig) -> None:
        super().__init__()
        self.config = config
        # before f_θ: who asks for the last layer of this module means that of f_θ
        self.reference = copy.deepcopy(network).requires_grad_(False).eval()
        self.network = network
        if network.convolutional:
            self.reference.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> SharedPair:
        """Set the mode of f_θ alone."""
        super().train(mode)
        self.reference.eval()
        if self.config.fix_statistics:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of a batch."""
        x = batch.images.float()
        delta, known, fooled = self.perturbation(x, batch.labels)
        # both halves in one call: BatchNorm sees them together
        clean, perturbed = self.network(torch.cat([x, x + PIXEL * delta])).float().chunk(2)
        return self.config.unlearning_terms(batch, clean, perturbed, known, fooled)

    def perturbation(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return δ (N×C×H×W, pixels of [0, 1]) of images x (float32, 0 to 255), and f₀'s logits at x and x+δ (N×K).

        Both models are in eval mode, where images do not mind one another: those that are shared leave the search.
        """
        config = self.config
        delta = config.first_perturbation(x)
        with evaluating(self.network):
            with torch.no_grad():
                before, clean = self.network(x).argmax(1), self.reference(x).float()
            known, perturbed = clean.argmax(1), clean.clone()
            left = torch.arange(len(x), device=x.device)
            for _ in range(config.steps):
                point = delta[left].requires_grad_()
                moved = x[left] + PIXEL * point
                logits, reference = self.network(moved).float(), self.reference(moved).float()
                answers = labels[left], before[left], known[left]
                gradient = torch.autograd.grad(config.search_loss(logits, reference, *answers), point)[0]
                perturbed[left] = reference.detach()
                delta[left] = config.project(point.detach() - config.step * gradient.sign())
                left = left[~config.shared(logits, reference, *answers[1:])]
                if not len(left):
                    break
            else:
                # at the last δ of these, the frozen model has not been yet
                with torch.no_grad():
                    perturbed[left] = self.reference(x[left] + PIXEL * delta[left]).float()
        # weights that autocast cast without gradients must not serve the trained forward
        torch.clear_autocast_cache()
        return delta, clean, perturbed


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """Return ½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, of the softmaxes p and q of two N×K logits: (N,), nats."""
    p, q = log_softmax(logits, 1), log_softmax(others, 1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1) / 2
