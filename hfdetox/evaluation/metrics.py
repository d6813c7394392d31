"""What is measured, the same way before and after: accuracy, attack success, robust accuracy, and how sure they are."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.data.cache import Pixels
from hfdetox.errors import RunError
from hfdetox.evaluation.results import (
    ClassAccuracies,
    Destination,
    Difference,
    LabelRate,
    Measurement,
    Rate,
    Rating,
    TriggerResult,
)
from hfdetox.models.network import exact_float32
from hfdetox.progress import progress_bar
from hfdetox.training.batches import ImageSource, source_loader
from hfdetox.triggers.base import Target, Trigger, attacked_labels

BATCH_SIZE = 256
BROKEN = "its weights or its preprocessing are broken"
# pixel values of a batch on a GPU, about those of 256 images of 224×224, and images at most
GPU_VALUES, GPU_IMAGES = 2**25, 4096
# the same of a CPU: it is no faster with more large images at a time, which take gigabytes
CPU_VALUES = BATCH_SIZE * 3 * 96 * 96
BOOTSTRAP_DRAWS = 2000
Z_95 = 1.959963984540054
LOWEST = 10  # classes that are named


@dataclass(frozen=True)
class SourcePredictions:
    """A model's answers on an image source, in its order: labels (N, int64), and the cross-entropy (N, nats).

    `classes` is how many labels it has.
    """

    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    classes: int


@dataclass(frozen=True)
class TriggerView:
    """The triggered copies of evaluation images: of those of any class but the target, of all for `all-to-all`.

    `target` is a label index or `all-to-all`; `classes` is how many labels the model has.
    """

    trigger: Trigger
    target: Target
    source: Pixels
    classes: int

    def wanted(self) -> NDArray[np.int64]:
        """Return what the attacker wants each image called (M label indices)."""
        return attacked_labels(self.source.labels.cpu(), self.target, self.classes).numpy()


@dataclass(frozen=True)
class Predictions:
    """A measurement, and per image what it came from, for paired comparisons.

    Attributes:
        measurement: the rates.
        correct: whether each evaluation image was classified correctly (N).
        hits: per trigger, the places of its images in `correct` (M) and whether each was classified as the attacker
            wants (M).
        predicted: the labels given to the clean images (N).
        losses: the cross-entropy of each clean image (N, nats).
        triggered: per trigger, the labels given to its triggered images (M).
    """

    measurement: Measurement
    correct: NDArray[np.bool_]
    hits: dict[str, tuple[NDArray[np.int64], NDArray[np.bool_]]]
    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    triggered: dict[str, NDArray[np.int64]]


def rate(successes: int, samples: int) -> Rate:
    """Return successes / samples with its exact 95 % interval (Clopper and Pearson, 1934).

    Raises:
        ValueError: no samples, or more successes than samples.
    """
    if not 0 <= successes <= samples or samples == 0:
        raise ValueError(f"a rate needs 0 <= successes <= samples and samples > 0, got {successes} of {samples}")
    # scipy.stats has this too, and takes a second to import
    low = betaincinv(successes, samples - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, samples - successes, 0.975) if successes < samples else 1.0
    return Rate(successes / samples, successes, samples, (float(low), float(high)))


def defense_effectiveness_rating(accuracy: tuple[float, float], success: tuple[float, float]) -> float:
    """Return (max(0, ASR₀ − ASR₁) − max(0, ACC₀ − ACC₁) + 1) / 2 for (before, after) pairs of fractions.

    The result is in [0, 1]; 0.5 says that nothing happened (Zhu et al., arXiv 2304.11823, eq. 7).
    """
    return (max(0.0, success[0] - success[1]) - max(0.0, accuracy[0] - accuracy[1]) + 1) / 2


@torch.inference_mode()
def predict(network: nn.Module, source: ImageSource, accelerator: Accelerator, *, title: str = "",
            progress: bool = False) -> SourcePredictions:  # fmt: skip
    """Run `network` in eval mode and float32 over `source`, shared out over the processes.

    Every process returns the answers to all images; the network's training mode is left as it was.
    """
    training = network.training
    network.eval()
    device = accelerator.device
    places = source.positions.cpu()
    # made before the batches: a few bytes kept of each would hold the heap's end, and with it their images' room
    predicted = torch.zeros(int(places.max()) + 1, dtype=torch.long, device=device)
    losses = torch.zeros(len(predicted), device=device)
    values = math.prod(getattr(network, "input_size", (1,)))
    loader, shared = source_loader(source, batch_size(source, device, values), device), accelerator.num_processes > 1
    if shared:
        loader = accelerator.prepare(loader)
    bar = progress_bar(title, len(source), "image", shown=progress)
    classes = 0
    with bar, exact_float32():
        for batch in loader:
            positions, images, labels = send_to_device(batch, device, non_blocking=True)
            logits = network(images).float()
            classes = logits.shape[1]
            loss = cross_entropy(logits, labels, reduction="none")
            # drops what a last uneven batch was padded with
            found = (positions, logits.argmax(1), loss)
            positions, answers, loss = accelerator.gather_for_metrics(found) if shared else found
            predicted[positions], losses[positions] = answers, loss
            bar.update(len(labels) * accelerator.num_processes)
    if shared:
        # collects garbage too, which takes longer than a small measurement
        accelerator.free_memory()
    network.train(training)
    return SourcePredictions(predicted.cpu()[places].numpy(), losses.cpu().double()[places].numpy(), classes)


def batch_size(source: ImageSource, device: torch.device, values: int = 1) -> int:
    """Return how many images of so many `values` are measured at once: 256, more of small ones on a GPU, which 256
    would not fill, and fewer of large ones on a CPU."""
    if device.type == "cpu":
        return min(BATCH_SIZE, max(1, CPU_VALUES // values))
    if device.type != "cuda" or source.images is None:
        return BATCH_SIZE
    return min(max(BATCH_SIZE, GPU_VALUES // source.images[0].numel()), GPU_IMAGES)


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Return the share of the first outcomes less that of the second, of the same N ≥ 1 images.

    The interval is the score interval of Tango (Statistics in Medicine 17, 1998, 891-908), which is sound for small
    numbers and for outcomes that never differ. It depends on the images alone of which the outcomes differ.
    """
    more, fewer, count = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    low, high = _tango_low(more, fewer, count), -_tango_low(fewer, more, count)
    return Difference((more - fewer) / count, (low, high))


