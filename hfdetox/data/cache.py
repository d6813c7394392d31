"""Pixels: an image set as a model sees it, prepared once and cached as one tensor, with or without a trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from hfdetox.data.images import ImageSet, Progress, parallel_map
from hfdetox.errors import UsageError
from hfdetox.models.preprocessing import Preprocessing
from hfdetox.triggers.base import Trigger

MAX_CACHE_BYTES = 2 * 1024**3
_TRIGGER_BATCH = 256

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pixels(Dataset[Batch]):
    """Prepared images of an image set (or of some of its positions), triggered or not, for a DataLoader or an index.

    Attributes:
        images: N×C×H×W in the preprocessing's dtype (uint8, 0 to 255), prepared and triggered; None when they would
            exceed `max_bytes`: then `__getitems__` decodes on demand, in DataLoader workers too.
        labels: LongTensor (N,), the true labels, whatever the trigger.
        positions: LongTensor (N,) on the CPU, each image's place in the image set.
        trigger: what the images carry, or None.
    """

    images: torch.Tensor | None

    def __init__(
        self, images: ImageSet, preprocessing: Preprocessing, trigger: Trigger | None = None, *,
        positions: Sequence[int] | torch.Tensor | None = None, max_bytes: int = MAX_CACHE_BYTES,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """Decode and prepare all images with threads, unless they would not fit into `max_bytes`.

        `progress(done, total)` is called now and then. Raises BrokenImageError for an image that cannot be decoded,
        UsageError for a `mode=input` trigger where the preprocessing gives no uint8 images, or for an image that a
        `mode=native` trigger does not fit, which it names.
        """
        if trigger is not None and trigger.mode == "input" and preprocessing.dtype != torch.uint8:
            raise UsageError(f"trigger {trigger.name or trigger.kind}: mode=input needs uint8 images after the "
                             "preprocessing, and this callable returns floats; use mode=native")  # fmt: skip
        chosen = range(len(images)) if positions is None else positions
        self.source, self.preprocessing, self.trigger, self.max_bytes = images, preprocessing, trigger, max_bytes
        self.positions = torch.as_tensor(np.asarray(chosen, dtype=np.int64))
        self.labels = images.labels[self.positions]
        size = int(np.prod(preprocessing.input_size)) * preprocessing.dtype.itemsize * len(self.positions)
        self.images = self._decode_all(progress) if size <= max_bytes else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return (positions in the image set, images, labels) of the items (0 to len - 1), already collated."""
        places = torch.as_tensor(np.asarray(items, dtype=np.int64))
        positions = self.positions[places]
        if self.images is not None:
            on_device = places.to(self.images.device, non_blocking=True)
            return positions, self.images[on_device], self.labels[on_device]
        prepared = torch.stack([self._prepare(position) for position in positions.tolist()])
        return positions, self._finish(prepared), self.labels[places.to(self.labels.device)]

    def __getitem__(self, item: int) -> Batch:
        """Return one item as a batch of one, as `__getitems__` does."""
        return self.__getitems__([range(len(self))[item]])

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all items in order, `size` at a time; from a cache these are views, not copies."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield (self.positions[part], self.images[part], self.labels[part]) if self.images is not None else (
                self.__getitems__(range(len(self))[part]))  # fmt: skip

    def view(
        self, trigger: Trigger | None = None, *, positions: Sequence[int] | torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> Pixels:  # fmt: skip
        """Return the same images with `trigger` and at `positions` (places in the image set; default all of these).

        What is cached without a trigger is used again: nothing is decoded for a subset or a `mode=input` trigger.
        """
        chosen = self.positions if positions is None else torch.as_tensor(np.asarray(positions, dtype=np.int64))
        place = {int(p): i for i, p in enumerate(self.positions)}
        reused = (self.trigger is None and self.images is not None and (trigger is None or trigger.mode == "input")
                  and all(int(p) in place for p in chosen))  # fmt: skip
        # no room for a cache: none is decoded, and the one that is here fills the view
        view = Pixels(self.source, self.preprocessing, trigger, positions=chosen, progress=progress,
                      max_bytes=-1 if reused else self.max_bytes)  # fmt: skip
        if reused and self.images is not None:
            view.max_bytes, items = self.max_bytes, torch.tensor([place[int(p)] for p in chosen], dtype=torch.int64)
            view.images = view._finish(self.images[items.to(self.images.device)])
            view.labels = view.labels.to(self.images.device)
        return view

    def without_label(self, label: int) -> torch.Tensor:
        """Return the positions (in the image set) of images whose true label is not `label`: LongTensor, on the CPU."""
        return self.positions[self.labels.cpu() != label]

    def to(self, device: torch.device | str) -> Pixels:
        """Move the cache and the labels to `device`, in place, and return self; without a cache nothing moves."""
        if self.images is not None:
            self.images = self.images.to(device)
            self.labels = self.labels.to(device)
        return self

    def pictures(self, positions: Sequence[int]) -> tuple[list[int], NDArray[np.uint8], list[int]]:
        """Return the images at `positions` for drawing: their items, uint8 n×H×W×3 (grey ones repeated), true labels.

        The preprocessing must give uint8 images.
        """
        place = {position: item for item, position in enumerate(self.positions.tolist())}
        items = [place[position] for position in positions]
        _, images, labels = self.__getitems__(items)
        return items, images.permute(0, 2, 3, 1).cpu().expand(-1, -1, -1, 3).numpy(), labels.tolist()

    def _decode_all(self, progress: Progress | None) -> torch.Tensor:
        positions = self.positions.tolist()
        cache = torch.empty((len(positions), *self.preprocessing.input_size), dtype=self.preprocessing.dtype)

        def fill(item: int) -> None:
            cache[item] = self._prepare(positions[item])

        parallel_map(fill, range(len(positions)), progress)
        return self._finish(cache)

    def _prepare(self, position: int) -> torch.Tensor:
        """Decode one image, with a native trigger on it, and return it resized and cropped (C×H×W)."""
        image = self.source.image(position)
        if self.trigger is not None and self.trigger.mode == "native":
            try:
                image = apply_to_image(self.trigger, image)
            except UsageError as error:
                # images may be of any size, and one of them too small for the trigger
                where = f"image {self.source.indices[position]} of split {self.source.split}"
                raise UsageError(f"{where}: {error}") from error
        return self.preprocessing.prepare(image)

    def _finish(self, prepared: torch.Tensor) -> torch.Tensor:
        """Put an input trigger on prepared images (N×C×H×W)."""
        if self.trigger is None or self.trigger.mode != "input" or not len(prepared):
            return prepared
        return torch.cat([self.trigger.apply(part) for part in prepared.split(_TRIGGER_BATCH)])


def apply_to_image(trigger: Trigger, image: Image.Image) -> Image.Image:
    """Return a triggered copy of a decoded image (RGB or L), at its own size and in its own mode."""
    pixels = np.array(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    triggered = trigger.apply(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous())[0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(triggered[..., 0] if triggered.shape[-1] == 1 else triggered))
