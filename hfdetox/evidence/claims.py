"""What the clean images can tell before anything is trained, and how far a cleaned model answers as before."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfdetox.data.cache import Pixels
from hfdetox.evaluation.metrics import BATCH_SIZE, rate
from hfdetox.evidence.base import Suspect
from hfdetox.evidence.results import Agreement, ClassShift, ImageGrade, Moved, ScanResult
from hfdetox.evidence.run import accuracy_of
from hfdetox.training.shift import robust_z

# an image is one that the model is sure of when it is right, with this softmax at least
_SURE, _USUAL = 0.9, 0.99
# of the features of fewer images than these nothing is said
_LEAST = 50
MOVED_CLASSES = 5
# of more classes, those with so many lowest and highest shifts after cleaning are named
SHOWN_SHIFTS = 6


def grade_images(pixels: Pixels, suspect: Suspect) -> ImageGrade:
    """Grade the clean images: how many, how equal, how evenly spread, and how sure of them the model is.

    Args:
        pixels: all of them.
        suspect: the model as it came, with those of them that the scores look at.
    """
    counts = torch.bincount(pixels.labels.cpu(), minlength=suspect.classes)
    prints = [hashlib.sha256(image.numpy().tobytes()).digest()
              for _, images, _ in pixels.batches(BATCH_SIZE) for image in images.cpu()]  # fmt: skip
    duplicates, smallest, largest = len(prints) - len(set(prints)), int(counts.min()), int(counts.max())
    # the upper end of the exact interval of no failure in so many
    bound = rate(0, len(prints)).interval[1]
    sure, far = share_of_sure(suspect)
    notes = []
    if duplicates:
        notes.append(f"{duplicates:,} have the same pixels as another one")
    if smallest == 0:
        notes.append(f"{int((counts == 0).sum()):,} classes have no image")
    elif largest > 2 * smallest:
        notes.append(f"the classes have {smallest:,} to {largest:,} images")
    return ImageGrade(len(prints), duplicates, smallest, largest, accuracy_of(suspect), bound, far, notes, sure)


def share_of_sure(suspect: Suspect) -> tuple[float | None, float | None]:
    """Return which share of the images the model is right and sure of, and which lies far from all of these.

    Sure is a softmax of at least 0.9. An image is far when its features lie further from its class than those of 99 %
    of the sure ones do: the distance of the head's inputs to the mean over the sure ones of the class, each feature by
    its standard deviation. None, None where the head is not linear or there are fewer than 50 images; no second number
    where the model is sure of fewer than 50.
    """
    try:
        heads = suspect.heads
    except ValueError:
        return None, None
    features, labels = torch.cat([head.features for head in heads], 1), heads[0].labels
    if len(features) < _LEAST:
        return None, None
    probabilities = torch.stack([head.logits for head in heads]).mean(0).softmax(1)
    sure = (probabilities.argmax(1) == labels) & (probabilities.amax(1) >= _SURE)
    share = float(sure.float().mean())
    if int(sure.sum()) < _LEAST:
        return share, None
    distances, known = _distances(features, labels, sure)
    limit = distances[sure & known].quantile(_USUAL)
    return share, float((distances[known] > limit).float().mean())


def _distances(features: Tensor, labels: Tensor, sure: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's distance from the mean of the sure ones of its class, and whether there are two of these."""
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels[sure], minlength=classes)
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels[sure], features[sure])
    means = sums / counts.clamp(min=1)[:, None]
    known = counts[labels] > 1
    spread = (features - means[labels])[sure & known].std(0).clamp(min=1e-6)
    return ((features - means[labels]) / spread).norm(dim=1), known


def find_agreement(
    truth: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64], labels: Sequence[str]
) -> Agreement:
    """Return how many of N images both models answer alike, and the classes with the most that they do not.

    Args:
        truth: the true labels.
        before, after: the labels that the model gave as it came, and cleaned.
        labels: the model's names.
    """
    changed = before != after
    shown, otherwise = (np.bincount(part, minlength=len(labels)) for part in (truth, truth[changed]))
    order = np.lexsort((-shown, -otherwise / np.maximum(1, shown)))
    moved = []
    for label in map(int, order[:MOVED_CLASSES]):
        if otherwise[label]:
            to = int(np.bincount(after[changed & (truth == label)]).argmax())
            moved.append(Moved(label, labels[label], rate(int(otherwise[label]), int(shown[label])), to, labels[to]))
    return Agreement(rate(int((~changed).sum()), len(changed)), moved)


def class_shifts(before: ScanResult, after: ScanResult, labels: Sequence[str]) -> list[ClassShift]:
    """Return how far each class's latent shift is from the others', in label order.

    Of more than twelve classes the six lowest and the six highest after cleaning, and the lowest before. Nothing where
    `latent-shift` was not measured before and after.
    """
    norms = [scan.scores["latent-shift"].values if "latent-shift" in scan.scores else None for scan in (before, after)]
    if not all(norms):
        return []
    old, new = (robust_z(torch.tensor([torch.inf if one is None else one for one in each or []])) for each in norms)
    order = new.nan_to_num(nan=0.0).argsort(stable=True).tolist()
    if len(order) > 2 * SHOWN_SHIFTS:
        order = [*order[:SHOWN_SHIFTS], *order[-SHOWN_SHIFTS:], int(old.argmin())]
    return [ClassShift(label, labels[label], *(round(float(z[label]), 4) if bool(z[label].isfinite()) else None
                                               for z in (old, new))) for label in sorted(set(order))]  # fmt: skip
