"""Weights of images in the loss of a fine-tuning, so that no class's accuracy pays for the detoxification.

After "Adversarial Reweighting Guided by Wasserstein Distance for Bias Mitigation" (arXiv 2311.12684, IEEE BigData
2024), a fairness method and no defense. Its abstract fixes the idea: members of the large group count less, and among
them those near the small group in Wasserstein distance keep their weight. What is below is hfdetox's own reconstruction
for clean fine-tuning; its two steps run before the first epoch and after each one, on clean images alone:

    class        harm_k = max(0, a⁰_k − a_k), the accuracy that class k lost on held-out images;
                 q_k ∝ exp(η · harm_k) / n_k, within [1/3, 3], of mean 1 over the n images; smoothed over epochs
    wasserstein  also, within class k, the small group: images that the old network had right and the new one has
                 wrong. With the critic D(h) = ⟨u, h⟩ on the features h before the head, u the unit vector from the
                 small group's mean to that of the others (the best linear 1-Lipschitz critic), the others get
                 v = argmin Σ v_i D(h_i)  s.t.  v ≥ 0, Σ v_i = n, Σ (v_i − 1)² ≤ ρ n,  and the small group v = 1

The weight of image i is w_i = q_{y_i} · v_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hfdetox.models.layers import head_layers, on_inputs
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Part, Pass, Phase, Stateful

Reweight = Literal["none", "class", "wasserstein"]

# η, and what a class may weigh; the share of the old q in the new one; ρ; and the most that an image may weigh
SHARPNESS = 10.0
BOUNDS = (1 / 3, 3.0)
SMOOTHING = 0.5
BUDGET = 1.0
LARGEST = 4.0
# under which names a checkpoint keeps the weights, beside the method's own tensors
_PREFIX = "reweight."
_STATE = ("accuracy", "classes", "weights", "labels", "right")
_BISECTIONS = 60


def reweighted(phase: Phase, how: Reweight) -> Phase:
    """Return a phase like `phase` with weights of its images by `how`; the same phase for `none`.

    A phase on a network of its own (a teacher, masks, a search for triggers) does not change the classifier and stays
    as it is. Another on all images gives up the held-out fifth of them, on which the classes' accuracies are measured.
    Its state holds the weights too, and the terms of its history are the weighted ones.
    """
    if how == "none" or phase.network is not None:
        return phase
    weights = Reweighting(how, phase.state)

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return phase.loss(model, weights.weighted(batch))

    part: Part = "fit" if phase.part == "all" else phase.part
    return replace(phase, loss=loss, part=part, on_epoch_end=weights.probes(part), state=weights)


class Reweighting:
    """The weights of a phase's images, from looks at its network before it starts and after each of its epochs.

    What is compared is the network as the phase found it, before its `start` (D3 draws the head anew there).

    Attributes:
        accuracy: a⁰ (K, float64): of each class on held-out images; NaN where there is none.
        classes: q (K, float64).
        labels: the label of each image trained on, by its position (P, int64); −1 for other images.
        right: whether the old network had each image right, by position (P, uint8).
        weights: w, by position (P, float64), of mean 1 over the images trained on.
    """

    def __init__(self, how: Literal["class", "wasserstein"], method: Stateful | None = None) -> None:
        """Start without weights, which the first look makes; a checkpoint keeps the tensors of `method` beside them."""
        self.how, self.method = how, method
        self.accuracy = self.classes = self.weights = torch.empty(0, dtype=torch.float64)
        self.labels, self.right = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)

    def weighted(self, batch: Batch) -> Batch:
        """Return the batch with the images' w as factors of its weights."""
        factors = self.weights[batch.positions].float().to(batch.weights.device, non_blocking=True)
        return replace(batch, weights=batch.weights * factors)

    def probes(self, part: Part) -> Callable[[], Sequence[Pass]]:
        """Return what gives the passes of a look; `part` is what the phase trains on."""

        def passes() -> list[Pass]:
            first, by_image = not len(self.labels), self.how == "wasserstein"
            # in the first look the labels alone are wanted of the images trained on, unless answers are compared later
            held, trained = _Seen(asked=True), _Seen(asked=by_image)
            on_held = Pass(name="accuracy of the classes", part="held-out", on_batch=held.on_batch,
                           finish=partial(self._see_classes, held, first=first))  # fmt: skip
            on_trained = Pass(name="weights of the images", part=part, on_batch=trained.on_batch,
                              finish=partial(self._see_first if first else self._see_images, trained))  # fmt: skip
            return [on_held, on_trained] if first or by_image else [on_held]

        return passes

    def _see_classes(self, seen: _Seen, accelerator: Accelerator, *, first: bool) -> dict[str, float]:
        """Take the accuracies before, or move q by those of now; returns the worst class's drop and the spread."""
        _, labels, right, _ = seen.gathered()
        # a process may have none of the few images, and then has not seen how many classes there are
        classes = max(gather_object([seen.outputs]))
        totals = torch.bincount(labels, minlength=classes)
        now = torch.bincount(labels[right], minlength=classes).double() / totals
        if first:
            self.accuracy = now
            return {}
        harm = (self.accuracy - now).clamp_min(0).nan_to_num(0)
        self.classes = SMOOTHING * self.classes + (1 - SMOOTHING) * class_weights(harm, self._counts())
        self.weights = image_weights(self.classes, self.labels, torch.ones_like(self.weights))
        known = now[totals > 0]
        return {"worst_class_drop": float(harm.max()), "class_spread": float(known.max() - known.min()),
                "largest_class_weight": float(self.classes.max())}  # fmt: skip

    def _see_first(self, seen: _Seen, accelerator: Accelerator) -> None:
        """Take the labels of the images trained on, and who was right, and start from q ∝ 1/n."""
        positions, labels, *answers = seen.gathered()
        size = int(positions.max()) + 1
        self.labels = torch.full((size,), -1).index_copy(0, positions, labels)
        if answers:
            self.right = torch.zeros(size, dtype=torch.uint8).index_copy(0, positions, answers[0].to(torch.uint8))
        self.classes = class_weights(torch.zeros_like(self.accuracy), self._counts())
        self.weights = image_weights(self.classes, self.labels, torch.ones(size, dtype=torch.float64))

    def _see_images(self, seen: _Seen, accelerator: Accelerator) -> dict[str, float]:
        """Set v of every class by the critic between its lost images and the others; returns how many are lost."""
        positions, labels, right, features = seen.gathered()
        lost = torch.zeros(len(self.labels), dtype=torch.bool)
        lost[positions] = (self.right[positions] > 0) & ~right
        means = []
        for group in (lost[positions], ~lost[positions]):
            sums = torch.zeros(len(self.classes), features.shape[1]).index_add_(0, labels[group], features[group])
            counts = torch.bincount(labels[group], minlength=len(self.classes))
            means.append(sums.double() / counts.clamp_min(1)[:, None])
        critic = torch.nn.functional.normalize(means[1] - means[0], dim=1)
        scores = torch.zeros(len(lost)).index_copy(0, positions, (features * critic[labels]).sum(1).float())
        within = torch.ones(len(lost), dtype=torch.float64)
        for label in self.labels[lost].unique().tolist():
            others = (self.labels == label) & ~lost
            if others.any():
                within[others] = critic_weights(scores[others], BUDGET)
        self.weights = image_weights(self.classes, self.labels, within)
        return {"lost_images": float(lost.sum())}

    def _counts(self) -> torch.Tensor:
        return torch.bincount(self.labels[self.labels >= 0], minlength=len(self.accuracy)).double()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything the weights are made of, and the method's own."""
        own = {_PREFIX + name: getattr(self, name) for name in _STATE}
        return own | (self.method.state_dict() if self.method is not None else {})

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with the weights of a stopped run."""
        for name in _STATE:
            setattr(self, name, state[_PREFIX + name])
        if self.method is not None:
            self.method.load_state_dict({k: v for k, v in state.items() if not k.startswith(_PREFIX)})


def class_weights(harm: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return q (K, float64): proportional to exp(η·harm_k) / n_k within BOUNDS, of mean 1 over the images.

    Args:
        harm: accuracy lost by each class, in [0, 1] (K).
        counts: images n_k of each class, at least one in all (K); a class without images weighs in no mean.
    """
    # the factor before the bounds are applied is found by bisection, so that the mean is 1 after them
    logs = SHARPNESS * harm.double() - counts.double().clamp_min(1).log()
    shares = counts.double() / counts.sum()
    low, high = -logs.max() + math.log(BOUNDS[0]), -logs.min() + math.log(BOUNDS[1])
    found = _bisected(low, high, lambda middle: (shares * (logs + middle).exp().clamp(*BOUNDS)).sum() > 1)
    return (logs + found).exp().clamp(*BOUNDS)


