"""What strangers wrote as JSON or YAML, read safely: whatever is wrong with it is one line, and nothing of it runs."""

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from hfdetox.errors import UsageError, one_line
from hfdetox.values import read, shown

_LISTS_DEEP = 4  # lists in lists of a value that has no type
_PLAIN = "give a number, true or false, a list or a text"
# of a stranger's file: its bytes (YAML takes a second for so many), its values, and its lists within lists
_MOST_JSON, _MOST_YAML, _MOST_VALUES, _DEEPEST = 32 * 2**20, 2**20, 1_000_000, 64
_HIGHEST = 10**300  # a larger number is no float
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_untyped(where: str, text: str) -> Any:
    """Return a number, true or false, a text or a list of these, as JSON or YAML has them; UsageError for others."""
    try:
        found = parse_json(text)
    except ValueError:
        try:
            found = parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"{where}: the value is neither JSON nor YAML ({error}); {_PLAIN}") from error
    if not _is_plain(found, _LISTS_DEEP):
        raise UsageError(f"{where}: {_PLAIN}")
    return found


def read_json(file: Path, hint: Any = Any, what: str = "valid JSON") -> Any:
    """Return what a JSON file holds, as the type `hint`, see `read`.

    Raises:
        UsageError: `FILE is not WHAT: …`, or it cannot be read.
    """
    return _read_file(file, parse_json, hint, what)


def read_yaml(file: Path, hint: Any = Any, what: str = "valid YAML") -> Any:
    """Return what a YAML file holds, as `read_json` does."""
    return _read_file(file, parse_yaml, hint, what)


def parse_json(content: str | bytes) -> Any:
    """Return what JSON holds, whoever wrote it; ValueError says what is wrong with it, on one line."""
    return _parse(content, partial(json.loads, object_pairs_hook=_mapping))


def parse_yaml(content: str | bytes) -> Any:
    """Return what YAML holds, whoever wrote it; ValueError says what is wrong with it, on one line."""
    return _parse(content, _load_yaml, _MOST_YAML)


def card_header(text: str | None) -> dict[str, Any]:
    """Return the YAML at the head of a card, whoever wrote it; ValueError where it cannot be read."""
    text = (text or "").removeprefix("\ufeff")
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None and re.match(r"\s*---[ \t]*\r?\nlicense:", text):
        raise ValueError("it has no line --- at its end")
    header = parse_yaml(match.group(1)) if match else {}
    return header if isinstance(header, dict) else {}


def _load_yaml(text: str) -> Any:
    depth = 0
    # libyaml's composer recurses in C, where a deep file ends the process; its events come one by one
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecursionError
    return yaml.load(text, Loader=_Loader)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml may be missing
    """YAML's plain types; a key that is there twice is refused, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter((key.tag, str(key.value)) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        for key, _ in node.value:
            if counts[key.tag, str(key.value)] > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _read_file(file: Path, parse: Callable[[bytes], Any], hint: Any, what: str) -> Any:
    try:
        with file.open("rb") as opened:
            return read("", hint, parse(opened.read(_MOST_JSON + 1)))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{file} is not {what}: {error}") from error


def _parse(content: str | bytes, parse: Callable[[str], Any], most: int = _MOST_JSON) -> Any:
    if len(content) > most:
        raise ValueError(f"it is larger than {most // 2**20} MiB")
    try:
        found = parse(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        digits = "integer string conversion" in str(error)
        raise ValueError("a number has thousands of digits" if digits else one_line(error, 160)) from error
    except (LookupError, AttributeError, TypeError) as error:
        # PyYAML has no error of its own for an odd tag or a value that is not of its tag
        raise ValueError("a value is not what its tag, such as !!bool, says") from error
    _check_size(found)
    return found


def _check_size(found: Any) -> None:
    """Raise ValueError for what a reader could not go through, or print.

    Aliases make a list of YAML that fills the memory, or holds itself, of a few letters.
    """
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        for value in level:
            if isinstance(value, str) and ("\0" in value or _SURROGATE.search(value)):
                raise ValueError("a text in it holds a character that is none")
            if isinstance(value, int) and abs(value) > _HIGHEST:
                raise ValueError("a number has hundreds of digits")
        inner = chain.from_iterable(
            chain(value, value.values()) if isinstance(value, dict) else value
            for value in level if isinstance(value, list | tuple | dict | set)
        )  # fmt: skip
        if not (level := list(islice(inner, _MOST_VALUES + 1))):
            return
        if len(level) > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
    raise ValueError("it is nested too deeply")


def _is_plain(value: Any, depth: int) -> bool:
    """Tell whether a value is a scalar, or such in at most `depth` lists around it: a list of YAML may hold itself."""
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return isinstance(value, int | float | str)
