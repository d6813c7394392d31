"""Columns: which of a dataset's columns holds the images and which the labels, and what the labels' values mean."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Features, Image, Value

from hfdetox.errors import UsageError

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category", "fine_label", "coarse_label", "y")
IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes")
UNLABELLED = -1
_TEXTS, _BYTES = ("string", "large_string", "string_view"), ("binary", "large_binary")


class ColumnError(UsageError):
    """The image or the label column cannot be told from the features, or is not what was named."""


@dataclass(frozen=True)
class Columns:
    """The two columns a run reads; `names` are the label's class names, None for plain integers or text to be read."""

    image: str
    label: str
    kind: Literal["class", "integer", "text"]
    names: tuple[str, ...] | None = None


def find_columns(features: Features, *, image_column: str | None = None, label_column: str | None = None) -> Columns:
    """Find the image and the label column from the features, or take the named ones.

    Raises ColumnError when there is none, more than one, or when a named one does not exist or holds something else.
    """
    image = _one("image", "not images", image_column, features, _is_image, lambda name, feature: (
        0 if isinstance(feature, Image) else 1 if name in IMAGE_NAMES else None))  # fmt: skip
    label = _one("label", "not one label an image", label_column, features, _is_label, lambda name, feature: (
        0 if isinstance(feature, ClassLabel) else 1 if name in LABEL_NAMES else None))  # fmt: skip
    feature = features[label]
    if isinstance(feature, ClassLabel):
        return Columns(image, label, "class", tuple(feature.names))
    return Columns(image, label, "text" if feature.dtype in _TEXTS else "integer")


class LabelReader:
    """Turns a label column's stored values into dataset label indices; UNLABELLED (-1) where there is none.

    Attributes:
        names: the dataset's class names in index order, or None when its labels are plain integers.
    """

    def __init__(self, columns: Columns, seen: Collection[str] = ()) -> None:
        """`seen` are all values of a text column; those of whole numbers count as plain integers."""
        self.names: tuple[str, ...] | None = columns.names
        if columns.kind == "text" and not (seen and all(text.isdecimal() for text in seen)):
            self.names = tuple(sorted(set(seen)))
        self._codes = {name: i for i, name in enumerate(self.names or ())}

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return int64 indices (N,) of stored values (integers, text, None)."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "iub":
            return np.maximum(values.astype(np.int64), UNLABELLED)
        return np.array([self._index(value) for value in values], dtype=np.int64)

    def _index(self, value: Any) -> int:
        if value is None or value == "":
            return UNLABELLED
        if value in self._codes:
            return self._codes[value]
        if isinstance(value, str) and not value.isdecimal():
            raise ColumnError(f"label {value[:40]!r} is not among the dataset's class names; its metadata is wrong")
        return max(int(value), UNLABELLED)


def _one(
    what: str, not_it: str, named: str | None, features: Mapping[str, Any], fits: Callable[[Any], bool],
    rank: Callable[[str, Any], int | None],
) -> str:  # fmt: skip
    """Return the named column, or the one of the lowest rank among those that fit."""
    if named is not None:
        if named not in features:
            raise ColumnError(f"the dataset has no column {named!r} for --{what}-column; it has {_all(features)}")
        if not fits(features[named]):
            found = _kind(features[named])
            raise ColumnError(f"column {named!r} holds {found}, {not_it}; give --{what}-column (of {_all(features)})")
        return named
    ranks = {name: rank(name.lower(), feature) for name, feature in features.items() if fits(feature)}
    best = min((found for found in ranks.values() if found is not None), default=None)
    if best is None:
        raise ColumnError(
            f"the dataset has no {what} column that can be told from its features; its columns are {_all(features)}; "
            f"name one with --{what}-column, or choose another dataset")  # fmt: skip
    candidates = [name for name, found in ranks.items() if found == best]
    if len(candidates) > 1:
        raise ColumnError(f"several columns may hold the {what}: {', '.join(candidates)}; choose with --{what}-column")
    return candidates[0]


def _is_image(feature: Any) -> bool:
    """Return whether a column may hold encoded images: the Image type, bytes, or the struct that they are kept in."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in _BYTES)


def _is_label(feature: Any) -> bool:
    if not isinstance(feature, Value):
        return isinstance(feature, ClassLabel)
    return feature.dtype in (*_TEXTS, "bool") or feature.dtype.lstrip("u").startswith("int")


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _all(features: Mapping[str, Any]) -> str:
    names = [f"{name[:40]} ({_kind(feature)})" for name, feature in features.items()]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
