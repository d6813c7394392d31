"""What every run begins with: the model and the images for it."""

from collections.abc import Callable

from torch import nn

from hfdetox.config import DetoxOptions, ImageOptions
from hfdetox.data.load import Images, open_first, pull_images
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.runs.result import check_saves


def pull(given: ImageOptions, options: ImageOptions, warn: Callable[[str], None]) -> tuple[Classifier, Images]:
    """Return the classifier, the object that was given or the one that the options name, and the images for it.

    Args:
        given: with objects, as a person gave them.
        options: without.
    """
    opened = open_first(given, options, warn)
    classifier = pull_classifier(given, options)
    if isinstance(options, DetoxOptions):
        check_saves(classifier, options.output, warn)
    images = pull_images(options, given.dataset, classifier, warn, progress=given.progress, opened=opened)
    return classifier, images


def pull_classifier(given: ImageOptions, options: ImageOptions) -> Classifier:
    """Return the classifier alone, see `pull`."""
    model = given.model if isinstance(given.model, nn.Module) else str(options.model or "")
    return load_classifier(model, revision=options.revision, processor=given.processor,
                           preprocessing=given.preprocessing, labels=given.labels,
                           trust_remote_code=options.trust_remote_code)  # fmt: skip
