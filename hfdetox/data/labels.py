"""Labels: which of the model's classes each of the dataset's classes is, by name, by a map file, or by order."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm

from hfdetox.documents import read_json, read_yaml
from hfdetox.errors import UsageError, located, one_line
from hfdetox.values import shown

DROPPED = -1
# what datasets have for an image without a label
UNLABELLED = -1
_NEGATIVE = re.compile(r"-\d+")
_SHOWN = 8
_WORDNET_ID = re.compile(r"n\d{8}")
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
        other: the classes in the order of their names, where only an order says which is which and that is another one.
    """

    mapping: list[int]
    note: str | None = None
    label_map: dict[str, str] = field(default_factory=dict)
    other: Alignment | None = None


def align_labels(
    dataset_names: Sequence[str] | None, model_labels: Sequence[str],
    label_map: Path | str | Mapping[str, Any] | None = None, aliases: Sequence[Sequence[str]] = (),
) -> Alignment:  # fmt: skip
    """Align the dataset's classes (`dataset_names`, or None when its labels are plain integers) with the model's.

    Names are compared in one Unicode form without case, spaces, underscores and hyphens, then by the synonyms of
    comma-separated lists ("tench, Tinca tinca"), of `aliases` (other names of each of the model's labels) and of
    ImageNet's WordNet ids. `label_map` (a JSON or YAML file, or a dict) says for dataset names which model name or
    index they are, null to leave a class out; it wins over names, and only it may merge several classes into one.
    The dataset may have fewer classes than the model. Numbers that are no names are indices, or begin at 1 and end at
    the number of labels. If no name matches but the counts agree, the order is used; the note says both.

    Raises LabelMismatchError with the names unmatched on both sides, LabelMapError for a map that does not fit.
    """
    chosen, count = _read_map(label_map), len(model_labels)
    names = list(dataset_names) if dataset_names is not None else _numbers(chosen, count)
    fixed = _apply_map(chosen, names, model_labels)
    note, rest = None, {i: name for i, name in enumerate(names) if i not in fixed}
    if dataset_names is None:
        # beyond the model's labels only the map can name integers
        rest = {i: name for i, name in rest.items() if i < count}
    labels = {m: label for m, label in enumerate(model_labels) if dataset_names is None or m not in fixed.values()}
    found = _match(rest, labels, aliases)
    numbers = {i: int(name) for i, name in rest.items() if name.isdecimal()}
    ordered = len(found) < len(rest) and len(numbers) == len(rest)
    if ordered:
        first = int(dataset_names is not None and min(numbers.values()) == 1 and max(numbers.values()) == count)
        found = {i: number - first for i, number in numbers.items() if number - first < count}
        note = "the dataset's labels are plain integers; they were taken as the model's label order"
    elif rest and not found and not fixed and len(names) == count:
        ordered, found = True, {i: i for i in rest}
        note = (f"none of the dataset's class names ({list_names(names, 3)}) is among the model's labels "
                f"({list_names(model_labels, 3)}); both have {count}, so their order was used")  # fmt: skip
    if len(found) < len(rest):
        used = {*found.values(), *fixed.values()}
        raise _mismatch([name for i, name in rest.items() if i not in found],
                        [label for m, label in labels.items() if m not in used], model_labels)  # fmt: skip
    mapping = [{**found, **fixed}.get(i, DROPPED) for i in range(len(names))]
    other, by_name = None, sorted(range(len(names)), key=names.__getitem__)
    if by_name == mapping:  # as folders are listed: class_10 before class_2
        by_name.sort(key=lambda i: _natural(names[i]))
    if dataset_names is not None and not fixed and len(names) == count and (ordered or len(numbers) == count):
        ranks = np.argsort(by_name).tolist()
        other = Alignment(ranks, note, _renamed(names, ranks, model_labels)) if ranks != mapping else None
    recorded = mapping if dataset_names is not None else {i: mapping[i] for i in sorted(fixed)}
    return Alignment(mapping, note, _renamed(names, recorded, model_labels), other)


def _renamed(names: Sequence[str], mapping: Sequence[int] | Mapping[int, int], labels: Sequence[str]) -> dict[str, str]:
    """Return the dataset's names of which the model's is another."""
    pairs = mapping.items() if isinstance(mapping, Mapping) else enumerate(mapping)
    found = {names[i]: "" if m == DROPPED else labels[m] for i, m in pairs}
    return {name: label for name, label in found.items() if name != label}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names with the numbers in them by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name) if part]


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


def _match(
    dataset: Mapping[int, str], model: Mapping[int, str], aliases: Sequence[Sequence[str]] = ()
) -> dict[int, int]:
    """Return dataset index to model index for every name that has one clear partner, whole names first."""
    found: dict[int, int] = {}
    every = {m: ",".join([name, *aliases[m]]) if aliases else name for m, name in model.items()}
    for pair in (partial(_in_order, key=str), partial(_in_order, key=_plain), partial(_in_order, key=_described),
                 _by_synonyms, _by_beginning):  # fmt: skip
        rest_d = {i: name for i, name in dataset.items() if i not in found}
        used, names = set(found.values()), every if pair is _by_synonyms else model
        rest_m = {m: name for m, name in names.items() if m not in used}
        found |= pair(rest_d, rest_m)
    return found


