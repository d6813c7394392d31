"""Which images a run used, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageChoice:
    """What was asked for when the images were chosen: with it, the splits and the seed they are chosen again.

    Attributes:
        clean_samples: how many clean images, a count or a fraction of the split; None for the whole split.
        eval_samples: how many images to measure; None for the whole split.
        image_column: that was named; None where it was found.
        label_column: the same of the labels.
        allow_missing_classes: whether classes without images were accepted.
        pixel_range: the stored values of black and white that were named; None where the images told.
    """

    clean_samples: int | float | None
    eval_samples: int | None
    image_column: str | None = None
    label_column: str | None = None
    allow_missing_classes: bool = False
    pixel_range: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """Which images were used.

    Attributes:
        id: as it was named: a Hub id, or the last part of a folder's path.
        config: the dataset's configuration.
        split: of the clean images.
        eval_split: of the images that are measured.
        revision: the commit on the Hub; None for a folder or an object.
        source: `hub`, `folder` or `object`.
        clean_samples: how many clean images.
        eval_samples: how many images are measured.
        indices_sha256: SHA-256 over the row numbers of the clean images in their split.
        eval_indices_sha256: the same of the images that are measured.
        label_map: dataset name to model name where the two differ; empty text for a class that was left out.
        pixel_range: the stored values of black and white; None where every image has 8 bits, 0 to 255.
        named_by_card: whether nobody named it but the model's own card, whose author so chose the images.
        asked: what was asked for; None in reports of schema versions 1 to 3.
    """

    id: str
    config: str | None
    split: str
    eval_split: str
    revision: str | None
    source: str
    clean_samples: int
    eval_samples: int
    indices_sha256: str
    eval_indices_sha256: str
    label_map: dict[str, str]
    pixel_range: tuple[float, float] | None = None
    named_by_card: bool = False
    asked: ImageChoice | None = None

    def described(self) -> str:
        """Return how many clean images there were, and whose choice, such as "2,500 trusted images"."""
        who = "images that the model's author chose" if self.named_by_card else "trusted images"
        return f"{self.clean_samples:,} {who}"
