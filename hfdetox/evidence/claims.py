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
from hfdetox.evidence.results import Agreement, ImageGrade, Moved
from hfdetox.evidence.run import accuracy_of

# an image is one that the model is sure of when it is right, with this softmax at least
_SURE, _USUAL = 0.9, 0.99
# of the features of fewer images than these nothing is said
_LEAST = 50
MOVED_CLASSES = 5


def grade_images(pixels: Pixels, suspect: Suspect) -> ImageGrade:
    """Grade the clean images: how many, how equal, how evenly spread, and how close to what the model is sure of.

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
    accuracy, far = accuracy_of(suspect), far_from_sure(suspect)
    notes = []
    if duplicates:
        notes.append(f"{duplicates:,} have the same pixels as another one")
    if smallest == 0:
        notes.append(f"{int((counts == 0).sum()):,} classes have no image")
    elif largest > 2 * smallest:
        notes.append(f"the classes have {smallest:,} to {largest:,} images")
    if far is not None and far > 0.1:
        notes.append(f"{far:.0%} are far from what the model is sure of: they may be of another kind than it was made "
                     "for")  # fmt: skip
    return ImageGrade(len(prints), duplicates, smallest, largest, accuracy, bound, far, notes)


def far_from_sure(suspect: Suspect) -> float | None:
    """Return the share of images whose features lie further from their class than 99 % of those it is sure of do.

    The distance is that of the head's inputs to the mean over the images of the class that the model is sure of (right,
    with a softmax of at least 0.9), each feature by its standard deviation. About 1 % is usual. None where the head is
    not linear, or the model is sure of fewer than 50 images.
    """
    try:
        heads = suspect.heads
    except ValueError:
        return None
    features, labels = torch.cat([head.features for head in heads], 1), heads[0].labels
    if len(features) < _LEAST:
        return None
    probabilities = torch.stack([head.logits for head in heads]).mean(0).softmax(1)
    sure = (probabilities.argmax(1) == labels) & (probabilities.amax(1) >= _SURE)
    if int(sure.sum()) < _LEAST:
        return None
    distances, known = _distances(features, labels, sure)
    limit = distances[sure & known].quantile(_USUAL)
    return float((distances[known] > limit).float().mean())


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
