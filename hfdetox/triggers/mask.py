"""Mask: a picture mixed in with a share of its own for each pixel, as triggers are reconstructed from a model."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hfdetox.errors import UsageError
from hfdetox.triggers.base import Mode, Trigger, fit


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask(Trigger):
    """T(x) = (1 − m)·x + m·255·q, truncated to whole grey levels.

    What a search on a model finds that is suspected of a backdoor (Wang et al., IEEE S&P 2019): a small patch, or a
    faint blend, whose m is the same everywhere. Both arrays are resized to the image bilinearly; grey images take the
    luma of q.

    Attributes:
        mask: m (float32, 1×h×w, in [0, 1]).
        pattern: q (float32, C×h×w, in [0, 1]).
    """

    kind = "mask"
    summary = "a reconstructed trigger: a pattern with a share for each pixel"
    paper = "IEEE S&P 2019 (Neural Cleanse)"
    made: ClassVar[tuple[str, str]] = ("reconstructed from a model", "hfdetox scan")

    mode: Mode = "input"
    mask: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})
    pattern: torch.Tensor | None = field(default=None, metadata={"tensor": "array"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mask is None) != (self.pattern is None):
            raise UsageError(f"trigger {self.name}: mask and pattern are given together, or neither")
        for name, array in self.tensors().items():
            if array.ndim != 3 or not array.numel() or (name == "mask" and len(array) != 1):
                wanted = "1×h×w" if name == "mask" else "C×h×w"
                raise UsageError(f"trigger {self.name}: {name} must be {wanted}, got shape {tuple(array.shape)}")
            low, high = float(array.min()), float(array.max())
            if low < 0 or high > 1:
                raise UsageError(f"trigger {self.name}: {name} reaches from {low:.4g} to {high:.4g}; give it in units "
                                 "of [0, 1]")  # fmt: skip

    @property
    def fitted(self) -> bool:
        return self.mask is not None

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        self.require_fitted()
        channels, height, width = images.shape[-3:]

        def parts() -> tuple[torch.Tensor, torch.Tensor]:
            arrays = self.tensors()
            mask = fit(arrays["mask"], channels, height, width, "mask")
            levels = 255 * mask * fit(arrays["pattern"], channels, height, width, "pattern")
            return (1 - mask).to(images.device), levels.to(images.device)

        kept, added = self.remember((channels, height, width, images.device), parts)
        # as in Blended, so that float32's rounding loses no grey level
        return (kept * images.float() + added + 1e-4).clamp(0, 255).to(torch.uint8)
