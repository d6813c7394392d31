"""What the library modules hand to `models.py`: a built model with everything that belongs to it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hfdetox.errors import UsageError
from hfdetox.models.preprocessing import Preprocessing

Library = Literal["timm", "transformers", "torch"]

# Files that travel with a model unchanged. The card is not among them: hfdetox writes its own and keeps the text.
_COMPANIONS = ("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")


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
    """Copy preprocessing configs, licence files and the `extra` patterns, byte for byte."""
    for pattern in (*_COMPANIONS, *extra) if source else ():
        for file in sorted(source.glob(pattern)) if source else ():
            shutil.copyfile(file, folder / file.name)
