"""Labels: which of the model's classes each of the dataset's classes is, by name, by a map file, or by order."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hfdetox.errors import UsageError, located
from hfdetox.values import read_json, read_yaml

DROPPED = -1
_SHOWN = 8
_GENERIC = re.compile(r"(label|class)[\s_-]*\d+", re.IGNORECASE)


class LabelMismatchError(UsageError):
    """The dataset's classes are not the model's, as far as their names tell."""


class LabelMapError(UsageError):
    """The label map cannot be read, or names classes that the dataset or the model does not have."""


@dataclass(frozen=True)
class Alignment:
    """Where the dataset's classes are among the model's.

    Attributes:
        mapping: for each dataset label (its index) the model's label index, or `DROPPED` (-1) for a class left out.
        note: what a person must know about how they were aligned (the order was used), or None.
        label_map: dataset name to model name where the two are not spelt the same; "" for a class left out.
    """

    mapping: list[int]
    note: str | None = None
    label_map: dict[str, str] = field(default_factory=dict)


def align_labels(
    dataset_names: Sequence[str] | None, model_labels: Sequence[str],
    label_map: Path | str | Mapping[str, Any] | None = None,
) -> Alignment:  # fmt: skip
    """Align the dataset's classes (`dataset_names`, or None when its labels are plain integers) with the model's.

    Names are compared without case, spaces, underscores and hyphens, then by the synonyms of comma-separated lists
    ("tench, Tinca tinca"). `label_map` (a JSON or YAML file, or a dict) says for dataset names which model name or
    index they are, null to leave a class out; it wins over names, and only it may merge several classes into one.
    The dataset may have fewer classes than the model. If no name matches but the counts agree, the order is used
    and the note says so.

    Raises LabelMismatchError with the names unmatched on both sides, LabelMapError for a map that does not fit.
    """
    chosen, plain = _read_map(label_map), dataset_names is None
    names = list(dataset_names) if dataset_names is not None else _numbers(chosen, len(model_labels))
    fixed = _apply_map(chosen, names, model_labels)
    note, rest = None, {i: name for i, name in enumerate(names) if i not in fixed}
    if plain:
        # integers are the model's names where those are all integers; beyond its labels only the map can name them
        rest = {i: name for i, name in rest.items() if i < len(model_labels)}
        if set(model_labels) == set(names[: len(model_labels)]):
            found = {i: model_labels.index(name) for i, name in rest.items()}
        else:
            found = {i: i for i in rest}
            if len(fixed) < len(model_labels):
                note = "the dataset's labels are plain integers; they were taken as the model's label order"
    else:
        found = _match(rest, {m: label for m, label in enumerate(model_labels) if m not in fixed.values()})
        if rest and not found and not fixed and len(names) == len(model_labels):
            found = {i: i for i in rest}
            note = (f"none of the dataset's class names ({list_names(names, 3)}) is among the model's labels "
                    f"({list_names(model_labels, 3)}); both have {len(names)}, so their order was used")  # fmt: skip
        elif len(found) < len(rest):
            used = {*found.values(), *fixed.values()}
            raise _mismatch([name for i, name in rest.items() if i not in found],
                            [label for m, label in enumerate(model_labels) if m not in used], model_labels)  # fmt: skip
    mapping = [{**found, **fixed}.get(i, DROPPED) for i in range(len(names))]
    pairs = {names[i]: "" if mapping[i] == DROPPED else model_labels[mapping[i]]
             for i in (sorted(fixed) if plain else range(len(names)))}  # fmt: skip
    return Alignment(mapping, note, {name: label for name, label in pairs.items() if name != label})


def accuracy_hint(confusion: np.ndarray) -> float:
    """Return the best accuracy, in [0, 1], that any one-to-one renaming of the predicted labels would give.

    `confusion` is K×K counts, true label by predicted label. A value far above the accuracy itself says that the
    labels are permuted. An empty confusion matrix gives 0.
    """
    from scipy.optimize import linear_sum_assignment

    total = float(confusion.sum())
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    return float(confusion[rows, columns].sum()) / total if total else 0.0


def _numbers(chosen: Mapping[str, Any], count: int) -> list[str]:
    """Return the names of integer labels: the model's `count`, and further ones that the map names."""
    highest = max([count - 1, *(int(key) for key in chosen if key.isdecimal())])
    if highest > max(count, 1_000_000):
        raise LabelMapError(f"label map: {highest} is not a class index; the model has {count} labels")
    return list(map(str, range(highest + 1)))


def _match(dataset: Mapping[int, str], model: Mapping[int, str]) -> dict[int, int]:
    """Return dataset index to model index for every name that has one clear partner, whole names first."""
    found: dict[int, int] = {}
    for pair in (partial(_in_order, key=str), partial(_in_order, key=_plain), _by_synonyms):
        rest_d = {i: name for i, name in dataset.items() if i not in found}
        rest_m = {m: name for m, name in model.items() if m not in found.values()}
        found |= pair(rest_d, rest_m)
    return found


