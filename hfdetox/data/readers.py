"""Sources: one split of a dataset as labels that can be scanned and images that are fetched only when chosen.

Parquet: footers and the label column are read, then only the row groups that hold chosen rows. Other formats are
streamed up to a scan limit; loose image files are listed, and only the chosen ones are fetched.
"""

import functools
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, IterableDataset

from hfdetox.data.columns import Columns
from hfdetox.data.files import DamagedFileError, LocalFiles
from hfdetox.data.images import EncodedImages, Spool
from hfdetox.data.labels import list_names

SCAN_LIMIT = 50_000  # rows read of a stream whose images come along with their labels (webdataset, json, …)
_STREAM_BLOCK = 1000
_WHOLE_FILE_SHARE = 0.5  # of a remote file's rows; beyond it one download is cheaper than many ranges
_SMALL_SPLIT = 64 * 1024**2  # bytes; a remote split up to this size is downloaded whole, and so cached

Block = tuple[np.ndarray, Sequence[Any] | np.ndarray]  # row numbers (int64) and the label column's stored values


class SplitReader(ABC):
    """One split: `scan` for labels, `fetch` for images; `rows` is how many there are, None when nobody knows yet."""

    split: str
    columns: Columns
    rows: int | None
    limited = False  # whether a scan ended at SCAN_LIMIT with rows left

    @abstractmethod
    def scan(self, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield blocks of row numbers and stored labels, in an order drawn by `rng` where the format allows one."""

    @abstractmethod
    def fetch(self, indices: Sequence[int]) -> EncodedImages:
        """Return the encoded images of these rows (ascending; rows that `scan` yielded)."""


class TableReader(SplitReader):
    """A `datasets.Dataset`: a memory-mapped table, read in place."""

    def __init__(self, dataset: Dataset, columns: Columns, split: str, files: LocalFiles) -> None:
        self.split, self.rows, self.columns, self._files = split, len(dataset), columns, files
        self._table = _undecoded(dataset.with_format(None), columns)

    def scan(self, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield the whole label column as one block."""
        yield np.arange(len(self._table)), self._table[self.columns.label][:]

    def fetch(self, indices: Sequence[int]) -> EncodedImages:
        """Return a view of the rows; nothing is copied."""
        return [functools.partial(self._image, row) for row in indices]

    def _image(self, row: int) -> bytes | str:
        stored = _stored(self._table[row][self.columns.image])
        return self._files.path(stored) if isinstance(stored, str) else stored


class FolderReader(SplitReader):
    """Loose image files of one split, with the index of each one's class or -1."""

    def __init__(self, images: Sequence[tuple[str, int]], columns: Columns, split: str, files: LocalFiles) -> None:
        self.split, self.rows, self.columns, self._files, self._images = split, len(images), columns, files, images

    def scan(self, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield all files as one block."""
        yield np.arange(len(self._images)), np.array([label for _, label in self._images], dtype=np.int64)

    def fetch(self, indices: Sequence[int]) -> EncodedImages:
        """Return where the chosen files lie, fetched if need be."""
        return self._files.map(self._files.path, [self._images[i][0] for i in indices])


class _Group(NamedTuple):
    """One row group: rows `first` to `first + rows - 1` of the split."""

    file: str
    number: int
    first: int
    rows: int


class ParquetReader(SplitReader):
    """Parquet files of one split, on this machine or on the Hub."""

    def __init__(self, split: str, names: Sequence[str], files: LocalFiles, columns: Columns) -> None:
        self.split, self._names, self._files, self.columns = split, list(names), files, columns
        if sum(files.size(name) for name in self._names) <= _SMALL_SPLIT:
            files.map(files.path, self._names)
        self._footers = dict(zip(self._names, self._files.map(self._footer, self._names), strict=True))
        self._groups, self.rows = list[_Group](), 0
        for name, footer in self._footers.items():
            for number in range(footer.num_row_groups):
                self._groups.append(_Group(name, number, self.rows, footer.row_group(number).num_rows))
                self.rows += self._groups[-1].rows
        self._labels = functools.cache(self._read_labels)

    def scan(self, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield one block per row group, in an order drawn by `rng`; only the label column is read."""
        order = range(len(self._groups)) if rng is None else rng.permutation(len(self._groups)).tolist()
        groups = [self._groups[i] for i in order]
        for start in range(0, len(groups), self._files.readers):
            window = groups[start : start + self._files.readers]
            for group, labels in zip(window, self._files.map(self._labels, window), strict=True):
                yield np.arange(group.first, group.first + group.rows), labels

    def fetch(self, indices: Sequence[int]) -> EncodedImages:
        """Read the row groups that hold the rows, and keep the rows' images in a temporary file."""
        rows = np.asarray(indices, dtype=np.int64)
        starts = np.array([group.first for group in self._groups])
        owner = np.searchsorted(starts, rows, side="right") - 1
        wanted = [(self._groups[g], rows[owner == g] - self._groups[g].first) for g in np.unique(owner)]
        touched = Counter[str]()
        for group, _ in wanted:
            touched[group.file] += group.rows
        self._files.map(self._files.path, [file for file, count in touched.items()
                                     if count >= _WHOLE_FILE_SHARE * self._footers[file].num_rows])  # fmt: skip
        spool, images = Spool(), list[Callable[[], bytes]]()
        step = max(1, self._files.readers // 2)  # row groups in memory at a time
        for start in range(0, len(wanted), step):
            images += map(spool.append, chain(*self._files.map(self._read_images, wanted[start : start + step])))
        return images

    def _read_labels(self, group: _Group) -> Sequence[Any]:
        column = self._read(group, self.columns.label)
        plain = column.null_count == 0 and pa.types.is_integer(column.type)
        return column.to_numpy() if plain else column.to_pylist()

    def _read_images(self, wanted: tuple[_Group, np.ndarray]) -> list[bytes]:
        group, rows = wanted
        column = self._read(group, self.columns.image)
        images = [_stored(column[row].as_py()) for row in rows.tolist()]
        return [image if isinstance(image, bytes) else b"" for image in images]

    def _footer(self, name: str) -> pq.FileMetaData:
        return self._files.read(name, pq.read_metadata)

    def _read(self, group: _Group, column: str) -> pa.ChunkedArray:
        footer = self._footers[group.file]
        check_column(group.file, footer.schema.to_arrow_schema(), column)
        return self._files.read(group.file, lambda source: pq.ParquetFile(source, metadata=footer, pre_buffer=True)
                                .read_row_group(group.number, columns=[column]).column(0))  # fmt: skip


class StreamReader(SplitReader):
    """A streamed split of any other format: rows in the stream's order, what was read is kept in a temporary file.

    A stream that fails on the way is opened anew, and the rows that were read of it are passed over.
    """

    def __init__(self, stream: IterableDataset, columns: Columns, split: str, files: LocalFiles,
                 rows: int | None) -> None:  # fmt: skip
        self.split, self.rows, self.columns, self._files = split, rows, columns, files
        self._stream = _undecoded(stream, columns)
        self._reading: Iterator[dict[str, Any]] | None = None
        # of each row its image's path, or what reads it from the spool, and its label
        self._spool, self._images, self._labels = Spool(), list[str | Callable[[], bytes]](), list[Any]()
        self._kept, self._ended = 0, False

    def scan(self, rng: np.random.Generator | None = None) -> Iterator[Block]:
        """Yield blocks in the stream's own order; loose files (no bytes come along) are all in one block."""
        first = 0
        while first < len(self._images) or not self._ended:
            if first == len(self._images):
                with self._files.streaming():
                    self._read_block()
            yield np.arange(first, len(self._images)), self._labels[first:]
            first = len(self._images)

    def fetch(self, indices: Sequence[int]) -> EncodedImages:
        """Return the images kept during the scan; loose files are fetched now, several at a time."""
        chosen = [self._images[i] for i in indices]
        return self._files.map(lambda image: self._files.path(image) if isinstance(image, str) else image, chosen)

    def _read_block(self) -> None:
        """Read on until a block more of images is kept, or the stream or what may be read of it ends."""
        most = min(SCAN_LIMIT, self._kept + _STREAM_BLOCK)
        while self._kept < most and (row := self._next()) is not None:
            stored = _stored(row[self.columns.image])
            self._kept += isinstance(stored, bytes)
            self._images.append(stored if isinstance(stored, str) else self._spool.append(stored))
            self._labels.append(row[self.columns.label])
        self.limited = self._kept >= SCAN_LIMIT
        if self._kept < most and len(self._images) < (self.rows or 0):  # a damaged tar ends without an error
            raise DamagedFileError(f"split {self.split} ends after {len(self._images)} of {self.rows} rows; "
                                   "get the dataset anew")  # fmt: skip
        if self._kept < most or self.limited:
            self._ended, self.rows = True, len(self._images)  # a fraction is one of what can be read
            self._reading = None

    def _next(self) -> dict[str, Any] | None:
        def attempt() -> dict[str, Any] | None:
            # put back only after success: a generator that failed is over, and would say so as if the data were
            reading, self._reading = self._reading, None
            if reading is None:
                reading = islice(iter(self._stream), len(self._images), None)
            row = next(reading, None)
            self._reading = reading
            return row

        return self._files.guard(f"split {self.split}", attempt)


def check_column(file: str, schema: pa.Schema, column: str) -> None:
    """Raise DamagedFileError where a parquet file lacks a column that the dataset's card or another file has."""
    if column not in schema.names:
        raise DamagedFileError(f"{PurePosixPath(file).name} cannot be read: it has no column {column!r}, which the "
                               f"dataset's card or another file has; it has {list_names(schema.names)}")  # fmt: skip


def _undecoded(table: Any, columns: Columns) -> Any:
    """Return the two columns of a table or stream, images as they are stored."""
    # of other columns datasets would open the files that rows name
    table = table.select_columns([columns.image, columns.label])
    if isinstance((table.features or {}).get(columns.image), Image):
        table = table.cast_column(columns.image, Image(decode=False))
    return table


def _stored(value: Any) -> bytes | str:
    """Return an image column's value: the bytes, the path of an image that its row names and does not hold, or b"".

    An array becomes the bytes of a file of NumPy's.
    """
    if isinstance(value, list):
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(value), allow_pickle=False)
        return buffer.getvalue()
    if isinstance(value, dict):
        value = value.get("bytes") or str(value.get("path") or "") or b""
    return bytes(value) if isinstance(value, (bytearray, memoryview)) else value or b""