def count_matches(names: Sequence[str], labels: Sequence[str]) -> int:
    """Return how many of the names are among the model's labels."""
    return len(_match(dict(enumerate(names)), dict(enumerate(labels))))


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


def _by_beginning(dataset: Mapping[int, str], model: Mapping[int, str]) -> dict[int, int]:
    """Pair, in order, a name that one side has several times with those that begin so on the other: crane, crane2."""
    found: dict[int, int] = {}
    for many, few in ((model, dataset), (dataset, model)):
        plain = {i: _described(other) for i, other in few.items()}
        for name, same in _places(many, lambda name: {_described(name)}).items():
            begun = [i for i, other in plain.items() if other.startswith(name)] if len(same) > 1 else []
            if len(same) == len(begun) > 1:
                found |= dict(zip(begun, same, strict=True) if many is model else zip(same, begun, strict=True))
    return found


def _places(names: Mapping[int, str], keys: Callable[[str], set[str]]) -> defaultdict[str, list[int]]:
    """Return the indices of the names that have a key, ascending, by the key."""
    found = defaultdict[str, list[int]](list)
    for index, name in names.items():
        for key in keys(name):
            found[key].append(index)
    return found


def _plain(name: str) -> str:
    """Return `name` in one Unicode form without case, and with runs of spaces, underscores and hyphens as nothing."""
    return re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _described(name: str) -> str:
    """Return the plain form of a name, of a WordNet id that of what ImageNet calls it."""
    match = _WORDNET_ID.match(name)
    return _plain(_wordnet().get(match.group(), name) if match else name)


def _synonyms(name: str) -> set[str]:
    ids = [match.group() for part in name.split(",") if (match := _WORDNET_ID.match(part.strip()))]
    parts = [name, *(_wordnet().get(one, "") for one in ids), *ids]
    # of n02085620-Chihuahua the name too
    return {_plain(_WORDNET_ID.sub("", part) or part) for part in ",".join(parts).split(",")} - {""} | set(ids)


@functools.cache
def _wordnet() -> dict[str, str]:
    """Return ImageNet's names of each WordNet id, a list with commas; timm brings them."""
    known: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        known |= timm.data.ImageNetInfo(subset).label_descriptions(as_dict=True)
    return known


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
            raise LabelMapError(f"{where}: {shown(key)}: {shown(value)} is not NAME: NAME, INDEX or null; put "
                                "names in quotes")  # fmt: skip
    return {str(key): value for key, value in content.items()}


def _quoted(given: object) -> str:
    """Return a key or value of a map as a message shows it."""
    return one_line(repr(given), 100)


def _apply_map(chosen: Mapping[str, Any], dataset_names: list[str], model_labels: Sequence[str]) -> dict[int, int]:
    """Return dataset index to model index (or DROPPED) for every entry of the map."""
    fixed: dict[int, int] = {}
    for key, value in chosen.items():
        if key == str(UNLABELLED) and value is None and key not in dataset_names:
            continue  # such images are left out anyway
        places = _spelt(key, dataset_names)
        if not places:
            raise LabelMapError(
                f"label map: the dataset has no class {_quoted(key)}; it has {list_names(dataset_names)}"
            )
        fixed.update(dict.fromkeys(places, _model_index(key, value, model_labels)))
    return fixed


def _spelt(wanted: str, names: Sequence[str]) -> list[int]:
    """Return the indices of the names that are `wanted`, else of those spelt like it; -1 is not spelt like 1."""
    exact = [i for i, name in enumerate(names) if name == wanted]
    if _NEGATIVE.fullmatch(wanted):
        return exact
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
            raise LabelMapError(
                f"label map: {_quoted(key)}: {_quoted(value)} fits {len(found)} model labels; give the index"
            )
        if not value.isdecimal():
            raise LabelMapError(
                f"label map: {_quoted(key)}: the model has no label {_quoted(value)}: {list_names(model_labels)}"
            )
    index = int(value)
    if not 0 <= index < len(model_labels):
        raise LabelMapError(f"label map: {_quoted(key)}: index {index} is outside 0 to {len(model_labels) - 1}")
    return index


def _mismatch(dataset: Sequence[str], model: Sequence[str], labels: Sequence[str]) -> LabelMismatchError:
    if all(_GENERIC.fullmatch(label) for label in labels):
        why = f"the model's {len(labels)} labels have no names ({list_names(labels, 2)}), the dataset has other classes"
    else:
        why = "the dataset's classes are not the model's"
    return LabelMismatchError(
        f"{why}; unmatched in the dataset ({len(dataset)}): {_spellings(dataset)}; unmatched in the model "
        f"({len(model)}): {_spellings(model) or 'none'}; give --label-map FILE (dataset name: model name, index, or "
        "null to leave it out)")  # fmt: skip


def _spellings(names: Sequence[str]) -> str:
    """List names, those with odd spaces in quotes: shown without, both sides would look the same."""
    return list_names([name if name == " ".join(name.split()) and name.isprintable() else repr(name) for name in names])


def list_names(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Return the first `shown` names, each cut at 40 characters, in one line of bounded length."""
    # names are written by strangers: nothing in them may steer a terminal
    parts = ["".join(c for c in " ".join(name.split()) if c.isprintable())[:40] for name in names[:shown]]
    more = len(names) - shown
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
