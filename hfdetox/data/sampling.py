"""Choosing images: how many of each class, and which, with a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hfdetox.config import ImageOptions
from hfdetox.data.columns import ColumnError, LabelReader
from hfdetox.data.labels import DROPPED, Alignment, LabelMismatchError, list_names
from hfdetox.data.readers import SCAN_LIMIT, Block, SplitReader
from hfdetox.errors import UsageError

MAX_FRACTION_SAMPLES = 5000
# of a dataset with one split: the share of its rows kept for measuring, and the most of them unless asked for more
EVAL_SHARE, EVAL_MOST = 0.2, 10_000
# where DROPPED (-1) is a class left out
_UNLABELLED = -2
_WITHOUT_LABELS = "{} has no image with a label; name another --label-column, or another --split"


class TooFewImagesError(UsageError):
    """Fewer images than asked for, or a class without any."""


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


@dataclass(frozen=True)
class Chooser:
    """Chooses rows for one call of `load_images`: see there what its fields mean."""

    labels: Sequence[str]
    samples: int | float | None
    options: ImageOptions
    warn: Callable[[str], None]
    reader: LabelReader
    alignment: Alignment

    def _scan(self, source: SplitReader, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield blocks of row numbers and the model's labels: -1 where a class is left out, -2 where there is none."""
        mapping = np.array([*self.alignment.mapping, _UNLABELLED])  # index -1 is a row without a label
        for indices, values in source.scan(rng):
            found = self.reader.read(values)
            if len(found) and found.max() >= len(mapping) - 1:
                highest, last = found.max() + self.reader.first, len(self.labels) - 1
                raise LabelMismatchError(f"split {source.split} has the label {highest} and the model has 0 to {last}; "
                                         "give --label-column, or say with --label-map which is which")  # fmt: skip
            yield indices, mapping[found]

    def _all_rows(self, source: SplitReader) -> Selection:
        """Return every usable row of a split with its label."""
        empty = np.zeros(0, np.int64)
        indices, labels = zip((empty, empty), *self._scan(source), strict=True)
        rows = Selection(np.concatenate(indices), np.concatenate(labels))
        unlabelled, total = int((rows.labels == _UNLABELLED).sum()), len(rows.labels)
        if 0 < unlabelled < total:
            self.warn(f"{unlabelled} of {total} rows of split {source.split} have no label and were left out")
        if source.limited:
            self.warn(f"split {source.split} is a stream: its first {SCAN_LIMIT} rows were read, the rest was not")
        return rows.where(rows.labels >= 0)

    def clean(self, source: SplitReader, taken: Sequence[int] | np.ndarray = ()) -> Selection:
        """Choose the clean images, none of the rows in `taken`."""
        if self.samples is None:
            rows = self._all_rows(source)
            rows = rows.where(~np.isin(rows.indices, taken))
            self._check_classes(rows.labels, f"split {source.split}")
            return rows
        rng = np.random.default_rng([self.options.seed, 1])
        if source.rows is None and isinstance(self.samples, float):
            for _ in source.scan():  # a fraction of a stream is a fraction of what can be read of it
                pass
        blocks = ((indices, np.where(np.isin(indices, taken), -1, labels))
                  for indices, labels in self._scan(source, rng))  # fmt: skip
        count = sample_count(self.samples, source.rows or 0)
        chosen, seen = choose_balanced(blocks, count, sorted(set(self.alignment.mapping) - {DROPPED}), rng)
        self._check_balance(source, chosen, seen, count)
        return chosen

    def _check_balance(self, source: SplitReader, chosen: Selection, seen: dict[int, int], wanted: int) -> None:
        """Raise TooFewImagesError, or warn, where the chosen images are not what was asked for."""
        where = f"split {source.split}" + (f" (its first {SCAN_LIMIT} rows, the scan limit)" if source.limited else "")
        available = sum(seen.values())
        if not available and self.samples is not None:
            raise TooFewImagesError(_WITHOUT_LABELS.format(where))
        if available < wanted and not (isinstance(self.samples, float) and available):
            raise TooFewImagesError(f"--samples {self.samples}: {where} has {available} labelled images; ask for fewer")
        if available < wanted:
            self.warn(f"{where} has only {available} usable images; all were taken")
        present = [c for c, number in seen.items() if number]
        if wanted < len(present) and not self.options.allow_missing_classes:
            raise TooFewImagesError(f"--samples {self.samples} gives {wanted} images, fewer than the {len(present)} "
                                    f"classes; give --samples {len(present)} or more")  # fmt: skip
        counts = self._check_classes(chosen.labels, where)
        counts = counts[counts > 0]
        if counts.max() - counts.min() > 1:
            self.warn(f"the clean images are not balanced: {counts.min()} to {counts.max()} a class, as {where} allows")

    def _check_classes(self, labels: np.ndarray, where: str) -> np.ndarray:
        """Return how many images of each of the model's classes there are; TooFewImagesError for a class without."""
        took = np.bincount(labels, minlength=len(self.labels))
        missing = [self.labels[c] for c in range(len(self.labels)) if not took[c]]
        if missing:
            which = f"{len(missing)} of the model's {len(self.labels)} classes ({list_names(missing, 5)})"
            if not self.options.allow_missing_classes:
                raise TooFewImagesError(f"{where} has no image of {which}; go on with --allow-missing-classes")
            self.warn(f"there is no clean image of {which}")
        return took

    def apart(self, source: SplitReader) -> Selection:
        """Choose, uniformly, the evaluation rows of a split that the clean images are from too."""
        rows = self._all_rows(source)
        total = len(rows.indices)
        if not total:
            raise TooFewImagesError(_WITHOUT_LABELS.format(f"split {source.split}"))
        count = self.options.eval_samples or min(EVAL_MOST, max(1, int(EVAL_SHARE * total)))
        if count >= total:
            raise TooFewImagesError(f"split {source.split} has {total} labelled images for both sets, and {count} "
                                    "for measuring leave none for the defense; lower --eval-samples")  # fmt: skip
        self.warn(f"split {source.split} serves for both sets: {count} of its {total} images are kept for measuring")
        return choose_uniform(rows, count, np.random.default_rng([self.options.seed, 2]))

    def measured(self, source: SplitReader) -> Selection:
        """Choose the evaluation rows of a split of their own; none where it has no labels."""
        rows, wanted = self._all_rows(source), self.options.eval_samples
        if wanted is not None and wanted > len(rows.indices) > 0:
            self.warn(f"--eval-samples {wanted}: split {source.split} has {len(rows.indices)} images; all are used")
        return choose_uniform(rows, wanted, np.random.default_rng([self.options.seed, 2]))


