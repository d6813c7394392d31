"""Choosing images: how many of each class, and which, with a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

MAX_FRACTION_SAMPLES = 5000


@dataclass(frozen=True)
class Selection:
    """Chosen rows: `indices` (N,) ascending row numbers of the split, `labels` (N,) the model's labels, both int64."""

    indices: np.ndarray
    labels: np.ndarray

    def where(self, keep: np.ndarray) -> Selection:
        """Return only the rows where the boolean mask `keep` (N,) is true."""
        return Selection(self.indices[keep], self.labels[keep])


def sample_count(samples: int | float, total: int) -> int:
    """Return how many images `samples` asks for of a split of `total` rows; a fraction gives 1 to 5000."""
    if isinstance(samples, (float, np.floating)):
        return max(1, min(MAX_FRACTION_SAMPLES, round(float(samples) * total)))
    return int(samples)


def class_quotas(available: Mapping[int, int], count: int, rng: np.random.Generator) -> dict[int, int]:
    """Return how many images to take of each class: equal shares, and where a class has fewer, all it has.

    What such classes lack goes to the others in equal shares; single images left over go to classes drawn by `rng`.
    The sum is min(count, Σ available).
    """
    left, taken = min(count, sum(available.values())), dict.fromkeys(available, 0)
    hungry = [c for c in sorted(available) if available[c] > 0]
    while left >= len(hungry) > 0:
        step = min(left // len(hungry), min(available[c] - taken[c] for c in hungry))
        for c in hungry:
            taken[c] += step
        left -= step * len(hungry)
        hungry = [c for c in hungry if taken[c] < available[c]]
    for i in rng.permutation(len(hungry))[:left]:
        taken[hungry[i]] += 1
    return taken


def choose_balanced(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], count: int, classes: Iterable[int], rng: np.random.Generator,
) -> tuple[Selection, dict[int, int]]:  # fmt: skip
    """Choose `count` rows, as balanced over `classes` as the blocks allow, and return them with the counts seen.

    A block is (row numbers, model labels; negative: not to be used). Blocks are taken in the order given, and no more
    of them than the equal shares need, so that few of a large file's row groups are touched; inside a block
    the rows are drawn by `rng`.
    """
    rows: dict[int, list[int]] = {c: [] for c in classes}
    for indices, labels in blocks:
        order = rng.permutation(len(indices))
        for index, label in zip(indices[order].tolist(), labels[order].tolist(), strict=True):
            if label >= 0:
                rows.setdefault(label, []).append(index)
        share = -(-count // max(1, len(rows)))
        if rows and all(len(found) >= share for found in rows.values()):
            break
    seen = {c: len(found) for c, found in rows.items()}
    take = class_quotas(seen, count, rng)
    pairs = sorted((index, c) for c, found in rows.items() for index in found[: take[c]])
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Selection(table[:, 0], table[:, 1]), seen


def choose_uniform(rows: Selection, count: int | None, rng: np.random.Generator) -> Selection:
    """Return a uniform choice of `count` rows without repetition, in ascending order; all of them for None."""
    if count is None or count >= len(rows.indices):
        return rows
    picked = np.sort(rng.choice(len(rows.indices), size=count, replace=False))
    return Selection(rows.indices[picked], rows.labels[picked])