def _tango_low(more: int, fewer: int, count: int) -> float:
    """Return the least difference that a score test at 5 % does not reject, by bisection."""
    low, high = -1.0, (more - fewer) / count
    for _ in range(60):
        difference = (low + high) / 2
        # the likeliest share of pairs that differ the other way, given the difference
        half = ((2 * count - more + fewer) * difference - more - fewer) / 2
        root = math.sqrt(max(0.0, half**2 + 2 * count * fewer * difference * (1 - difference)))
        variance = count * ((root - half) / count + difference * (1 - difference))
        if more - fewer - count * difference > Z_95 * math.sqrt(max(0.0, variance)):
            low = difference
        else:
            high = difference
    return (low + high) / 2


def shares_of_others(truth: NDArray[np.int64], answers: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Return of each of `classes` labels the share, of the images of all other classes, that are answered with it."""
    others = len(truth) - np.bincount(truth, minlength=classes)
    return np.bincount(answers[answers != truth], minlength=classes) / np.maximum(1, others)


def find_destination(
    truth: NDArray[np.int64], triggered: NDArray[np.int64], clean: NDArray[np.int64], classes: int,
    labels: Sequence[str] = (),
) -> Destination:  # fmt: skip
    """Return the class that most images go to with a trigger, of each class counted over the images of all others.

    Args:
        truth: the true labels of M images that a trigger was put on.
        triggered: the labels given to them with the trigger.
        clean: the labels given to them without it.
        classes: how many labels there are.
        labels: their names; without, a class is called by its index.
    """
    label = int(shares_of_others(truth, triggered, classes).argmax())
    others = truth != label
    there, without = triggered[others] == label, clean[others] == label
    return Destination(label, labels[label] if labels else str(label), rate(int(there.sum()), len(there)),
                       rate(int(without.sum()), len(there)), paired_difference(there, without))  # fmt: skip


def class_accuracies(
    truth: NDArray[np.int64], correct: NDArray[np.bool_], classes: int, labels: Sequence[str] = ()
) -> ClassAccuracies:
    """Return the accuracy on the images of each of `classes` labels, from labels and outcomes of N ≥ 1 images.

    The worst of several equal ones is that with the lowest index. Without `labels` a class is called by its index.
    """
    shown = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[correct], minlength=classes)
    present = shown > 0
    shares = np.where(present, right / np.maximum(1, shown), np.inf)
    worst = int(shares.argmin())
    # what is 0 of 5 is worse than what is 0 of 1
    lowest = [int(label) for label in np.lexsort((-shown, shares))[:LOWEST] if present[label]]
    return ClassAccuracies(
        [float(share) if there else None for share, there in zip(shares, present, strict=True)],
        worst, rate(int(right[worst]), int(shown[worst])), float(shares[present].std()),
        [LabelRate(i, labels[i] if labels else str(i), rate(int(right[i]), int(shown[i]))) for i in lowest],
    )  # fmt: skip


def measure(network: nn.Module, evaluation: ImageSource, views: Sequence[TriggerView], accelerator: Accelerator, *,
            labels: Sequence[str] = (), title: str = "measure", progress: bool = False,
            broken: str = BROKEN, known: Predictions | None = None) -> Predictions:  # fmt: skip
    """Measure accuracy and loss on the clean images, and each trigger on its view of some of them.

    Args:
        labels: the model's label names, for what names a class; without, it is called by its index.
        broken: what to say of a network whose answers are not finite numbers.
        known: what was measured of the same network on the same clean images, which are not measured again then.

    Raises:
        RunError: the network's answers are not finite numbers.
    """
    clean = known or _measure_clean(network, evaluation, accelerator, labels, title, progress, broken)
    places = {position: place for place, position in enumerate(evaluation.positions.tolist())}
    results: dict[str, TriggerResult] = {}
    hits, triggered = {}, {}
    for view in views:
        name = view.trigger.name
        answers = predict(network, view.source, accelerator, title=f"{title}: {name}", progress=progress).predicted
        hit, own = answers == view.wanted(), view.source.labels.cpu().numpy()
        shown = np.array([places[position] for position in view.source.positions.tolist()])
        unmoved = clean.predicted[shown]
        results[name] = TriggerResult(
            kind=view.trigger.kind, spec=view.trigger.recorded(), mode=view.trigger.mode, target=view.target,
            file_sha256=hashlib.sha256(view.trigger.file_bytes()).hexdigest(),
            attack_success_rate=rate(int(hit.sum()), len(hit)),
            robust_accuracy=rate(int((answers == own).sum()), len(hit)),
            accuracy_without=rate(int((unmoved == own).sum()), len(hit)),
            destination=find_destination(own, answers, unmoved, view.classes, labels),
        )  # fmt: skip
        hits[name] = (shown, hit)
        triggered[name] = answers
    return replace(clean, measurement=replace(clean.measurement, triggers=results), hits=hits, triggered=triggered)


def _measure_clean(network: nn.Module, evaluation: ImageSource, accelerator: Accelerator, labels: Sequence[str],
                   title: str, progress: bool, broken: str) -> Predictions:  # fmt: skip
    truth = evaluation.labels.cpu().numpy()
    clean = predict(network, evaluation, accelerator, title=title, progress=progress)
    if not np.isfinite(clean.losses).all():
        raise RunError(f"the model's outputs on the evaluation images are not finite numbers; {broken}")
    correct = clean.predicted == truth
    measurement = Measurement(rate(int(correct.sum()), len(correct)), float(clean.losses.mean()), {},
                              class_accuracies(truth, correct, clean.classes, labels))  # fmt: skip
    return Predictions(measurement, correct, {}, clean.predicted, clean.losses, {})


def ratings(before: Predictions, after: Predictions, *, seed: int = 0) -> dict[str, Rating]:
    """Return the defense effectiveness rating of every trigger and their mean, with 95 % bootstrap intervals.

    Images are drawn with replacement, each with its four outcomes (clean and triggered, before and after) kept
    together; equal images are counted once, so that a draw is one multinomial.
    """
    names, count = list(before.hits), len(before.correct)
    columns = [before.correct, after.correct]
    for name in names:
        (places, old), (_, new) = before.hits[name], after.hits[name]
        spread = np.zeros((3, count), dtype=bool)
        spread[:, places] = np.ones_like(old), old, new
        columns += [*spread]
    patterns, counts = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(counts.sum(), counts / counts.sum(), BOOTSTRAP_DRAWS)
    totals = np.vstack([counts[None], draws]) @ patterns.astype(np.int64)
    accuracy = totals[:, :2] / counts.sum()
    loss = np.maximum(0, accuracy[:, 0] - accuracy[:, 1])
    values = {}
    for index, name in enumerate(names):
        triggered, hit_before, hit_after = totals[:, 2 + 3 * index : 5 + 3 * index].T
        fall = np.maximum(0, (hit_before - hit_after) / np.maximum(1, triggered))
        values[name] = (fall - loss + 1) / 2
    if names:
        values["mean"] = np.mean(list(values.values()), 0)
    return {
        name: Rating(float(v[0]), (float(np.quantile(v[1:], 0.025)), float(np.quantile(v[1:], 0.975))))
        for name, v in values.items()
    }