def _in_order(dataset: Mapping[int, str], model: Mapping[int, str], key: Callable[[str], str]) -> dict[int, int]:
    """Pair indices whose names have one key, in order, where it occurs equally often on both sides."""
    # ImageNet has two cranes and two maillots; the k-th of one list is the k-th of the other
    ours, theirs = (_places(names, lambda name: {key(name)}) for names in (dataset, model))
    groups = [(places, theirs[name]) for name, places in ours.items() if len(theirs[name]) == len(places)]
    return {i: m for places, partners in groups for i, m in zip(places, partners, strict=True)}


def _by_synonyms(dataset: Mapping[int, str], model: Mapping[int, str]) -> dict[int, int]:
    """Pair indices that share more synonyms with each other than with any other."""
    index = _places(model, _synonyms)
    partners: dict[int, int] = {}
    for i, name in dataset.items():
        shared = Counter(m for key in _synonyms(name) for m in index[key])
        best = [m for m, n in shared.items() if n == max(shared.values())]
        if len(best) == 1:
            partners[i] = best[0]
    claims = Counter(partners.values())
    return {i: m for i, m in partners.items() if claims[m] == 1}


def _places(names: Mapping[int, str], keys: Callable[[str], set[str]]) -> defaultdict[str, list[int]]:
    """Return the indices of the names that have a key, ascending, by the key."""
    found = defaultdict[str, list[int]](list)
    for index, name in names.items():
        for key in keys(name):
            found[key].append(index)
    return found


def _plain(name: str) -> str:
    """Return `name` without case, and with runs of spaces, underscores and hyphens as nothing."""
    return re.sub(r"[\s_\-]+", "", name.casefold())


def _synonyms(name: str) -> set[str]:
    return {_plain(part) for part in name.split(",")} - {""}


def _read_map(label_map: Path | str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the label map as a dict of dataset name to model name, index or None."""
    if label_map is None:
        return {}
    where = "label map"
    if isinstance(label_map, (str, Path)):
        path, where = Path(label_map), f"label map {label_map}"
        with located("the label map", LabelMapError):
            content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    else:
        content = dict(label_map)
    if not isinstance(content, dict) or not content:
        raise LabelMapError(f"{where} must be a mapping of dataset class names to the model's names or indices")
    for key, value in content.items():
        plain = isinstance(key, (str, int)) and not isinstance(key, bool)
        if not plain or isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise LabelMapError(f"{where}: {key!r}: {value!r} is not NAME: NAME, INDEX or null; put names in quotes")
    return {str(key): value for key, value in content.items()}


def _apply_map(chosen: Mapping[str, Any], dataset_names: list[str], model_labels: Sequence[str]) -> dict[int, int]:
    """Return dataset index to model index (or DROPPED) for every entry of the map."""
    fixed: dict[int, int] = {}
    for key, value in chosen.items():
        places = _spelt(key, dataset_names)
        if not places:
            raise LabelMapError(f"label map: the dataset has no class {key!r}; it has {list_names(dataset_names)}")
        fixed.update(dict.fromkeys(places, _model_index(key, value, model_labels)))
    return fixed


def _spelt(wanted: str, names: Sequence[str]) -> list[int]:
    """Return the indices of the names that are `wanted`, else of those that are spelt like it."""
    exact = [i for i, name in enumerate(names) if name == wanted]
    return exact or [i for i, name in enumerate(names) if _plain(name) == _plain(wanted)]


def _model_index(key: str, value: str | int | None, model_labels: Sequence[str]) -> int:
    if value is None:
        return DROPPED
    if isinstance(value, str):
        found = _spelt(value, model_labels)
        found = found or [m for m, label in enumerate(model_labels) if _plain(value) in _synonyms(label)]
        if len(found) == 1:
            return found[0]
        if found:
            raise LabelMapError(f"label map: {key!r}: {value!r} fits {len(found)} model labels; give the index")
        if not value.isdecimal():
            raise LabelMapError(f"label map: {key!r}: the model has no label {value!r}: {list_names(model_labels)}")
    index = int(value)
    if not 0 <= index < len(model_labels):
        raise LabelMapError(f"label map: {key!r}: index {index} is outside 0 to {len(model_labels) - 1}")
    return index


def _mismatch(dataset: Sequence[str], model: Sequence[str], labels: Sequence[str]) -> LabelMismatchError:
    if all(_GENERIC.fullmatch(label) for label in labels):
        why = f"the model's {len(labels)} labels have no names ({list_names(labels, 2)}), the dataset has other classes"
    else:
        why = "the dataset's classes are not the model's"
    return LabelMismatchError(
        f"{why}; unmatched in the dataset ({len(dataset)}): {list_names(dataset)}; unmatched in the model "
        f"({len(model)}): {list_names(model) or 'none'}; give --label-map FILE (dataset name: model name, index, or "
        "null to leave it out)")  # fmt: skip


def list_names(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first `shown` names, each cut at 40 characters, in one line of bounded length."""
    # names are written by strangers: nothing in them may steer a terminal
    parts = ["".join(c for c in " ".join(name.split()) if c.isprintable())[:40] for name in names[:shown]]
    more = len(names) - shown
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
