"""Pull clean images: a small balanced set for the defense and another to measure with, in the model's label order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfdetox.arguments import renames
from hfdetox.config import DEFAULT_SAMPLES, check_samples
from hfdetox.data.cache import Pixels
from hfdetox.data.columns import ColumnError, LabelReader
from hfdetox.data.images import BrokenImageError, ImageSet
from hfdetox.data.info import DatasetInfo
from hfdetox.data.labels import DROPPED, Alignment, LabelMismatchError, align_labels, list_names
from hfdetox.data.opened import OpenedDataset, open_dataset
from hfdetox.data.readers import SCAN_LIMIT, Block, SplitReader
from hfdetox.data.sampling import Selection, choose_balanced, choose_uniform, sample_count
from hfdetox.errors import UsageError
from hfdetox.values import load_yaml

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["BrokenImageError", "ImageSet", "Images", "Pixels", "class_names", "default_dataset", "load_images"]

# of a dataset with one split: the share of its rows kept for measuring, and the most of them unless asked for more
_EVAL_SHARE, _EVAL_MOST = 0.2, 10_000
_TRAIN_NAMES = ("train", "training")
# where DROPPED (-1) is a class left out
_UNLABELLED = -2
_EVAL_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


class SplitError(UsageError):
    """A split that the dataset does not have, or none that fits."""


class TooFewImagesError(UsageError):
    """Fewer images than asked for, or a class without any."""


@dataclass(frozen=True)
class Images:
    """`clean` images for the defense, `evaluation` images for measuring (no image is in both), and their record.

    `whole_split` says that the evaluation images are every row of a split that the clean ones are not from, each with
    a label of its own among the model's: only then is the accuracy on them the split's.
    """

    clean: ImageSet
    evaluation: ImageSet
    info: DatasetInfo
    whole_split: bool


@renames(samples="clean_samples", config="dataset_config")
def load_images(
    dataset: str | Path | Dataset | DatasetDict, *, labels: Sequence[str],
    clean_samples: int | float | None = DEFAULT_SAMPLES, eval_samples: int | None = None,
    dataset_config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, revision: str | None = None,
    label_map: Path | Mapping[str, Any] | None = None, seed: int = 0, channels: int = 3,
    allow_missing_classes: bool = False, warn: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None, hub_only: bool = False,
) -> Images:  # fmt: skip
    """Choose, fetch and check clean images of a Hub dataset, a folder or a `datasets` object.

    Args:
        dataset: a folder that exists, else a Hub id; or a loaded `Dataset`/`DatasetDict`.
        labels: the model's label names in index order; all labels returned are indices into it.
        clean_samples: images for the defense: an int is a count, a float a fraction of the split (at most 5000
            images); as balanced over the classes as they allow. None is the whole split, as an attacker has it.
        eval_samples: images for measuring, drawn uniformly; None is the whole evaluation split.
        split, eval_split: default train, and test (else validation); seeded disjoint parts where there is one split.
        label_map: a JSON or YAML file, or a dict, of dataset names to model names, indices or null.
        seed: decides every choice; the same seed and revision give the same images.
        channels: 3 decodes to RGB, 1 to grey.
        allow_missing_classes: go on when a class of the model has no image.
        warn: called with each line a person should know of.
        progress: called with (done, total) while the images are decoded once, to find broken ones and duplicates.
        hub_only: never take `dataset` for a folder; for names that come from elsewhere than the person who runs this.

    Raises UsageError for what cannot be done as asked (sizes, columns, labels, splits), BrokenImageError (RunError)
    with the row of an image that cannot be decoded, and HubError for the Hub.
    """
    if clean_samples is not None:
        check_samples("--samples", clean_samples)
    if eval_samples is not None:
        check_samples("--eval-samples", int(eval_samples))
    origin = open_dataset(dataset, config=dataset_config, revision=revision, image_column=image_column,
                          label_column=label_column, warn=warn, hub_only=hub_only)  # fmt: skip
    plan = _Plan(
        origin=origin, labels=labels, samples=clean_samples, eval_samples=eval_samples, label_map=label_map, seed=seed,
        channels=channels, allow_missing_classes=allow_missing_classes, warn=warn, progress=progress,
    )  # fmt: skip
    return plan.load(*_split_names(origin.splits, split, eval_split))


@dataclass
class _Plan:
    """One call of `load_images` with its dataset opened."""

    origin: OpenedDataset
    labels: Sequence[str]
    samples: int | float | None
    eval_samples: int | None
    label_map: Path | Mapping[str, Any] | None
    seed: int
    channels: int
    allow_missing_classes: bool
    warn: Callable[[str], None]
    progress: Callable[[int, int], None] | None
    reader: LabelReader = field(init=False)
    alignment: Alignment = field(init=False)

    def load(self, train: str, measures: list[str]) -> Images:
        """Choose and fetch; `measures` are the evaluation splits to try in turn."""
        source = self.origin.open(train)
        evaluation = source if measures[0] == train else self.origin.open(measures[0])
        self._align(source, evaluation)
        if evaluation is source:
            clean_rows, eval_rows = self._disjoint(source)
        else:
            evaluation, eval_rows = self._measured(evaluation, measures)
            clean_rows = self._clean(source)
        clean, measured = self._image_set(source, clean_rows), self._image_set(evaluation, eval_rows)
        measured = self._without_duplicates(clean, measured)
        mapping = self.alignment.mapping
        one_to_one = DROPPED not in mapping and len(set(mapping)) == len(mapping)
        everything = len(measured) == evaluation.rows and not evaluation.limited
        whole_split = evaluation is not source and one_to_one and everything
        origin = self.origin
        info = DatasetInfo(
            id=origin.id, config=origin.config, split=clean.split, eval_split=measured.split, revision=origin.revision,
            source=origin.source, clean_samples=len(clean), eval_samples=len(measured),
            indices_sha256=clean.indices_sha256, eval_indices_sha256=measured.indices_sha256,
            label_map=self.alignment.label_map,
        )  # fmt: skip
        return Images(clean, measured, info, whole_split)

    def _image_set(self, source: SplitReader, rows: Selection) -> ImageSet:
        indices = rows.indices.tolist()
        return ImageSet(source.fetch(indices), rows.labels, indices, split=source.split, channels=self.channels)

    def _align(self, source: SplitReader, evaluation: SplitReader) -> None:
        columns, other = (self.origin.columns(one.split) for one in (source, evaluation))
        if (columns.kind, columns.names) != (other.kind, other.names):
            raise ColumnError(f"splits {source.split} and {evaluation.split} have other classes; choose another "
                              "--eval-split")  # fmt: skip
        seen: set[str] = set()
        if columns.kind == "text":
            for part in {source.split: source, evaluation.split: evaluation}.values():
                seen.update(value for _, values in part.scan() for value in values if value)
        self.reader = LabelReader(columns, sorted(seen))
        self.alignment = align_labels(self.reader.names, self.labels, self.label_map)
        if self.alignment.note:
            self.warn(self.alignment.note)

    def _scan(self, source: SplitReader, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield blocks of row numbers and the model's labels: -1 where a class is left out, -2 where there is none."""
        mapping = np.array([*self.alignment.mapping, _UNLABELLED])  # index -1 is a row without a label
        for indices, values in source.scan(rng):
            found = self.reader.read(values)
            if len(found) and found.max() >= len(mapping) - 1:
                raise LabelMismatchError(
                    f"split {source.split} has the label {found.max()} and the model {len(self.labels)} labels; "
                    "name another --label-column, or say which classes these are with --label-map"
                )
            yield indices, mapping[found]

    def _all_rows(self, source: SplitReader) -> Selection:
        """Return every usable row of a split with its label."""
        empty = np.zeros(0, np.int64)
        indices, labels = zip((empty, empty), *self._scan(source), strict=True)
        rows = Selection(np.concatenate(indices), np.concatenate(labels))
        unlabelled = int((rows.labels == _UNLABELLED).sum())
        if 0 < unlabelled < len(rows.indices):
            self.warn(
                f"{unlabelled} of {len(rows.indices)} rows of split {source.split} have no label and were left out"
            )
        if source.limited:
            self.warn(
                f"split {source.split} is a stream: its first {SCAN_LIMIT} rows were read, the rest was not looked at"
            )
        return rows.where(rows.labels >= 0)

    def _clean(self, source: SplitReader, taken: Sequence[int] | np.ndarray = ()) -> Selection:
        """Choose the clean images, none of the rows in `taken`."""
        if self.samples is not None:
            return self._balanced(source, taken, self.samples)
        source.expect_all()
        rows = self._all_rows(source)
        rows = rows.where(~np.isin(rows.indices, taken))
        self._check_classes(rows.labels, f"split {source.split}")
        return rows

    def _balanced(self, source: SplitReader, taken: Sequence[int] | np.ndarray, samples: int | float) -> Selection:
        rng = np.random.default_rng([self.seed, 1])
        if source.rows is None and isinstance(samples, float):
            for _ in source.scan():  # a fraction of a stream is a fraction of what can be read of it
                pass
        blocks = ((indices, np.where(np.isin(indices, taken), -1, labels))
                  for indices, labels in self._scan(source, rng))  # fmt: skip

        def count() -> int:
            return sample_count(samples, source.rows or 0)

        chosen, seen = choose_balanced(blocks, count, sorted(set(self.alignment.mapping) - {DROPPED}), rng)
        self._check_balance(source, chosen, seen, count())
        return chosen

    def _check_balance(self, source: SplitReader, chosen: Selection, seen: dict[int, int], wanted: int) -> None:
        """Raise TooFewImagesError, or warn, where the chosen images are not what was asked for."""
        where = f"split {source.split}" + (f" (its first {SCAN_LIMIT} rows, the scan limit)" if source.limited else "")
        available = sum(seen.values())
        if available < wanted:
            if not isinstance(self.samples, float) or not available:
                raise TooFewImagesError(
                    f"--samples {self.samples}: {where} has {available} labelled images; ask for fewer"
                )
            self.warn(f"{where} has only {available} usable images; all were taken")
        present = [c for c, number in seen.items() if number]
        if wanted < len(present) and not self.allow_missing_classes:
            raise TooFewImagesError(
                f"--samples {self.samples} gives {wanted} images, fewer than the {len(present)} classes; "
                f"give --samples {len(present)} or more"
            )
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
            if not self.allow_missing_classes:
                raise TooFewImagesError(
                    f"{where} has no image of {which}; choose another dataset, or go on with --allow-missing-classes"
                )
            self.warn(f"there is no clean image of {which}")
        return took

    def _disjoint(self, source: SplitReader) -> tuple[Selection, Selection]:
        """Choose both sets from one split: first, uniformly, the images to measure with, then the clean ones."""
        rows = self._all_rows(source)
        total = len(rows.indices)
        count = self.eval_samples or min(_EVAL_MOST, max(1, int(_EVAL_SHARE * total)))
        if count >= total:
            raise TooFewImagesError(
                f"split {source.split} has {total} labelled images for both sets, and {count} evaluation images leave "
                "none for the defense; ask for fewer with --eval-samples"
            )
        measured = choose_uniform(rows, count, np.random.default_rng([self.seed, 2]))
        self.warn(f"split {source.split} serves for both sets: {count} of its {total} images are kept for measuring")
        return self._clean(source, measured.indices), measured

    def _measured(self, source: SplitReader, names: list[str]) -> tuple[SplitReader, Selection]:
        """Choose the evaluation rows of the first split in `names` with labels; `source` is that of the first name."""
        for number, name in enumerate(names):
            source = source if number == 0 else self.origin.open(name)
            if self.eval_samples is None:
                source.expect_all()
            rows = self._all_rows(source)
            total = len(rows.indices)
            if total:
                break
            if number + 1 < len(names):
                self.warn(f"split {name} has no labels; {names[number + 1]} is used for measuring")
        else:
            raise TooFewImagesError(f"split {names[-1]} has no image with a label; choose another --eval-split")
        if self.eval_samples is not None and self.eval_samples > total:
            self.warn(f"--eval-samples {self.eval_samples}: split {source.split} has {total} images; all are used")
        return source, choose_uniform(rows, self.eval_samples, np.random.default_rng([self.seed, 2]))

    def _without_duplicates(self, clean: ImageSet, measured: ImageSet) -> ImageSet:
        """Return the evaluation images whose pixels are not those of a clean image; decodes every image once."""
        total = len(clean) + len(measured)

        def report(offset: int) -> Callable[[int, int], None]:
            return lambda done, _: self.progress(offset + done, total) if self.progress else None

        known = set(clean.fingerprints(report(0)))
        prints = measured.fingerprints(report(len(clean)))
        keep = [position for position, fingerprint in enumerate(prints) if fingerprint not in known]
        dropped = len(measured) - len(keep)
        if not dropped:
            return measured
        if not keep:
            raise TooFewImagesError(
                f"every image of split {measured.split} is among the clean images; choose another --eval-split"
            )
        self.warn(f"{dropped} evaluation images have the same pixels as a clean image and were left out")
        return measured.subset(keep)


