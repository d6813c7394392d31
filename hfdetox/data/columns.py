"""Columns: which of a dataset's columns holds the images and which the labels, and what the labels' values mean."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Array2D, Array3D, ClassLabel, Features, Image, LargeList, List, Value

from hfdetox.data.labels import UNLABELLED, count_matches, list_names
from hfdetox.errors import UsageError

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "category", "fine_label", "coarse_label", "y")
IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes")
_NUMBER = re.compile(r"(-1|\d+)(\.0+)?")
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


def find_columns(
    features: Features, *, image_column: str | None = None, label_column: str | None = None,
    labels: Sequence[str] = (), values: Callable[[str], Collection[str]] = lambda _: (),
) -> Columns:  # fmt: skip
    """Find the image and the label column from the features, or take the named ones.

    The label column is the one that is called so or whose values are the model's labels, best both; then the one of
    type ClassLabel.

    Args:
        labels: the model's labels, or none where they are not known.
        values: gives some of the values of a column of text.

    Raises ColumnError when there is none, more than one, or when a named one does not exist or holds something else.
    """
    images = [name for name, feature in features.items() if _is_image(feature)]
    typed = [name for name in images if isinstance(features[name], Image)]
    # beside masks and depth maps the name tells
    named = [name for name in typed or images if name.lower() in IMAGE_NAMES]
    image = _one("image", "not images", image_column, features, images, named or typed)
    fitting = [name for name, feature in features.items() if _is_label(feature)]
    label = _one("label", "not one label an image", label_column, features, fitting,
                 _label_candidates(features, fitting, labels, values) if label_column is None else [])  # fmt: skip
    feature = features[label]
    if isinstance(feature, ClassLabel):
        return Columns(image, label, "class", tuple(feature.names))
    return Columns(image, label, "text" if feature.dtype in _TEXTS else "integer")


def _label_candidates(
    features: Features, fitting: Sequence[str], labels: Sequence[str], values: Callable[[str], Collection[str]]
) -> list[str]:
    """Return the columns that may well hold the labels; more than one where nobody can tell."""
    named = [name for name in fitting if name.lower() in LABEL_NAMES]
    typed = [name for name in fitting if isinstance(features[name], ClassLabel)]

    def told(name: str) -> bool:
        text = name not in typed and features[name].dtype in _TEXTS
        found = features[name].names if name in typed else sorted(set(values(name))) if text else []
        return bool(found) and count_matches(found, labels) > len(found) / 2

    sure = [name for name in named if name in typed]
    if not labels or (len(sure) == 1 and told(sure[0])):
        return sure if len(sure) == 1 else named or typed
    by_values = [name for name in fitting if told(name)]
    both = [name for name in by_values if name in named]
    if by_values:
        return both if len(both) == 1 else [*by_values, *(name for name in named if name not in by_values)]
    return sure if len(sure) == 1 else named or typed


class LabelReader:
    """Turns a label column's stored values into dataset label indices; UNLABELLED (-1) where there is none.

    Attributes:
        names: the dataset's class names in index order, or None when its labels are plain integers.
        merged: spellings of a text column that were taken for another one, by theirs.
        first: the number of the first class, where labels are plain integers.
    """

    def __init__(
        self, columns: Columns, seen: Collection[str] = (), labels: Sequence[str] = (), first: int = 0
    ) -> None:
        """`seen` are all values of a text column; "3.0" among numbers is the name "3", and "-1" none.

        Values that differ in case alone are one class where the model's `labels` have one such.
        """
        self.first = first
        self._numbers = columns.kind == "text" and all(
            _NUMBER.fullmatch(text.strip()) for text in seen if text.strip())  # fmt: skip
        names = {self._name(text) for text in seen} - {"", str(UNLABELLED) if self._numbers else ""}
        self.merged = _spelt_alike(names, labels)
        self.names = columns.names if columns.kind != "text" else tuple(sorted(names - self.merged.keys()))
        self._codes = {unicodedata.normalize("NFC", name): i for i, name in enumerate(self.names or ())}
        self._codes |= {name: self._codes[kept] for name, kept in self.merged.items()}

    def read(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return int64 indices (N,) of stored values (integers, floats that are whole, text, None)."""
        if isinstance(values, np.ndarray) and values.dtype.kind in "iub":
            return np.maximum(values.astype(np.int64) - self.first, UNLABELLED)
        return np.array([self._index(value) for value in values], dtype=np.int64)

    def _index(self, value: Any) -> int:
        if value is None or value != value:  # NaN is not itself
            return UNLABELLED
        if isinstance(value, str):
            name = self._name(value)
            if name == "" or (self._numbers and name == str(UNLABELLED)):
                return UNLABELLED
            if name not in self._codes and not name.isdecimal():
                raise ColumnError(f"label {value[:40]!r} is not among the dataset's class names; its metadata is wrong")
            return self._codes[name] if name in self._codes else int(name)
        if not isinstance(value, (int, float)) or value != int(value):
            raise ColumnError(f"the label {str(value)[:40]!r} is no whole number; name another --label-column")
        return max(int(value) - self.first, UNLABELLED)

    def _name(self, text: str) -> str:
        return str(int(float(text))) if self._numbers and text.strip() else unicodedata.normalize("NFC", text.strip())


