"""Image folders: of which split and class each image is, told from where it lies.

`datasets` takes every folder and file with a split's word in its name for that split, a class called "train" too.
"""

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from hfdetox.data.labels import count_matches

_SPLITS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_Folders = tuple[str, ...]


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder by where they lie.

    Attributes:
        classes: the names of the classes, sorted.
        splits: of each split its images, sorted: the path, and the index of its class or -1.
        left_out: images that lie beside the folders of classes.
        together: folders that have the same classes in them and are no splits by their names.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[tuple[str, int]]]
    left_out: list[str]
    together: Sequence[str] = ()


def arrange(paths: Iterable[str], labels: Sequence[str], assigned: Mapping[str, str] | None = None) -> ImageFolder:
    """Arrange the images of a folder by split and class.

    The outermost folders are splits where all are called so, or where one is and others have the same folders in them
    or the model's labels are in it, else the innermost where all are called so; otherwise all images are of the split
    `train`. What the model's labels name is no split. Of the folders inside, the classes are those that they name, else
    the innermost where all images lie equally deep, else the outermost.

    Args:
        paths: the images, relative to the folder, with slashes.
        labels: the model's labels, or none where they are not known.
        assigned: the split of each image, where the dataset's card says it.
    """
    parents = {path: path.rpartition("/")[0] for path in sorted(paths)}
    parts_of = {parent: tuple(filter(None, unicodedata.normalize("NFC", parent).split("/")))
                for parent in set(parents.values())}  # fmt: skip
    folders = _without_common({path: parts_of[parent] for path, parent in parents.items()})
    if assigned is not None:
        splits = {path: assigned[path] for path in folders}
    elif _are_splits(folders.values(), labels):
        splits = {path: _WORDS.get(parts[0].casefold(), parts[0]) for path, parts in folders.items() if parts}
        folders = _without_common({path: parts[1:] for path, parts in folders.items()})
    elif _end_in_splits(folders.values(), labels):
        splits = {path: _WORDS[parts[-1].casefold()] for path, parts in folders.items()}
        folders = _without_common({path: parts[:-1] for path, parts in folders.items()})
    else:
        splits = dict.fromkeys(folders, "train")
    level = _level([parts for parts in folders.values() if parts], labels)
    inside = _inside(set(folders.values()))
    pairs = combinations(inside, 2) if level else ()
    together = sorted({one for pair in pairs if len(inside[pair[0]] & inside[pair[1]]) > 1 for one in pair})
    names = {path: parts[level] for path, parts in folders.items() if parts and path in splits}
    order = sorted(set(splits.values()), key=lambda split: (split != "train", split))
    found = {split: {name for path, name in names.items() if splits[path] == split} for split in order}
    # one folder alone, that no other split has, is no class: tiny-imagenet's val/images
    lone = {split for split, own in found.items() if len(own) == 1 and len(found) > 1
            and not own & set().union(*(others for other, others in found.items() if other != split))}  # fmt: skip
    classes = sorted({name for split, own in found.items() if split not in lone for name in own})
    codes = {name: index for index, name in enumerate(classes)}
    # without classes there is nothing that an image could lie beside
    taken = {path: split for path, split in splits.items() if path in names or not found[split]}
    images: dict[str, list[tuple[str, int]]] = {split: [] for split in order}
    for path, split in taken.items():
        images[split].append((path, -1 if split in lone or path not in names else codes[names[path]]))
    return ImageFolder(tuple(classes), images, [path for path in folders if path not in taken], together)


def _without_common(folders: Mapping[str, _Folders]) -> dict[str, _Folders]:
    """Leave out the outer folders that all images lie in, unless they are called as a split or are the innermost."""
    found = dict(folders)
    while found and all(len(parts) > 1 for parts in found.values()):
        first = {parts[0] for parts in found.values()}
        if len(first) > 1 or first.pop().casefold() in _WORDS:
            break
        found = {path: parts[1:] for path, parts in found.items()}
    return found


def _inside(folders: Collection[_Folders]) -> dict[str, set[str]]:
    """Return the folders in each of the outermost ones."""
    inside: dict[str, set[str]] = {parts[0]: set() for parts in folders if parts}
    for parts in folders:
        if len(parts) > 1:
            inside[parts[0]].add(parts[1])
    return inside


def _are_splits(folders: Collection[_Folders], labels: Sequence[str]) -> bool:
    inside = _inside(set(folders))
    words = [top for top in inside if top.casefold() in _WORDS]
    within = count_matches(sorted(set().union(*(inside[word] for word in words))), labels)
    if words and within != (without := count_matches(sorted(inside), labels)):
        return within > without
    shared = (inside[word] & inside[other] for word in words for other in inside if other != word)
    return bool(words) and (len(words) == len(inside) or any(len(both) > 1 for both in shared))


def _end_in_splits(folders: Collection[_Folders], labels: Sequence[str]) -> bool:
    """Tell whether the folders of classes hold those of splits: cat/train, cat/test, dog/train, dog/test."""
    inner = {parts[-1] for parts in folders if len(parts) > 1}
    outer = {parts[-2] for parts in folders if len(parts) > 1}
    found = {_WORDS.get(name.casefold()) for name in inner}
    return (all(len(parts) > 1 for parts in folders) and len(outer) > 1 and len(found) > 1 and None not in found
            and count_matches(sorted(inner), labels) <= count_matches(sorted(outer), labels))  # fmt: skip


def _level(folders: Collection[_Folders], labels: Sequence[str]) -> int:
    outer, inner = {parts[0] for parts in folders}, {parts[-1] for parts in folders}
    by_labels = count_matches(sorted(inner), labels) - count_matches(sorted(outer), labels)
    level = len({len(parts) for parts in folders}) == 1 and len(inner) > 1
    return -1 if by_labels > 0 or (by_labels == 0 and level) else 0
