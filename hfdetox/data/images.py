"""Clean images: decoding what strangers encoded, and the set of labelled images that a run works with."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import os
import re
import sys
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
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from hfdetox.errors import HfdetoxError, RunError, UsageError, one_line
from hfdetox.files import LFS_POINTER

MAX_PIXELS = 89_478_485  # PIL's own limit (a quarter of 1 GiB), an error here and not a warning
# the raster formats that datasets hold; PIL's other plugins (EPS runs Ghostscript) never see a stranger's file
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX")

KEPT_BYTES = 64 * 1024**2
# images decoded in the caller's thread to see how long one takes, and how long it must be for threads to pay
_PROBE = 32
_THREADS_PAY_SECONDS = 0.001

# the highest values that images are stored with: of shares, and of 8, 10, 12, 14, 16, 24, 31 and 32 bits
_TOPS = (1, 255, 1023, 4095, 16383, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
_BYTE, _MOST_CHANNELS = 255, 4
# how PIL calls pixels of 16 bits a colour; the other order of the bytes gives the lower 8 bits in place of the upper
_WIDE = re.compile(r"(?P<colours>RGB[AX]?);16(?P<order>[LBN])|(?P<grey>LA;16B)")
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_BITS, _PLANES = 258, 284  # TIFF's BitsPerSample and PlanarConfiguration
ARRAY_MAGIC = b"\x93NUMPY"

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

# a file's bytes, its path, or an image that is already decoded; and what gives one when it is wanted
Encoded = bytes | str | Image.Image
EncodedImages = Sequence[Encoded | Callable[[], Encoded]]


Range = tuple[float, float]  # the stored values of black and white
Extremes = tuple[float, float, str]  # the lowest and the highest value that an image is stored with, and the type


class BrokenImageError(RunError):
    """An image that cannot be decoded; the message names its split and row, and its file where it has one."""


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
        pixel_range: the stored values of black and white, see `decode_image`.
        range_named: whether a person said that range, see there too.
    """

    pixel_range: Range | None = None
    range_named = False

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
        trigger. Raises BrokenImageError, which names the split, the row and the file.
        """
        place = self._places[position]
        if place in self._decoded:
            return self._decoded[place]
        decode = functools.partial(decode_image, channels=self.channels, pixel_range=self.pixel_range,
                                   range_named=self.range_named)  # fmt: skip
        image = self._read(position, decode)
        size = image.width * image.height * self.channels
        if size <= self._room:
            self._room -= size
            self._decoded[place] = image
        return image

    def extremes(self, position: int) -> Extremes | None:
        """Return what `pixel_extremes` does of one image; raises BrokenImageError."""
        return self._read(position, pixel_extremes)

    def _read(self, position: int, function: Callable[[Encoded], Result]) -> Result:
        encoded, file = self._encoded[self._places[position]], ""
        try:
            encoded = encoded() if callable(encoded) else encoded
            file = "/".join(Path(encoded).parts[-2:]) + ": " if isinstance(encoded, str) else ""
            return function(encoded)
        except HfdetoxError:
            raise
        except Exception as error:  # PIL raises anything for a broken or hostile file
            reason = one_line(error)[:120] or type(error).__name__
            image = f"image {self.indices[position]} of split {self.split}"
            raise BrokenImageError(f"{image} cannot be decoded ({file}{reason}); repair or remove it, or choose "
                                   "another split or seed") from error  # fmt: skip

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """Return the images at `positions` as a set of their own; nothing is copied."""
        chosen, part = [int(p) for p in positions], copy.copy(self)
        part.labels, part.indices = self.labels[chosen], [self.indices[p] for p in chosen]
        part._places = [self._places[p] for p in chosen]
        # its own: what it decodes further goes with it
        part._decoded = {place: self._decoded[place] for place in part._places if place in self._decoded}
        return part

    def relabelled(self, labels: np.ndarray) -> ImageSet:
        """Return the same images, of which those of label i have the label `labels[i]`; nothing is copied."""
        part = self.subset(range(len(self)))
        part.labels = torch.as_tensor(labels)[part.labels]
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


def decode_image(
    encoded: Encoded, *, channels: int = 3, pixel_range: Range | None = None, range_named: bool = False
) -> Image.Image:  # fmt: skip
    """Return an upright 8-bit RGB (or L, for `channels` 1) image.

    Grey, palette, RGBA, CMYK, Lab and other images are converted; transparency is dropped, as the two model libraries
    do. Numbers of other types (16 and 32 bits, floats, arrays with the channels first or last) are scaled from
    `pixel_range`, the values of black and white; None takes the range from this image's own values. A range within 0 to
    255 that a person named (`range_named`) scales 8-bit images too; one told by numbers beside them is not theirs.

    Raises what PIL raises for a broken file, DecompressionBombError for more than MAX_PIXELS pixels, ValueError for a
    missing image or for what is no image, UsageError for values that no usual range has.
    """
    image = _opened(encoded)
    if isinstance(image, Image.Image) and range_named and pixel_range is not None and pixel_range[1] <= _BYTE:
        image = np.asarray(_to_mode(image, "RGB"))
    if isinstance(image, np.ndarray):
        low, high = pixel_range or usual_range([_extremes_of(image)])
        scaled = (_finite(image).astype(np.float64) - low) * (_BYTE / (high - low))
        image = Image.fromarray(np.rint(scaled).clip(0, _BYTE).astype(np.uint8))
    return _to_mode(image, "L" if channels == 1 else "RGB")


def pixel_extremes(encoded: Encoded) -> Extremes | None:
    """Return the lowest and highest value of an image whose type does not say its range; None for 8-bit images."""
    found = _opened(encoded, upright=False)
    return _extremes_of(_finite(found)) if isinstance(found, np.ndarray) else None


def usual_range(found: Sequence[Extremes]) -> Range:
    """Return the values of black and white that stored values stand for: the least usual range that has them all.

    Usual are 0 to 1, -1 to 1 for numbers with a point, all of 8, 10, 12, 14, 16, 24, 31 or 32 bits, and all of a signed
    byte. Raises UsageError for others: they have to be named.
    """
    lows, highs, kinds = zip(*found, strict=True)
    low, high = min(lows), max(highs)
    if set(kinds) == {"int8"}:
        return (-128.0 if low < 0 else 0.0, 127.0)
    # numbers with a point may pass their ends by a rounding
    top = next((top for top in _TOPS if high <= top * 1.001), None)
    if -0.001 * high <= low < 0 and all(kind.startswith("float") for kind in kinds):
        low = 0.0
    if low < 0 and not (low >= -1.001 and high <= 1.001):
        raise UsageError(f"pixels from {low:g} to {high:g} are in no usual range; name it with --pixel-range LOW,HIGH")
    if top is None or not np.isfinite(low):
        raise UsageError(f"pixels up to {high:g} are in no usual range; name it with --pixel-range LOW,HIGH")
    return (-1.0 if low < 0 else 0.0, float(top))


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are no finite numbers")
    return values


def _extremes_of(values: np.ndarray) -> Extremes:
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    return low, high, str(values.dtype)


def _opened(encoded: Encoded, *, upright: bool = True) -> Image.Image | np.ndarray:
    """Return an image of 8 bits, or the numbers of one whose type does not say their range."""
    if isinstance(encoded, Image.Image):
        image = encoded
    elif not encoded:
        raise ValueError("there is no image in this row")
    else:
        content = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
        if content.startswith(ARRAY_MAGIC):
            return _upright_array(np.load(io.BytesIO(content), allow_pickle=False))
        if content.startswith(LFS_POINTER):
            raise ValueError("a git-lfs pointer, not an image; run `git lfs pull` there")
        Image.init()
        try:
            image = Image.open(io.BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            raise UnidentifiedImageError("not an image in a known format") from None  # PIL's text shows an address
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS} are read")
    deep = _sixteen_bits(image, content) if not isinstance(encoded, Image.Image) else None
    if deep is not None:
        return deep
    if upright:
        image = ImageOps.exif_transpose(image)
    return np.asarray(image) if image.mode.startswith(("I", "F")) else image


def _sixteen_bits(image: Image.Image, content: bytes) -> np.ndarray | None:
    """Return the numbers of a PNG or TIFF of colours of 16 bits, of which PIL keeps the upper 8; None for others.

    Where they hold 12 bits these are nearly black. Raises ValueError where PIL would take the wrong bytes.
    """
    if not isinstance(image, PngImageFile | TiffImageFile):
        return None
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PLANES) == 2 and max(image.tag_v2.get(_BITS, (8,))) > 8:
        raise ValueError("its colours of 16 bits lie in planes; save it anew with those of each pixel together")
    modes = {str(tile.args if isinstance(tile.args, str) else tile.args[0]) for tile in image.tile if tile.args}
    match = _WIDE.fullmatch(modes.pop()) if len(modes) == 1 else None
    if match is None:
        return None
    with Image.open(io.BytesIO(content), formats=[image.format or ""]) as again:
        if match["grey"]:
            again._mode, mode = "RGBA", "RGBA"  # of the four bytes a pixel has, the first two are the grey
        else:
            mode = f"{match['colours']};16{_OTHER_BYTE[match['order']]}"
        assert isinstance(again, ImageFile)
        again.tile = [tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)
                      for tile in again.tile]  # fmt: skip
        other = np.asarray(ImageOps.exif_transpose(again))
    if match["grey"]:
        return other[..., 0].astype(np.uint16) << 8 | other[..., 1]
    return np.asarray(ImageOps.exif_transpose(image))[..., :3].astype(np.uint16) << 8 | other[..., :3]


def _upright_array(values: np.ndarray) -> Image.Image | np.ndarray:
    """Return an array as H×W or H×W×3, without transparency; one of 8 bits as an image."""
    if values.ndim == 3 and values.shape[-1] > _MOST_CHANNELS >= values.shape[0]:
        values = np.moveaxis(values, 0, -1)
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.dtype.kind not in "biuf" or values.ndim not in (2, 3) or not 0 < channels <= _MOST_CHANNELS:
        raise ValueError(f"an array of {values.dtype} and shape {values.shape} is no image")
    if values.size > MAX_PIXELS * channels:
        raise Image.DecompressionBombError(f"an array of shape {values.shape}; at most {MAX_PIXELS} pixels are read")
    values = values[..., :3] if channels > 2 else values.reshape(*values.shape[:2], channels)[..., 0]
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    return values.astype(np.uint8) if values.dtype == bool else values


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB")) or image
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about palettes with transparency on the way to RGB
    elif image.mode == "La":
        image = image.convert("LA")  # the one way from premultiplied grey
    return image if image.mode == mode else image.convert(mode)