def critic_weights(scores: torch.Tensor, budget: float) -> torch.Tensor:
    """Return v (n, float64) that minimises Σ v_i D_i with v ≥ 0, Σ v_i = n and Σ (v_i − 1)² ≤ ρ n.

    The optimum is v_i = max(0, a − b·D_i); b is found by bisection, as Σ (v_i − 1)² grows with it, and a follows from
    the sum. Where no b spends the budget, all weight is on the smallest scores.

    Args:
        scores: D_i (n), finite.
        budget: ρ, above 0.
    """
    # from 0, exactly: the smallest, and those equal to it, keep their weight under any slope
    scores = scores.double() - scores.double().min()
    if scores.max() == 0:
        return torch.ones_like(scores)
    scores = scores / scores.max()
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(_BISECTIONS):
        if (_simplex(scores, high) - 1).square().mean() >= budget:
            break
        high = 2 * high
    found = _bisected(low, high, lambda middle: (_simplex(scores, middle) - 1).square().mean() > budget)
    return _simplex(scores, found)


def _bisected(low: torch.Tensor, high: torch.Tensor, too_much: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """Return the largest number between two (0-d) that is not too much, from below."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if too_much(middle) else (middle, high)
    return low


def _simplex(scores: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return max(0, a − b·D_i) with the a for which the mean is 1."""
    ordered = scores.sort().values
    ranks = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    # a if the first m were those with weight; the m that fits is the last one whose own weight is above 0
    levels = (len(scores) + slope * ordered.cumsum(0)) / ranks
    active = int((levels - slope * ordered > 0).nonzero().max())
    return (levels[active] - slope * scores).clamp_min(0)


def image_weights(classes: torch.Tensor, labels: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """Return w (P, float64): q_{y_i}·v_i, at most LARGEST, then of mean 1 over the images; 0 where the label is −1."""
    known = labels >= 0
    weights = torch.where(known, classes[labels.clamp_min(0)] * within, 0).clamp_max(LARGEST)
    return weights / weights[known].mean()


class _Seen:
    """What a pass saw of this process's images, on the CPU."""

    def __init__(self, *, asked: bool) -> None:
        """Look at positions and labels; with `asked` also at the network's answers and features."""
        self.asked, self.outputs = asked, 0
        self.head: list[str] = []
        self.batches: list[tuple[torch.Tensor, ...]] = []

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Note a batch."""
        found: tuple[torch.Tensor, ...] = (batch.positions, batch.labels.cpu())
        if self.asked:
            features: list[torch.Tensor] = []
            self.head = self.head or head_layers(network)[-1:]
            with on_inputs(network, self.head, lambda _, given: features.append(given)):
                logits = network(batch.images)
            self.outputs = logits.shape[1]
            flat = features[-1].float()
            # of a convolutional head the mean over places, as its pooling takes
            flat = flat.flatten(2).mean(2) if flat.ndim > 2 else flat
            found += (logits.argmax(1) == batch.labels).cpu(), flat.cpu()
        self.batches.append(found)

    def gathered(self) -> list[torch.Tensor]:
        """Return positions, labels and, if asked, which answers were right and the features, of all processes."""
        return [torch.cat(columns) for columns in zip(*gather_object(self.batches), strict=True)]