def _spelt_alike(names: Collection[str], labels: Sequence[str]) -> dict[str, str]:
    """Return which names differ in case alone from another one that is among the model's labels, by that one."""
    merged = dict[str, str]()
    for folded, count in Counter(label.strip().casefold() for label in labels).items():
        same = sorted(name for name in names if name.casefold() == folded)
        kept = next((name for name in same if name in labels), same[0] if same else "")
        if count == 1:
            merged |= {name: kept for name in same if name != kept}
    return merged


def _one(
    what: str, not_it: str, named: str | None, features: Mapping[str, Any], fitting: Sequence[str],
    candidates: Sequence[str],
) -> str:  # fmt: skip
    """Return the named column if it fits, or the one candidate."""
    if named is not None:
        if named not in features:
            raise ColumnError(f"the dataset has no column {named!r} for --{what}-column; it has {_all(features)}")
        if named not in fitting:
            found = _kind(features[named])
            raise ColumnError(f"column {named!r} holds {found}, {not_it}; give --{what}-column (of {_all(features)})")
        return named
    if not candidates:
        wrong = [
            f"column {name[:24]!r} holds {_kind(feature)}, {not_it}"
            for name, feature in features.items()
            if name not in fitting and name.lower() in (IMAGE_NAMES if what == "image" else LABEL_NAMES)
        ]
        raise ColumnError(
            f"the dataset has no {what} column that can be told from its features; its columns are {_all(features)}; "
            f"{wrong[0] + ': mend it,' if wrong else f'name one with --{what}-column,'} or choose another dataset"
        )  # fmt: skip
    if len(candidates) > 1:
        names = list_names(candidates, 12)
        raise ColumnError(f"several columns may hold the {what}: {names}; choose with --{what}-column")
    return candidates[0]


def _is_image(feature: Any) -> bool:
    """Return whether a column may hold images: the Image type, bytes, the struct these are kept in, or arrays."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    if isinstance(feature, Array2D | Array3D):
        return True
    inner = getattr(feature, "feature", None)  # of lists of lists of numbers
    if isinstance(inner, List | LargeList):
        return isinstance(getattr(inner, "feature", None), Value | List | LargeList)
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in _BYTES)


def _is_label(feature: Any) -> bool:
    if not isinstance(feature, Value):
        return isinstance(feature, ClassLabel)
    # whole numbers are often stored as floats
    return feature.dtype in (*_TEXTS, "bool") or feature.dtype.lstrip("u").startswith(("int", "float"))


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _all(features: Mapping[str, Any]) -> str:
    return list_names([f"{name[:24]} ({_kind(feature)})" for name, feature in features.items()], 12)