def class_names(
    dataset: str | Path | Dataset | DatasetDict, *, dataset_config: str | None = None, split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, revision: str | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...] | int:  # fmt: skip
    """Return a dataset's class names in index order, or how many there are when its labels are plain integers.

    The arguments, and what is raised, are those of `load_images`.
    """
    origin = open_dataset(dataset, config=dataset_config, revision=revision, image_column=image_column,
                          label_column=label_column, warn=warn)  # fmt: skip
    train, _ = _split_names(origin.splits, split, None)
    columns = origin.columns(train)
    if columns.names is not None:
        return columns.names
    values = [value for _, block in origin.open(train).scan() for value in np.asarray(block).tolist()]
    seen = sorted({value for value in values if value}) if columns.kind == "text" else []
    reader = LabelReader(columns, seen)
    return reader.names or int(reader.read(values).max(initial=-1)) + 1


def default_dataset(card_text: str | None) -> str:
    """Return the one dataset that a model card's YAML names, a Hub id; UsageError when it names none or several.

    The card is a stranger's: load what it names with `hub_only`, or it could choose a folder of this machine.
    """
    advice = "give --dataset ID"
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card_text or "", re.DOTALL)
    try:
        header = load_yaml(match.group(1)) if match else None
    except ValueError as error:
        raise UsageError(f"the YAML of the model's card cannot be read; {advice}") from error
    named = header.get("datasets") if isinstance(header, dict) else None
    ids = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    ids = sorted({name.strip() for name in ids if isinstance(name, str) and name.strip()})
    if not ids:
        raise UsageError(f"the model's card names no dataset; {advice}")
    if len(ids) > 1:
        raise UsageError(f"the model's card names {len(ids)} datasets ({', '.join(ids[:5])}); {advice}")
    try:
        validate_repo_id(ids[0])
    except HFValidationError:
        raise UsageError(f"the model's card names the dataset {ids[0][:80]!r}, which is no Hub id; {advice}") from None
    return ids[0]


def _split_names(splits: Sequence[str], split: str | None, eval_split: str | None) -> tuple[str, list[str]]:
    """Return the split for the defense and those to measure with, the preferred one first; the same one means parts."""
    names = list_names(splits, 12)
    for name, option in ((split, "--split"), (eval_split, "--eval-split")):
        if name is not None and name not in splits:
            raise SplitError(f"{option} {name}: the dataset has no such split; it has {names}")
    train = split or next((name for name in _TRAIN_NAMES if name in splits), None)
    if train is None:
        others = [name for name in splits if name != eval_split and (len(splits) == 1 or name not in _EVAL_NAMES)]
        train = others[0] if len(others) == 1 else splits[0] if len(splits) == 1 else None
    if train is None:
        raise SplitError(f"the dataset has no train split; choose one with --split ({names})")
    if eval_split is not None:
        return train, [eval_split]
    measures = [name for name in _EVAL_NAMES if name in splits and name != train]
    if not measures and len(splits) > 1:
        raise SplitError(f"the dataset has no test or validation split; choose one with --eval-split ({names})")
    return train, measures or [train]
