"""The images of a run: those that its options name, or the model's own card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hfdetox.config import DEFAULT_SAMPLES, ImageOptions
from hfdetox.data.load import Images, default_dataset, load_images
from hfdetox.models.classifier import Classifier
from hfdetox.progress import progress_bar, updates

Options = TypeVar("Options", bound=ImageOptions)


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
        images = load_images(
            chosen, labels=classifier.labels,
            # what is only measured sets the same images aside
            clean_samples=getattr(options, "clean_samples", DEFAULT_SAMPLES), eval_samples=options.eval_samples,
            dataset_config=options.dataset_config, split=options.split, eval_split=options.eval_split,
            image_column=options.image_column, label_column=options.label_column, revision=options.dataset_revision,
            label_map=Path(options.label_map) if options.label_map else None, seed=options.seed,
            channels=classifier.preprocessing.input_size[0], allow_missing_classes=options.allow_missing_classes,
            warn=warn, progress=updates(bar),
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
