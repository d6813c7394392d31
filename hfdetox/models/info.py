"""What a model is and where it came from, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """Where the model came from and what it is; `revision` is a commit id, or None for a folder or an object."""

    id: str
    revision: str | None
    library: str
    architecture: str
    num_labels: int
    parameters: int
    dtype: str
    weights_sha256: str | None
