"""Specifications as text: `key=value` items and paths in them, and an attacker's label, by name or by index."""

import csv
import io
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hfdetox.errors import UsageError
from hfdetox.values import shown

_INDEX = re.compile(r"index:(\d{1,18})", re.ASCII)


def read_target(target: str | int) -> str | int:
    """Return an attacker's label: an index as a number (in text `index:2`), else a name, all-to-all or bare digits."""
    if isinstance(target, str):
        index = _INDEX.fullmatch(target.strip())
        return int(index[1]) if index else target
    try:
        if isinstance(target, bool):  # an integer in Python
            raise TypeError
        return operator.index(target)
    except TypeError:
        raise UsageError(f"a target is a label's name, its index or all-to-all, got {shown(target)}") from None


def target_text(target: str | int) -> str:
    """Return an attacker's label as `read_target` reads it again; a number alone might be the name of another label."""
    target = read_target(target)
    return target if isinstance(target, str) else f"index:{target}"


def split_items(where: str, text: str) -> list[str]:
    """Return the items of `key=value,key=value`; one with a comma in it stands in double quotes, as in CSV."""
    try:
        return [item for row in csv.reader([text], strict=True) for item in row if item]
    except csv.Error as error:
        raise UsageError(f"{where}: {error}; an item with a comma or a quote in it goes in double quotes, as in "
                         '"target=crane, bird"') from error  # fmt: skip


def join_items(items: Iterable[str]) -> str:
    """Return the text that `split_items` takes apart into `items`."""
    text = io.StringIO()
    csv.writer(text).writerow(items)
    return text.getvalue().removesuffix("\r\n")


def read_pair(option: str, text: str) -> tuple[str, str]:
    """Split KEY=VALUE (dashes in the key count as underscores); UsageError without a key or an equals sign."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{option} {shown(text)} is not KEY=VALUE")
    return key.strip().replace("-", "_"), value.strip()


def read_pairs(where: str, items: Iterable[str], known: Iterable[str], listed: str) -> dict[str, str]:
    """Return the `key=value` items of a specification as texts by their key.

    Args:
        where: what the errors begin with.
        known: the keys there are.
        listed: the keys as an error lists them.

    Raises:
        UsageError: an item without an equals sign, or a key that is unknown or given twice.
    """
    keys, found = set(known), dict[str, str]()
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in keys:
            raise UsageError(f"{where}: {shown(item)} is not one of {listed}")
        if key in found:
            raise UsageError(f"{where}: {key} is given twice")
        found[key] = value
    return found


def redact_paths(text: str) -> str:
    """Return a text without where things lie: of a path that exists here, and of those in `KEY=PATH,…`, the name."""
    there = os.path.exists(text)
    if "=" in text and not there:
        return re.sub("(?<==)[^,]*/[^,]*", lambda found: redact_paths(found[0]), text)
    return f"./{Path(text).resolve().name}" if there or os.path.isabs(text) else text
