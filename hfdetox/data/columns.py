"""Columns: which of a dataset's columns holds the images and which the labels, and what the labels' values mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Features, Image, Value

from hfdetox.errors import UsageError

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category", "fine_label", "coarse_label", "y")
IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes")
UNLABELLED = -1
_TEXTS = ("string", "large_string", "string_view")


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
    image = _one("image", image_column, features, [
        [name for name, feature in features.items() if isinstance(feature, Image)],
        [name for name, feature in features.items() if _is_stored_image(feature) and name.lower() in IMAGE_NAMES],
    ])  # fmt: skip
    label = _one("label", label_column, features, [
        [name for name, feature in features.items() if isinstance(feature, ClassLabel)],
        [name for name, feature in features.items() if _is_plain_label(feature) and name.lower() in LABEL_NAMES],
    ])  # fmt: skip
    if not isinstance(features[image], Image) and not _is_stored_image(features[image]):
        found = _kind(features[image])
        raise ColumnError(f"column {image!r} holds {found}, not images; give --image-column (of {_all(features)})")
    feature = features[label]
    if isinstance(feature, ClassLabel):
        return Columns(image, label, "class", tuple(feature.names))
    if not _is_plain_label(feature):
        found = _kind(feature)
        raise ColumnError(f"column {label!r} holds {found}, not one label an image; give --label-column "
                          f"(of {_all(features)})")  # fmt: skip
    return Columns(image, label, "text" if feature.dtype in _TEXTS else "integer")


class LabelReader:
    """Turns a label column's stored values into dataset label indices; UNLABELLED (-1) where there is none.

    Attributes:
        names: the dataset's class names in index order, or None when its labels are plain integers.
    """

    def __init__(self, columns: Columns, seen: Collection[str] = ()) -> None:
        """`seen` are all values of a text column; those of whole numbers count as plain integers."""
        self.names: tuple[str, ...] | None = columns.names
        if columns.kind == "text":
            texts = sorted(set(seen))
            self.names = None if texts and all(text.isdecimal() for text in texts) else tuple(texts)
        self._codes = {name: i for i, name in enumerate(self.names or ())}

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return int64 indices (N,) of stored values (integers, text, None)."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "iub":
            return np.maximum(values.astype(np.int64), UNLABELLED)
        return np.array([self._index(value) for value in values], dtype=np.int64)

    def _index(self, value: Any) -> int:
        if value is None or value == "":
            return UNLABELLED
        if isinstance(value, str):
            if value in self._codes:
                return self._codes[value]
            if not value.isdecimal():
                raise ColumnError(f"label {value[:40]!r} is not among the dataset's class names; its metadata is wrong")
        return max(int(value), UNLABELLED)


def _one(what: str, named: str | None, features: Mapping[str, Any], candidates: list[list[str]]) -> str:
    if named is not None:
        if named not in features:
            raise ColumnError(f"the dataset has no column {named!r} for --{what}-column; it has {_all(features)}")
        return named
    for found in candidates:
        if len(found) > 1:
            raise ColumnError(f"several columns may hold the {what}: {', '.join(found)}; choose with --{what}-column")
        if found:
            return found[0]
    raise ColumnError(
        f"the dataset has no {what} column that can be told from its features; its columns are {_all(features)}; "
        f"name one with --{what}-column, or choose another dataset")  # fmt: skip


def _is_stored_image(feature: Any) -> bool:
    """Return whether a column without the Image type may hold encoded images: bytes, or the struct they are kept in."""
    if isinstance(feature, dict):
        return isinstance(feature.get("bytes"), Value) and feature["bytes"].dtype in ("binary", "large_binary")
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _is_plain_label(feature: Any) -> bool:
    if not isinstance(feature, Value):
        return False
    return feature.dtype in (*_TEXTS, "bool") or feature.dtype.lstrip("u").startswith("int")


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _all(features: Mapping[str, Any]) -> str:
    names = [f"{name[:40]} ({_kind(feature)})" for name, feature in features.items()]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
