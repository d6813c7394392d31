"""Pull clean images: a small balanced set for the defense and another to measure with, in the model's label order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hfdetox.arguments import renames
from hfdetox.checks import check_pixel_range, check_samples
from hfdetox.config import DEFAULT_SAMPLES, EvaluateOptions, ImageOptions
from hfdetox.data.columns import ColumnError
from hfdetox.data.images import ImageSet, Progress, parallel_map, usual_range
from hfdetox.data.info import DatasetInfo, ImageChoice
from hfdetox.data.labels import DROPPED, Alignment, align_labels, list_names
from hfdetox.data.opened import OpenedDataset, open_dataset
from hfdetox.data.readers import SplitReader
from hfdetox.data.sampling import Chooser, Selection, TooFewImagesError, label_reader
from hfdetox.documents import card_header
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier, peek
from hfdetox.models.initial import ARCHITECTURE
from hfdetox.models.loaded import label_names
from hfdetox.progress import progress_bar, updates

Options = TypeVar("Options", bound=ImageOptions)

_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


class NoDatasetError(UsageError):
    """Neither a person nor the model's card names a dataset."""


@dataclass(frozen=True)
class Images:
    """`clean` images for the defense, `evaluation` images for measuring (no image is in both), and their record.

    `whole_split` says that the evaluation images are every row of a split that the clean ones are not from, each with
    a label of its own among the model's: only then is the accuracy on them the split's. `other` are the same images
    with the labels in the other usual order, where only an order says which class is which.
    """

    clean: ImageSet
    evaluation: ImageSet
    info: DatasetInfo
    whole_split: bool
    other: Images | None = None

    def relabelled(self, alignment: Alignment) -> Images:
        """Return the same images with the labels of `alignment.other`."""
        other = cast(Alignment, alignment.other)
        table = np.argsort(alignment.mapping)  # both are orders of the same classes
        clean, measured = (part.relabelled(np.array(other.mapping)[table]) for part in (self.clean, self.evaluation))
        return Images(clean, measured, replace(self.info, label_map=other.label_map), self.whole_split)


