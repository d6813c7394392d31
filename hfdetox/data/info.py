"""Which images a run used, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """Which images were used; the index hashes are SHA-256 over the chosen row numbers of the source splits."""

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
