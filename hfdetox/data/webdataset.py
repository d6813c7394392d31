"""Webdatasets: the rows of tar files, whose members with one name up to its first dot are one row."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, ClassVar

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hfdetox.data.files import DamagedFileError, DatasetError
from hfdetox.documents import parse_json
from hfdetox.errors import one_line

_INTEGERS, _TEXTS, _JSON = ("cls", "cls2", "index", "inx", "id"), ("txt", "text", "transcript"), ("json", "jsn")
_SHOWN, _LONGEST = 60, 200
# what makes members a row, for those whose rows are none
ROWS = ("In a tar file the members of a row stand one after the other, and its label is one of them (.cls, .txt) or a "
        "value of its .json")  # fmt: skip


def _number_or_text(content: bytes) -> int | str:
    text = content.decode("utf-8").strip()
    return int(text) if text.removeprefix("-").isdecimal() else text


def _text(content: bytes) -> str:
    return content.decode("utf-8")


# `datasets` gives every member with a known ending to its decoder, `.pth` to torch's unpickler; here others stay bytes
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(_INTEGERS, _number_or_text), **dict.fromkeys(_TEXTS, _text), **dict.fromkeys(_JSON, parse_json)
}  # fmt: skip


class _PlainWebDataset(WebDataset):
    """A webdataset of which nothing is decoded."""

    DECODERS: ClassVar[dict[str, Any]] = {}


class TarRows:
    """Gives the rows of a tar file, in place of a builder's `_get_pipeline_from_tar`.

    What a row's JSON says are columns of their own; an image or a label with another ending than in the first row (jpg
    beside png, PNG beside png) is in the column of that. A name with further dots would be a column of its own, and the
    row would be without its image: it is refused.
    """

    def __init__(self) -> None:
        self._columns: dict[str, str] = {}
        self._image, self._label = "", ""
        self._named = dict[str, None]()  # what JSON says in the first row

    def expect(self, columns: Iterable[str], image: str, label: str) -> None:
        """Say which columns rows have, and which two of them are read; else the first row says it."""
        self._columns = {name.casefold(): name for name in columns}
        self._image, self._label = image, label

    def __call__(self, tar: str, members: Iterable[tuple[str, IO[bytes]]]) -> Iterator[dict[str, Any]]:
        """Yield each row of a tar file: its columns, and `__key__` and `__url__`.

        Raises:
            DatasetError: a name has dots that make its image a column of its own.
            DamagedFileError: a text, a number or JSON cannot be read.
        """
        where = PurePosixPath(tar).name
        for row in _PlainWebDataset._get_pipeline_from_tar(tar, members):
            for name, content in row.items():
                if (decode := _DECODERS.get(name.rpartition(".")[2].lower())) is not None:
                    row[name] = _decoded(f"{row['__key__']}.{name} in {where}", decode, content)
            self._open_json(row)
            if not self._columns:
                images = [name for name in row if _is_image(name)]
                self.expect(row, min(images, key=lambda name: name.count("."), default=""), "cls")
            for name in [name for name in row if name not in self._columns.values()]:
                column = self._column_of(name)
                if column and column not in row:
                    row[column] = row.pop(name)
                elif self._is_lost(name, row):
                    raise dotted(f"{row['__key__']}.{name}", where)
            yield row
        if not self._columns:
            raise DamagedFileError(f"{where} holds no files whose names have an ending; get it anew")

    def _open_json(self, row: dict[str, Any]) -> None:
        """Make what the JSON of a row says columns, the same in every row, of what may be labels."""
        for ending in _JSON:
            if isinstance(row.get(ending), dict):
                found = {name: _whole(value) for name, value in row.pop(ending).items() if name not in row}
                if not self._columns:
                    self._named = {name: None for name, value in found.items() if isinstance(value, int | str | None)}
                row |= self._named | {name: value for name, value in found.items() if name in self._named}

    def _column_of(self, name: str) -> str | None:
        """Return the column that a row's member is of, where it is spelt otherwise."""
        return self._image if _is_image(name) and "." not in name else self._columns.get(name.casefold())

    def _is_lost(self, name: str, row: dict[str, Any]) -> bool:
        """Tell whether an image is a row of its own by its name."""
        stem, dot, _ = name.rpartition(".")
        beside = any(f"{stem}.{ending}" in row for ending in (self._label, *_JSON))
        return bool(dot) and _is_image(name) and bool(self._image) and (self._image not in row or beside)


def dotted(name: str, where: str) -> DatasetError:
    """Return the refusal of a tar file in which names have more dots than that of their ending."""
    return DatasetError(f"names such as {name[-_SHOWN:]} in {where} have a dot before the ending, which WebDataset "
                        "takes for part of the column's name; rename them")  # fmt: skip


def _decoded(what: str, decode: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return decode(content)
    except ValueError as error:
        raise DamagedFileError(
            f"{what[-_LONGEST:]} cannot be read ({one_line(error, 120)}); mend or remove it"
        ) from error


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in WebDataset.IMAGE_EXTENSIONS
