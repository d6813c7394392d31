"""What `timm.py` and `transformers.py` hand to `classifier.py`: a built model with everything that belongs to it."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hfdetox.errors import UsageError
from hfdetox.files import is_inside
from hfdetox.models.preprocessing import Preprocessing

Library = Literal["timm", "transformers", "torch"]

# Files that travel with a model unchanged. The card is not among them: hfdetox writes its own and keeps the text.
_COMPANIONS = ("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")


# what is read of a model's folder, by hfdetox or by the model's library
_READ = ("*.json", "*.safetensors", "*.py", "README.md", "LICENSE*", "NOTICE*")


class NotAClassifierError(UsageError):
    """The model does not give one logit per label, one label per image."""


@dataclass
class Loaded:
    """A built model; `processor` is an image processor that is not among the source's files and is saved too."""

    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    labels_are_names: bool
    library: Library
    architecture: str
    processor: Any = None


def numbered_labels(count: int) -> tuple[str, ...]:
    """Return "0", "1", … for a model whose labels have no names."""
    return tuple(str(index) for index in range(count))


def check_num_labels(count: int, name: str) -> None:
    """Raise NotAClassifierError for fewer than two outputs."""
    if count < 2:
        found = "a single output" if count else "no classification head"
        raise NotAClassifierError(f"{name} has {found}; hfdetox handles classifiers of two or more labels")


def copy_companions(source: Path | None, folder: Path, extra: Sequence[str] = ()) -> None:
    """Copy preprocessing configs, licence files and the `extra` patterns, byte for byte, none from outside it."""
    if source is None:
        return
    for file in (file for pattern in (*_COMPANIONS, *extra) for file in sorted(source.glob(pattern))):
        if file.is_file() and is_inside(file, source):
            shutil.copyfile(file, folder / file.name)


def check_links(folder: Path) -> None:
    """Raise UsageError when a file that would be read of a model's folder is a link that leads out of it.

    Who sends a folder could else have any file of this machine published with the cleaned model.
    """
    for file in sorted(folder.iterdir()):
        read = file.is_symlink() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _READ)
        if read and not is_inside(file, folder):
            raise UsageError(f"{file} is a link to something outside the model's folder, which is not read; if it is "
                             "yours, put the file itself there")  # fmt: skip