def label_reader(*sources: SplitReader, labels: Sequence[str] = (), warn: Callable[[str], None] = lambda _: None,
                 ) -> LabelReader:  # fmt: skip
    """Return what reads the labels of one or two splits, the last of which is read whole.

    Args:
        labels: the model's, where they are known: of plain integers they tell whether 1 is the first.

    Raises:
        ColumnError: the second split has other classes.
    """
    columns, other = sources[0].columns, sources[-1].columns
    if (columns.kind, columns.names) != (other.kind, other.names):
        raise ColumnError(f"split {sources[-1].split} has other classes than {sources[0].split}; give --eval-split")
    # of the last one first: numbers from 0 are told by it alone
    if columns.kind == "integer" and labels and all(_from_one(source, len(labels)) for source in reversed(sources)):
        warn(
            f"the labels of the dataset are the numbers 1 to {len(labels)}; they were taken as the model's label order"
        )
        return LabelReader(columns, first=1)
    blocks = chain(*(source.scan() for source in sources)) if columns.kind == "text" else ()
    reader = LabelReader(columns, {value for _, values in blocks for value in values if value}, labels)
    if merged := reader.merged:
        pairs = [f"{name!r} for {kept!r}" for name, kept in merged.items()]
        warn(f"labels that are spelt in several ways are one class: {list_names(pairs, 4)}")
    return reader


def _from_one(source: SplitReader, count: int) -> bool:
    """Tell whether a split's integer labels are from 1 to `count`."""
    found = [labels for _, values in source.scan() if len(labels := LabelReader(source.columns).read(values))]
    known = np.concatenate([*found, np.zeros(0, np.int64)])
    return bool((known > 0).any() and (known != 0).all() and known.max() == count)
