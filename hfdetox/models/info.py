"""What a model is and where it came from, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """Where the model came from and what it is.

    Attributes:
        id: as it was named: a Hub id, or the last part of a folder's path.
        revision: the commit on the Hub; None for a folder or an object.
        library: `timm`, `transformers` or `torch`.
        parameters: how many numbers the model has.
        dtype: of the weights as they are saved.
        weights_sha256: of the weight file; of several files that of their sorted names and hashes. None for an object.
    """

    id: str
    revision: str | None
    library: str
    architecture: str
    num_labels: int
    parameters: int
    dtype: str
    weights_sha256: str | None
