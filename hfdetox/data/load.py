"""Pull clean images: a small balanced set for the defense and another to measure with, in the model's label order."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfdetox.arguments import renames
from hfdetox.config import DEFAULT_SAMPLES, EvaluateOptions, ImageOptions, check_samples
from hfdetox.data.columns import ColumnError, LabelReader
from hfdetox.data.images import ImageSet, Progress, parallel_map
from hfdetox.data.info import DatasetInfo
from hfdetox.data.labels import DROPPED, Alignment, LabelMismatchError, align_labels, list_names
from hfdetox.data.opened import open_dataset
from hfdetox.data.readers import SCAN_LIMIT, Block, SplitReader
from hfdetox.data.sampling import Selection, choose_balanced, choose_uniform, sample_count
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier
from hfdetox.progress import progress_bar, updates
from hfdetox.values import parse_yaml

Options = TypeVar("Options", bound=ImageOptions)

# of a dataset with one split: the share of its rows kept for measuring, and the most of them unless asked for more
_EVAL_SHARE, _EVAL_MOST = 0.2, 10_000
_TRAIN_NAMES = ("train", "training")
# where DROPPED (-1) is a class left out
_UNLABELLED = -2
_EVAL_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


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
    progress: Progress | None = None, hub_only: bool = False,
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
    options = EvaluateOptions(
        dataset_config=dataset_config, split=split, eval_split=eval_split, image_column=image_column,
        label_column=label_column, eval_samples=eval_samples, dataset_revision=revision,
        label_map=cast(Any, label_map), allow_missing_classes=allow_missing_classes, seed=seed,
    )  # fmt: skip
    return _load(dataset, labels, clean_samples, options, channels=channels, warn=warn, progress=progress,
                 hub_only=hub_only)  # fmt: skip


def _load(
    dataset: Any, labels: Sequence[str], clean_samples: int | float | None, options: ImageOptions, *, channels: int,
    warn: Callable[[str], None], progress: Progress | None, hub_only: bool,
) -> Images:  # fmt: skip
    """Do what `load_images` says, with `options` for most of its arguments."""
    if clean_samples is not None:
        check_samples("--samples", clean_samples)
    origin = open_dataset(dataset, options, warn=warn, hub_only=hub_only)
    train, measures = _split_names(origin.splits, options.split, options.eval_split)
    source = origin.open(train)
    evaluation = source if measures[0] == train else origin.open(measures[0])
    reader = _label_reader(source, evaluation)
    alignment = align_labels(reader.names, labels, options.label_map)
    if alignment.note:
        warn(alignment.note)
    chooser = _Chooser(labels, clean_samples, options, warn, reader, alignment)
    if evaluation is source:
        clean_rows, eval_rows = chooser.disjoint(source)
    else:
        evaluation, eval_rows = chooser.measured(chain([evaluation], map(origin.open, measures[1:])))
        clean_rows = chooser.clean(source)
    clean, measured = _image_set(source, clean_rows, channels), _image_set(evaluation, eval_rows, channels)
    measured = _without_duplicates(clean, measured, warn, progress)
    one_to_one = DROPPED not in alignment.mapping and len(set(alignment.mapping)) == len(alignment.mapping)
    everything = len(measured) == evaluation.rows and not evaluation.limited
    info = DatasetInfo(
        id=origin.id, config=origin.config, split=clean.split, eval_split=measured.split, revision=origin.revision,
        source=origin.source, clean_samples=len(clean), eval_samples=len(measured),
        indices_sha256=clean.indices_sha256, eval_indices_sha256=measured.indices_sha256,
        label_map=alignment.label_map,
    )  # fmt: skip
    return Images(clean, measured, info, evaluation is not source and one_to_one and everything)


def _image_set(source: SplitReader, rows: Selection, channels: int) -> ImageSet:
    indices = rows.indices.tolist()
    return ImageSet(source.fetch(indices), rows.labels, indices, split=source.split, channels=channels)


def _label_reader(*sources: SplitReader) -> LabelReader:
    columns, other = sources[0].columns, sources[-1].columns
    if (columns.kind, columns.names) != (other.kind, other.names):
        raise ColumnError(f"split {sources[-1].split} has other classes than {sources[0].split}; give --eval-split")
    blocks = chain(*(source.scan() for source in sources)) if columns.kind == "text" else ()
    return LabelReader(columns, {value for _, values in blocks for value in values if value})


@dataclass(frozen=True)
class _Chooser:
    """Chooses rows for one call of `load_images`."""

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
                raise LabelMismatchError(f"split {source.split} has the label {found.max()} and the model "
                                         f"{len(self.labels)} labels; give --label-column or --label-map")  # fmt: skip
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

    def disjoint(self, source: SplitReader) -> tuple[Selection, Selection]:
        """Choose both sets from one split: first, uniformly, the images to measure with, then the clean ones."""
        rows = self._all_rows(source)
        total = len(rows.indices)
        count = self.options.eval_samples or min(_EVAL_MOST, max(1, int(_EVAL_SHARE * total)))
        if count >= total:
            raise TooFewImagesError(f"split {source.split} has {total} labelled images for both sets, and {count} "
                                    "for measuring leave none for the defense; lower --eval-samples")  # fmt: skip
        measured = choose_uniform(rows, count, np.random.default_rng([self.options.seed, 2]))
        self.warn(f"split {source.split} serves for both sets: {count} of its {total} images are kept for measuring")
        return self.clean(source, measured.indices), measured

    def measured(self, sources: Iterable[SplitReader]) -> tuple[SplitReader, Selection]:
        """Choose the evaluation rows of the first of `sources` with labels."""
        empty = list[str]()
        for source in sources:
            rows = self._all_rows(source)
            total = len(rows.indices)
            if total:
                break
            empty.append(source.split)
        else:
            raise TooFewImagesError(f"split {empty[-1]} has no image with a label; choose another --eval-split")
        if empty:
            self.warn(f"split {' and '.join(empty)} has no labels; {source.split} is used for measuring")
        wanted = self.options.eval_samples
        if wanted is not None and wanted > total:
            self.warn(f"--eval-samples {wanted}: split {source.split} has {total} images; all are used")
        return source, choose_uniform(rows, wanted, np.random.default_rng([self.options.seed, 2]))


def _without_duplicates(
    clean: ImageSet, measured: ImageSet, warn: Callable[[str], None], progress: Progress | None
) -> ImageSet:
    """Return the evaluation images whose pixels are not those of a clean image; decodes every image once."""
    every = [(images, position) for images in (clean, measured) for position in range(len(images))]
    prints = parallel_map(lambda one: one[0].fingerprint(one[1]), every, progress)
    known = set(prints[: len(clean)])
    keep = [position for position, fingerprint in enumerate(prints[len(clean) :]) if fingerprint not in known]
    if not keep:
        raise TooFewImagesError(f"all of split {measured.split} is among the clean images; choose another --eval-split")
    if dropped := len(measured) - len(keep):
        warn(f"{dropped} evaluation images have the same pixels as a clean image and were left out")
    return measured.subset(keep)


def class_names(dataset: Any, options: ImageOptions) -> tuple[str, ...] | int:
    """Return a dataset's class names in index order, or how many there are when its labels are plain integers.

    `dataset` is an object, a folder or a Hub id. Raises UsageError where it is None, else what `load_images` raises.
    """
    if dataset is None:
        raise UsageError("a model of fresh weights has no card that names a dataset: give --dataset ID")
    origin = open_dataset(dataset, options, warn=lambda _: None)
    train, _ = _split_names(origin.splits, options.split, None)
    source = origin.open(train)
    reader = _label_reader(source)
    if reader.names is not None:
        return reader.names
    return 1 + max((int(reader.read(values).max(initial=-1)) for _, values in source.scan()), default=-1)


def default_dataset(card_text: str | None) -> str:
    """Return the one dataset that a model card's YAML names, a Hub id; UsageError when it names none or several.

    The card is a stranger's: load what it names with `hub_only`, or it could choose a folder of this machine.
    """
    advice = "give --dataset ID"
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card_text or "", re.DOTALL)
    try:
        header = parse_yaml(match.group(1)) if match else None
    except ValueError as error:
        raise UsageError(f"the YAML of the model's card cannot be read; {advice}") from error
    named = header.get("datasets") if isinstance(header, dict) else None
    listed = named if isinstance(named, list) else [named]
    ids = sorted({name.strip() for name in listed if isinstance(name, str)} - {""})
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
            raise UsageError(f"{option} {name}: the dataset has no such split; it has {names}")
    others = [name for name in splits if len(splits) == 1 or name not in (*_EVAL_NAMES, eval_split)]
    train = split or next((name for name in _TRAIN_NAMES if name in splits), others[0] if len(others) == 1 else None)
    if train is None:
        raise UsageError(f"the dataset has no train split; choose one with --split ({names})")
    if eval_split is not None:
        return train, [eval_split]
    measures = [name for name in _EVAL_NAMES if name in splits and name != train]
    if not measures and len(splits) > 1:
        raise UsageError(f"the dataset has no test or validation split; choose one with --eval-split ({names})")
    return train, measures or [train]


def pull_images(
    options: ImageOptions, dataset: Any, classifier: Classifier, warn: Callable[[str], None], *, progress: bool = False
) -> Images:
    """Return the clean and evaluation images; `dataset` is an object, or the id or folder that `options` has too."""
    for text in classifier.warnings:
        warn(text)
    chosen = options.dataset if dataset is None or isinstance(dataset, str | Path) else dataset
    named_by_card = chosen is None
    if chosen is None:
        chosen = default_dataset(classifier.card_source())
        warn(f"the clean images are from {chosen}, which the model's own card names: its author chose them")
    # every image is decoded once, which takes minutes for large sets
    with progress_bar("read images", None, "image", shown=progress) as bar:
        images = _load(
            # what is only measured sets the same images aside
            chosen, classifier.labels, getattr(options, "clean_samples", DEFAULT_SAMPLES), options,
            channels=classifier.preprocessing.input_size[0], warn=warn, progress=updates(bar),
            # a resumed run's dataset with a commit was one of the Hub, whatever folder has its name here
            hub_only=dataset is None and (options.dataset is None or options.dataset_revision is not None),
        )  # fmt: skip
    return replace(images, info=replace(images.info, named_by_card=named_by_card))


def pin(options: Options, classifier: Classifier, images: Images) -> Options:
    """Return the options with the commits that were found, so that repeating them repeats the run."""
    if classifier.info.revision is not None:
        options = replace(options, model=classifier.info.id, revision=classifier.info.revision)
    if images.info.revision is not None:
        options = replace(options, dataset=images.info.id, dataset_revision=images.info.revision)
    return options