@renames(samples="clean_samples", config="dataset_config")
def load_images(
    dataset: str | Path | Dataset | DatasetDict, *, labels: Sequence[str], aliases: Sequence[Sequence[str]] = (),
    clean_samples: int | float | None = DEFAULT_SAMPLES, eval_samples: int | None = None,
    dataset_config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, revision: str | None = None,
    label_map: Path | Mapping[str, Any] | None = None, seed: int = 0, channels: int = 3,
    allow_missing_classes: bool = False, pixel_range: str | None = None,
    warn: Callable[[str], None] = lambda _: None, progress: Progress | None = None, hub_only: bool = False,
) -> Images:  # fmt: skip
    """Choose, fetch and check clean images of a Hub dataset, a folder or a `datasets` object.

    Args:
        dataset: a folder that exists, else a Hub id; or a loaded `Dataset`/`DatasetDict`.
        labels: the model's label names in index order; all labels returned are indices into it.
        aliases: other names of each label, such as WordNet ids.
        clean_samples: images for the defense: an int is a count, a float a fraction of the split (at most 5000
            images); as balanced over the classes as they allow. None is the whole split, as an attacker has it.
        eval_samples: images for measuring, drawn uniformly; None is the whole evaluation split.
        split, eval_split: default train, and test (else validation); seeded disjoint parts where there is one split.
        label_map: a JSON or YAML file, or a dict, of dataset names to model names, indices or null.
        seed: decides every choice; the same seed and revision give the same images.
        channels: 3 decodes to RGB, 1 to grey.
        allow_missing_classes: go on when a class of the model has no image.
        pixel_range: stored values of black and white, `LOW,HIGH`; None takes what the values of all images tell.
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
        pixel_range=pixel_range,
    )  # fmt: skip
    return _load(dataset, labels, aliases, clean_samples, options, channels=channels, warn=warn, progress=progress,
                 hub_only=hub_only)  # fmt: skip


def _load(
    dataset: Any, labels: Sequence[str], aliases: Sequence[Sequence[str]], clean_samples: int | float | None,
    options: ImageOptions, *, channels: int, warn: Callable[[str], None], progress: Progress | None, hub_only: bool,
    alone: bool = False,
) -> Images:  # fmt: skip
    """Do what `load_images` says, with `options` for most of its arguments.

    What is measured `alone` sets no images aside, and looks at no others.
    """
    if clean_samples is not None:
        check_samples("--samples", clean_samples)
    origin = open_dataset(dataset, options, labels, warn=warn, hub_only=hub_only)
    train, measures = split_names(origin.splits, options.split, options.eval_split, alone=alone)
    source = None if alone else origin.open(train)
    # without labels anywhere else a part of the training split is measured
    names = measures if options.eval_split is not None else [*measures, *([train] if train not in measures else [])]
    evaluation, chooser, eval_rows = _labelled(origin, source, names, lambda evaluation: _chooser(
        source or evaluation, evaluation, labels, aliases, clean_samples, options, warn), warn)  # fmt: skip
    alignment = chooser.alignment
    measured = _image_set(evaluation, eval_rows, channels)
    clean = measured.subset([])
    if source is not None:
        clean_rows = chooser.clean(source, eval_rows.indices if evaluation is source else ())
        clean = _image_set(source, clean_rows, channels)
    for part in dict.fromkeys(filter(None, [source, evaluation])):
        if missing := origin.undescribed(part):
            warn(f"{missing} images of split {part.split} are not in its metadata file, and are not used")
    pixel_range = _settle_range(clean, measured, options.pixel_range, warn)
    if source is not None:
        measured = _without_duplicates(clean, measured, warn, progress)
    one_to_one = DROPPED not in alignment.mapping and len(set(alignment.mapping)) == len(alignment.mapping)
    everything = len(measured) == evaluation.rows and not evaluation.limited
    asked = ImageChoice(clean_samples, options.eval_samples, options.image_column, options.label_column,
                        options.allow_missing_classes, options.pixel_range)  # fmt: skip
    info = replace(_record(origin, clean, measured, alignment, pixel_range), asked=asked)
    images = Images(clean, measured, info, evaluation is not source and one_to_one and everything)
    return images if alignment.other is None else replace(images, other=images.relabelled(alignment))


def _chooser(
    source: SplitReader, evaluation: SplitReader, labels: Sequence[str], aliases: Sequence[Sequence[str]],
    clean_samples: int | float | None, options: ImageOptions, warn: Callable[[str], None],
) -> Chooser:  # fmt: skip
    # what a map says needs no guess
    reader = label_reader(source, evaluation, labels=() if options.label_map else labels, warn=warn)
    alignment = align_labels(reader.names, labels, options.label_map, aliases)
    return Chooser(labels, clean_samples, options, warn, reader, alignment)


def _labelled(
    origin: OpenedDataset, source: SplitReader | None, names: Sequence[str],
    chooser_of: Callable[[SplitReader], Chooser], warn: Callable[[str], None],
) -> tuple[SplitReader, Chooser, Selection]:  # fmt: skip
    """Return the first of the named splits that has labels, what chooses of it, and what it chose to measure."""
    empty = list[str]()
    for name in names:
        try:
            evaluation = source if source is not None and name == source.split else origin.open(name)
        except ColumnError as error:
            if name == names[-1]:
                raise ColumnError(f"split {name}: {error}") from error
            empty.append(name)
            continue
        chooser = chooser_of(evaluation)
        rows = chooser.apart(evaluation) if evaluation is source else chooser.measured(evaluation)
        if len(rows.indices):
            break
        empty.append(name)
    else:
        raise TooFewImagesError(f"split {empty[-1]} has no image with a label; choose another --eval-split")
    if empty:
        instead = f"a part of {name} is measured" if evaluation is source else f"{name} is used for measuring"
        warn(f"split {' and '.join(empty)} has no labels; {instead}")
    if chooser.alignment.note:
        warn(chooser.alignment.note)
    return evaluation, chooser, rows


def _image_set(source: SplitReader, rows: Selection, channels: int) -> ImageSet:
    indices = rows.indices.tolist()
    return ImageSet(source.fetch(indices), rows.labels, indices, split=source.split, channels=channels)


def _record(
    origin: OpenedDataset, clean: ImageSet, measured: ImageSet, alignment: Alignment,
    pixel_range: tuple[float, float] | None,
) -> DatasetInfo:  # fmt: skip
    return DatasetInfo(
        id=origin.id, config=origin.config, split=clean.split, eval_split=measured.split, revision=origin.revision,
        source=origin.source, clean_samples=len(clean), eval_samples=len(measured),
        indices_sha256=clean.indices_sha256, eval_indices_sha256=measured.indices_sha256,
        label_map=alignment.label_map, pixel_range=pixel_range,
    )  # fmt: skip


def _settle_range(
    clean: ImageSet, measured: ImageSet, named: str | None, warn: Callable[[str], None]
) -> tuple[float, float] | None:
    """Give both sets the range of their stored pixels: the one that is named, else what all their values tell."""
    every = [(images, position) for images in (clean, measured) for position in range(len(images))]
    if named is not None:
        chosen = check_pixel_range("--pixel-range", named)
    elif found := [one for one in parallel_map(lambda one: one[0].extremes(one[1]), every) if one is not None]:
        chosen = usual_range(found)
        warn(f"pixels of {len(found)} images are stored as numbers from {min(found)[0]:g} to "
             f"{max(high for _, high, _ in found):g}, and {chosen[0]:g} was taken for black, {chosen[1]:g} for white; "
             "--pixel-range names others")  # fmt: skip
    else:
        return None
    for images in (clean, measured):
        images.pixel_range, images.range_named = chosen, named is not None
    return chosen


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
    train, _ = split_names(origin.splits, options.split, None)
    source = origin.open(train)
    reader = label_reader(source)
    if reader.names is not None:
        return reader.names
    return 1 + max((int(reader.read(values).max(initial=-1)) for _, values in source.scan()), default=-1)


def default_dataset(card_text: str | None) -> str:
    """Return the one dataset that a model card's YAML names, a Hub id; UsageError when it names none or several.

    The card is a stranger's: load what it names with `hub_only`, or it could choose a folder of this machine.
    """
    advice = "give --dataset ID"
    try:
        named = card_header(card_text).get("datasets")
    except ValueError as error:
        raise UsageError(f"the YAML of the model's card cannot be read ({error}); {advice}") from error
    listed = named if isinstance(named, list) else [named]
    ids = sorted({name.strip() for name in listed if isinstance(name, str)} - {""})
    if not ids:
        raise NoDatasetError(f"the model's card names no dataset; {advice}")
    if len(ids) > 1:
        raise UsageError(f"the model's card names {len(ids)} datasets ({list_names(ids, 5)}); {advice}")
    try:
        validate_repo_id(ids[0])
    except HFValidationError:
        raise UsageError(f"the model's card names the dataset {ids[0][:80]!r}, which is no Hub id; {advice}") from None
    return ids[0]


def split_names(
    splits: Sequence[str], split: str | None, eval_split: str | None, *, alone: bool = False
) -> tuple[str, list[str]]:
    """Return the split for the defense and those to measure with, the preferred one first; the same one means parts.

    With `alone` there is no defense, and its split is measured where no other has labels.
    """
    names = list_names(splits, 12)
    for name, option in ((split, "--split"), (eval_split, "--eval-split")):
        if name is not None and name not in splits:
            raise UsageError(f"{option} {name}: the dataset has no such split; it has {names}")
    if alone:
        named = [eval_split] if eval_split else [name for name in _EVAL_NAMES if name in splits and name != split]
        if not named and len(splits) > 1:
            raise UsageError(f"the dataset has no test or validation split; choose one with --eval-split ({names})")
        return next((name for name in _TRAIN_NAMES if name in splits), splits[-1]), list(named or splits)
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


def open_images(
    options: ImageOptions, dataset: Any, labels: Sequence[str], aliases: Sequence[Sequence[str]], card: str | None,
    warn: Callable[[str], None],
) -> OpenedDataset:  # fmt: skip
    """Open a dataset, and check what its header tells: its splits, its columns, and that its classes are the model's.

    Args:
        dataset: an object, or the id or folder that `options` has too; None for the one that the card names.
        labels: the model's; none where they are not known yet, and no classes are checked.
        aliases: other names of each.
        card: text of the model's card.

    Raises what `load_images` raises.
    """
    chosen = options.dataset if dataset is None or isinstance(dataset, str | Path) else dataset
    named_by_card = chosen is None
    if chosen is None:
        chosen = default_dataset(card)
        warn(f"the images are from {chosen}, which the model's own card names: its author chose them")
    # a resumed run's dataset with a commit was one of the Hub, whatever folder has its name here
    hub_only = dataset is None and (options.dataset is None or options.dataset_revision is not None)
    origin = open_dataset(chosen, options, labels, warn=warn, hub_only=hub_only)
    origin.named_by_card = named_by_card
    alone = isinstance(options, EvaluateOptions)
    train, measures = split_names(origin.splits, options.split, options.eval_split, alone=alone)
    # a split to measure with may be without labels where another has them
    with suppress(ColumnError) if alone and len(origin.splits) > 1 else nullcontext():
        names = origin.columns(measures[0] if alone else train).names
        if labels and names is not None:
            align_labels(names, labels, options.label_map, aliases)
    return origin


def open_first(given: ImageOptions, options: ImageOptions, warn: Callable[[str], None]) -> OpenedDataset | None:
    """Open the dataset before the model, so that what is wrong with it is said before any weights are pulled.

    Args:
        given: with objects, as a person gave them.
        options: without.

    Returns:
        None where no weights are to be pulled: for a module, and for weights that are drawn.

    Raises what `load_images` raises, and what `load_classifier` raises of a model without a usable config.json.
    """
    model = str(options.model or "")
    if isinstance(given.model, nn.Module) or model.startswith(ARCHITECTURE) or getattr(options, "init", None):
        return None
    card, labels, aliases = peek(model, options.revision, options.trust_remote_code)
    if given.labels is not None:
        labels = label_names(given.labels)
    return open_images(options, given.dataset, labels, aliases, card, warn)


def pull_images(
    options: ImageOptions, dataset: Any, classifier: Classifier, warn: Callable[[str], None], *, progress: bool = False,
    opened: OpenedDataset | None = None,
) -> Images:  # fmt: skip
    """Return the clean and evaluation images of a dataset, see `open_images`, which may have opened it already."""
    for text in classifier.warnings:
        warn(text)
    if opened is None or tuple(opened.labels) != classifier.labels:
        opened = open_images(options, dataset, classifier.labels, classifier.aliases, classifier.card_source(), warn)
    # every image is decoded once, which takes minutes for large sets
    with progress_bar("read images", None, "image", shown=progress) as bar:
        images = _load(
            opened, classifier.labels, classifier.aliases, getattr(options, "clean_samples", None), options,
            channels=classifier.preprocessing.input_size[0], warn=warn, progress=updates(bar), hub_only=False,
            alone=isinstance(options, EvaluateOptions),
        )  # fmt: skip
    return replace(images, info=replace(images.info, named_by_card=opened.named_by_card))


def pin(options: Options, classifier: Classifier, images: Images) -> Options:
    """Return the options with the commits that were found, so that repeating them repeats the run."""
    if classifier.info.revision is not None:
        options = replace(options, model=classifier.info.id, revision=classifier.info.revision)
    if images.info.revision is not None:
        options = replace(options, dataset=images.info.id, dataset_revision=images.info.revision)
    return options
