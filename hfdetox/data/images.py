"""Clean images: decoding what strangers encoded, and the set of labelled images that a run works with."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from multiprocessing import reduction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from hfdetox.errors import HfdetoxError, RunError, one_line

MAX_PIXELS = 89_478_485  # PIL's own limit (a quarter of 1 GiB), an error here and not a warning
# the raster formats that datasets hold; PIL's other plugins (EPS runs Ghostscript) never see a stranger's file
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX")

KEPT_BYTES = 256 * 1024**2
# images decoded in the caller's thread to see how long one takes, and how long it must be for threads to pay
_PROBE = 32
_THREADS_PAY_SECONDS = 0.001

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

# a file's bytes, its path, or an image that is already decoded; and what gives one when it is wanted
Encoded = bytes | str | Image.Image
EncodedImages = Sequence[Encoded | Callable[[], Encoded]]


class BrokenImageError(RunError):
    """An image that cannot be decoded; the message names its split and row."""


class Spool:
    """Encoded images in one unlinked temporary file: large sets do not fill the memory, forked workers may read it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="hfdetox-images-")  # noqa: SIM115 - open as long as the spool lives
        self._end = 0

    def append(self, encoded: bytes) -> Callable[[], bytes]:
        """Add one image and return what reads it again; raises RunError when the disk is full."""
        try:
            self._file.write(encoded)
            self._file.flush()
        except OSError as error:
            where = f"{tempfile.gettempdir()} ({error.strerror})"
            raise RunError(f"cannot keep images in {where}; free some space there or set TMPDIR") from error
        self._end += len(encoded)
        return functools.partial(self._read, self._end - len(encoded), len(encoded))

    def _read(self, start: int, length: int) -> bytes:
        # pread keeps no position, so threads and forked processes do not disturb one another
        return os.pread(self._file.fileno(), length, start)

    def __getstate__(self) -> dict[str, Any]:
        # workers that are not forked (macOS, Python 3.14) are sent the open file itself
        return {**vars(self), "_file": reduction.DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _file=os.fdopen(state["_file"].detach(), "rb"))


class ImageSet:
    """Labelled clean images in the model's own label order, decoded on demand.

    Attributes:
        labels: LongTensor (N,), indices into the model's labels.
        indices: the row of each image in its source split, ascending.
        split: the source split's name.
        channels: 3 for RGB, 1 for grey images.
    """

    def __init__(
        self, encoded: EncodedImages, labels: Sequence[int] | np.ndarray, indices: Sequence[int], *,
        split: str = "train", channels: int = 3,
    ) -> None:  # fmt: skip
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.indices = [int(i) for i in indices]
        self.split, self.channels = split, channels
        self._encoded, self._places = encoded, list(range(len(encoded)))
        # by place among the encoded, which a subset shares
        self._decoded: dict[int, Image.Image] = {}
        self._room = KEPT_BYTES
        if not len(encoded) == len(self.labels) == len(self.indices):
            raise ValueError(f"{len(encoded)} images, {len(self.labels)} labels and {len(self.indices)} indices")

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, position: int) -> Image.Image:
        """Return one image as PIL RGB (L when `channels` is 1), upright; not to be changed in place.

        Decoded images are kept, up to KEPT_BYTES in all: the same are hashed, prepared, and prepared again with each
        trigger. Raises BrokenImageError, which names the split and row.
        """
        place = self._places[position]
        if place in self._decoded:
            return self._decoded[place]
        try:
            encoded = self._encoded[place]
            image = decode_image(encoded() if callable(encoded) else encoded, channels=self.channels)
        except HfdetoxError:
            raise
        except Exception as error:  # PIL raises anything for a broken or hostile file
            reason = one_line(error)[:120] or type(error).__name__
            raise BrokenImageError(f"image {self.indices[position]} of split {self.split} cannot be decoded ({reason});"
                                   " repair or remove it, or choose another split or seed") from error  # fmt: skip
        size = image.width * image.height * self.channels
        if size <= self._room:
            self._room -= size
            self._decoded[place] = image
        return image

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """Return the images at `positions` as a set of their own; nothing is copied."""
        chosen, part = [int(p) for p in positions], copy.copy(self)
        part.labels, part.indices = self.labels[chosen], [self.indices[p] for p in chosen]
        part._places = [self._places[p] for p in chosen]
        # its own: what it decodes further goes with it
        part._decoded = {place: self._decoded[place] for place in part._places if place in self._decoded}
        return part

    @property
    def indices_sha256(self) -> str:
        """SHA-256 (hex) over the split's name and the ascending row numbers, each with a line feed after it, UTF-8."""
        lines = [self.split, *(str(i) for i in sorted(self.indices))]
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()

    def fingerprint(self, position: int) -> bytes:
        """Return the SHA-256 of an image's decoded pixels and size: equal pixels in another file count as equal."""
        image = self.image(position)
        return hashlib.sha256(f"{image.size}{image.mode}".encode() + image.tobytes()).digest()


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None = None
) -> list[Result]:
    """Return `function` of each item, in order, computed by threads where that pays.

    PIL decodes and resizes outside Python's lock, but threads that come back for the lock every fraction of a
    millisecond stop each other: work that turns out that short is done in this thread. `progress(done, total)` is
    called in the caller's thread after each chunk. The first error is raised, in order.
    """
    results: list[Result] = []

    def run(chunk: Sequence[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    begin = time.perf_counter()
    first = run(items[:_PROBE])
    short = (time.perf_counter() - begin) / max(1, len(first)) < _THREADS_PAY_SECONDS
    size = 256 if short else 4
    rest = [items[i : i + size] for i in range(_PROBE, len(items), size)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hfdetox-decode") as pool:
        for part in chain([first], (map if short else pool.map)(run, rest)):
            results.extend(part)
            if progress is not None:
                progress(len(results), len(items))
    return results


def decode_image(encoded: Encoded, *, channels: int = 3) -> Image.Image:
    """Return an upright 8-bit RGB (or L, for `channels` 1) image.

    Grey, palette, RGBA, CMYK and 16-bit images are converted; transparency is dropped, as the two model libraries do;
    16-bit values are scaled to 8 bit (65535 becomes 255), not clipped. Raises what PIL raises for a broken file,
    DecompressionBombError for more than MAX_PIXELS pixels, ValueError for a missing image or a mode without a
    defined range (32-bit float).
    """
    image = encoded if isinstance(encoded, Image.Image) else _opened(encoded)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS} are read")
    return _to_mode(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")


def _opened(encoded: bytes | str) -> Image.Image:
    """Return the image of a file's bytes, or of the file at a path, not loaded."""
    if not encoded:
        raise ValueError("there is no image in this row")
    Image.init()
    content = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not an image in a known format") from None  # PIL's text shows an address


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        top = 65535 if values.size == 0 or values.max() <= 65535 else 2**31 - 1
        image = Image.fromarray(np.rint(values.clip(0, top) * (255.0 / top)).astype(np.uint8))
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about palettes with transparency on the way to RGB
    return image if image.mode == mode else image.convert(mode)
