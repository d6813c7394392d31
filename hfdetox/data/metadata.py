"""Metadata files of image folders: what is wrong with one that cannot be used, and in which line."""

import csv
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

import pyarrow.parquet as pq

from hfdetox.data.columns import LABEL_NAMES
from hfdetox.data.files import DamagedFileError, DatasetError, LocalFiles
from hfdetox.data.folders import ImageFolder
from hfdetox.data.labels import list_names
from hfdetox.documents import parse_json
from hfdetox.errors import one_line
from hfdetox.values import shown

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE = "file_name"
_Line = tuple[int, dict[str, Any]]


def owners_of(
    dataset: str, folder: ImageFolder, metadata: Iterable[str], warn: Callable[[str], None]
) -> dict[str, str]:
    """Return the split that each metadata file is of; one of several tells no labels.

    Raises:
        DatasetError: it would have to, where the folders tell no classes.
    """
    owners = dict[str, str]()
    for path in metadata:
        beside = "" if "/" not in path else f"{PurePosixPath(path).parent}/"
        found = [split for split, own in folder.splits.items() if any(one.startswith(beside) for one, _ in own)]
        if len(found) == 1:
            owners[path] = found[0]
        elif found:
            # `datasets` would give each of them all of its rows
            line = (
                f"{path} of dataset {dataset} is of the splits {list_names(found, 3)}: put one into the folder of each"
            )
            if not folder.classes:
                raise DatasetError(f"{line}, with the names of its own images")
            warn(f"{line}; the folders' names are the labels")
    return owners


def check_files(files: LocalFiles, metadata: Mapping[str, str], listing: Mapping[str, str]) -> None:
    """Check the metadata files of an image folder: their names by their paths, as `listing` has those of all files.

    Raises:
        DamagedFileError: what `check_metadata` raises, or there are several kinds.
    """
    if len(endings := {PurePosixPath(path).suffix for path in metadata}) > 1:
        raise DamagedFileError(f"there are metadata files of several kinds ({', '.join(sorted(endings))}), of which "
                               "`datasets` reads one: keep that")  # fmt: skip
    for path, name in metadata.items():
        if path.endswith(".parquet"):
            files.read(name, pq.read_schema)
        else:
            check_metadata(path, files.read(name, lambda source: source.read()), listing)


def check_metadata(path: str, content: bytes, files: Collection[str]) -> None:
    """Check a `metadata.csv` or `.jsonl` that says which file of an image folder has which label.

    Args:
        path: where it lies, relative to the image folder, with slashes.
        files: all files of the folder, by their paths.

    Raises:
        DamagedFileError: it cannot be read, or names files that are not there; with the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _damaged(path, line, "is not UTF-8 text; save the file as that") from error
    lines = _csv_lines(path, text) if path.endswith(".csv") else _json_lines(path, text)
    missing = list[tuple[int, str]]()
    for line, row in lines:
        name = row.get(_FILE)
        if any(key != _FILE and key.endswith((_FILE, f"{_FILE}s")) for key in row):
            return  # `datasets` takes these for files too
        if not isinstance(name, str) or not name.strip():
            raise _damaged(path, line, f"has no {_FILE}; give one, or remove the line")
        place = normpath((PurePosixPath(path).parent / name).as_posix())
        if name.startswith("/") or place.startswith(".."):
            raise _damaged(path, line, f"names {shown(name)}, outside the folder; put the file into it")
        if place not in files:
            missing.append((line, name))
    if missing:
        line, name = missing[0]
        more = f" (and {len(missing) - 1} more lines name such)" if len(missing) > 1 else ""
        raise _damaged(path, line, f"names {shown(name)}, which is not there{more}; add the files, or remove the lines")


def _csv_lines(path: str, text: str) -> Iterator[_Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1
    try:
        header = next(reader, [])
        if odd := [name for name in header if name != name.strip() and name.strip() in (_FILE, *LABEL_NAMES)]:
            raise _damaged(path, 1, f"has spaces around the name of the column {odd[0]!r}; remove them")
        if not any(name.endswith((_FILE, f"{_FILE}s")) for name in header):
            raise _damaged(path, 1, f"has no column {_FILE}: its columns are {list_names(header) or 'none'}; give it "
                                    "one, with commas between columns")  # fmt: skip
        begun = reader.line_num + 1
        for row in reader:
            if len(row) > len(header):
                raise _damaged(path, begun, f"has {len(row)} fields and the first line {len(header)}; put texts with "
                                            "commas in quotes")  # fmt: skip
            if row:
                yield begun, dict(zip(header, row, strict=False))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise _damaged(path, begun, f"is no CSV ({one_line(error, 120)}); mend it") from error


def _json_lines(path: str, text: str) -> Iterator[_Line]:
    kinds = dict[str, str]()
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = parse_json(content)
        except ValueError as error:
            raise _damaged(path, line, f"is no JSON ({one_line(error, 120)}); mend it") from error
        if not isinstance(row, dict):
            raise _damaged(path, line, f'is no JSON object; write {{"{_FILE}": "cat.png", "label": "cat"}}')
        for name, value in row.items():
            kind = _kind(value)
            if kind is not None and kinds.setdefault(name, kind) != kind:
                raise _damaged(path, line, f"has {kind} as {shown(name)}, and the lines before {kinds[name]}; give "
                                           "all of them one type")  # fmt: skip
        yield line, row


def _kind(value: Any) -> str | None:
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value))


def _damaged(path: str, line: int, what: str) -> DamagedFileError:
    return DamagedFileError(f"line {line} of {path} {what}")
