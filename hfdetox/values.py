"""Settings as texts: what `--set KEY=VALUE` gives becomes a value of the field's type."""

from __future__ import annotations

import types
import typing
from typing import Any

from hfdetox.errors import UsageError


def parse_setting(key: str, hint: Any, text: str) -> Any:
    """Return `text` as a value of the type `hint`: a word of a Literal, a tuple of texts, a bool, int or float,
    or None or a word where the type is a union with it.

    Raises:
        UsageError: it is not one; the line names `key`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if text not in arguments:
            raise UsageError(f"{key} must be one of {', '.join(arguments)}, got {text!r}")
        return text
    if origin is tuple:
        return tuple(filter(None, text.split(",")))
    if origin in (types.UnionType, typing.Union):
        if words := words_of(hint):
            return text if text in words else _number(key, arguments[0], text, f" or {', '.join(words)}")
        return None if text.lower() == "none" else parse_setting(key, arguments[0], text)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{key} must be true or false, got {text!r}")
        return text.lower() == "true"
    return _number(key, hint, text)


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words that a value of the type may be: those of a Literal, or of one in a union with another type."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(word for other in typing.get_args(hint) for word in words_of(other))
    return ()


def _number(key: str, hint: Any, text: str, words: str = "") -> Any:
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise UsageError(f"{key} must be {kind}{words}, got {text!r}") from None
