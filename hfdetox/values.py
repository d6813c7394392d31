"""One coercion: what a person typed, or what JSON or YAML holds, becomes a value of a dataclass field's type."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import le, lt
from typing import Annotated, Any

from hfdetox.errors import UsageError, located, one_line

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LISTS, _MAPPINGS = (list, tuple, Sequence), (dict, Mapping)
_UNIONS = (types.UnionType, typing.Union)
# letters of a wrong value that a message shows, and of what it lists
_SHOWN, _LISTED = 60, 120


@dataclass(frozen=True)
class Shape:
    """In an `Annotated` type: what of JSON or YAML is taken for it, where the type alone does not say.

    Attributes:
        says: what the message says after the key, with `{}` for the wrong value: `must be above 0, got {}`.
        holds: whether a value of the type will do.
        kind: the type as it is written, where that is another one.
        make: the value of what is written; its UsageError needs not name the key.
    """

    says: str = ""
    holds: Callable[[Any], object] = lambda value: True
    kind: Any = None
    make: Callable[[Any], Any] = lambda value: value

    def read(self, key: str, hint: Any, value: Any) -> Any:
        """Return `value` as the type `hint`, as `read` does."""
        wrong = UsageError(f"{key} {self.says.format(shown(value))}")
        try:
            found = read(key, self.kind or hint, value)
        except UsageError as error:
            # what is wrong in a list or mapping has a name of its own
            raise (wrong if self.says and not isinstance(value, list | dict) else error) from None
        if not self.holds(found):
            raise wrong
        with located(key):
            return self.make(found)


class Interval:
    """The numbers between two ends, written as in mathematics, such as `(0, 1]`; it stands beside a field's type.

    A field says `Annotated[float, Interval("(0, 1]")]`, and `check_fields` checks it. An end `inf` in brackets admits
    infinity, for whole numbers that have no end. Of those with a `step`, its multiples alone are admitted.
    """

    def __init__(self, text: str, step: int = 0) -> None:
        self.text, self.step = text, step
        self.low, self.high = map(float, text[1:-1].split(","))

    def __contains__(self, value: Any) -> bool:
        # NumPy's numbers too, and no text
        low, high = (le if self.text[0] == "[" else lt), (le if self.text[-1] == "]" else lt)
        inside = isinstance(value, Real) and bool(low(self.low, value) and high(value, self.high))
        return inside and not (self.step and value % self.step)

    def __str__(self) -> str:
        """Return in words what it has: `positive and finite`, `at least 1`, `in (0, 1]`."""
        if self.step:
            return f"a multiple of {self.step}, at most {self.high:g}"
        if self.high < math.inf:
            return f"in {self.text}"
        least = f"at least {self.low:g}" if self.text[0] == "[" else f"above {self.low:g}" if self.low else "positive"
        return least if self.text[-1] == "]" else f"{least} and finite"


PositiveInt = Annotated[int, Interval("[1, inf]")]
NonNegativeInt = Annotated[int, Interval("[0, inf]")]
PositiveFloat = Annotated[float, Interval("(0, inf)")]
NonNegativeFloat = Annotated[float, Interval("[0, inf)")]


def check_fields(owner: Any, label: str) -> None:
    """Check the values of a dataclass against the words and the intervals of their types, its bases' included.

    Raises:
        UsageError: `LABEL: FIELD must be …, got …`.
    """
    for kind in type(owner).__mro__:
        for key, hint in typing.get_type_hints(kind, include_extras=True).items():
            intervals, none = _intervals(hint), [None] if type(None) in typing.get_args(hint) else []
            if not intervals and typing.get_origin(hint) is not typing.Literal:
                continue
            value, words = getattr(owner, key), words_of(hint)
            if value in [*words, *none] or any(value in interval for interval in intervals):
                continue
            wanted = [*map(str, intervals), *map(to_text, [*words, *none])] if intervals else [expected(hint)]
            raise UsageError(f"{label}: {key.rstrip('_')} must be {', or '.join(wanted)}, got {shown(value)}")


def read(key: str, hint: Any, value: Any, *, text: bool = False) -> Any:
    """Return `value` as the type `hint`: a scalar, Literal, list, mapping, dataclass, None, or a union of these.

    Args:
        key: what the value is called; the error begins with it, and names what is in it as `KEY.NAME`.
        hint: the type; what is `Any` is not looked at.
        value: plain JSON or YAML, whose types must be the right ones (a whole number is a number too).
        text: a scalar is what a person typed: `true`, `none`, `0.5`, a list with commas.

    Raises:
        UsageError: it is not one; the line says what it must be.
    """
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Annotated:
        shape = next((note for note in hint.__metadata__ if isinstance(note, Shape)), None)
        return read(key, arguments[0], value, text=text) if shape is None else shape.read(key, arguments[0], value)
    if hint is Any:
        return value
    if origin in _UNIONS:
        return _read_union(key, hint, value, text)
    if dataclasses.is_dataclass(hint):
        return read_fields(key, typing.cast(Any, hint), value)
    if origin is typing.Literal and value in arguments:
        return value
    if origin in _LISTS and (text or isinstance(value, list | tuple)):
        items = filter(None, value.split(",")) if text else value
        found = [read(f"{key}[{i}]", arguments[0], item, text=text) for i, item in enumerate(items)]
        return tuple(found) if origin is tuple else found
    if origin in _MAPPINGS and isinstance(value, Mapping):
        if strange := [name for name in value if not isinstance(name, str)]:
            raise UsageError(f"{key}: the name {shown(strange[0])} is not text; put it in quotes")
        return {name: read(_join(key, name), arguments[1], item, text=text) for name, item in value.items()}
    if hint in _NAMES:
        known, found = _read_text(hint, value) if text else (_fits(hint, value), value)
        if known:
            return found
    raise UsageError(f"{key} must be {expected(hint)}, got {shown(value)}".lstrip())


def read_settings(owner: str, kind: type[Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a dataclass that `texts` set, as `--set` gives them; a field `lambda_` is the key `lambda`.

    Raises:
        UsageError: a key that `owner` has not, or a wrong value.
    """
    fields, hints = {f.name.rstrip("_"): f.name for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    check_keys(owner, texts, fields)
    return {fields[key]: read(key, hints[fields[key]], text, text=True) for key, text in texts.items()}


def check_keys(owner: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for keys that are none of the known settings, which it lists."""
    if unknown := sorted(set(keys) - set(known)):
        raise UsageError(f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")


def read_fields(key: str, kind: type[Any], value: Any) -> Any:
    """Return a dataclass of plain JSON or YAML; UsageError for unknown or missing fields and for wrong values.

    A text alone is taken for the field that the class names as its `SHORT`, if it does.
    """
    if isinstance(value, str) and hasattr(kind, "SHORT"):
        value = {kind.SHORT: value}
    hints, known = typing.get_type_hints(kind, include_extras=True), {f.name: f for f in dataclasses.fields(kind)}
    listed, where = one_line(", ".join(sorted(known)), _LISTED), key or kind.__name__
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be a mapping with {listed}, got {shown(value)}")
    if unknown := sorted(map(str, set(value) - set(known))):
        raise UsageError(f"unknown fields {_cut(str(unknown))} for {where}; known: {listed}")
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and f.init]
    if missing := sorted(set(needed) - set(value)):
        raise UsageError(f"missing fields {one_line(missing, _LISTED)} for {where}")
    return kind(**{name: read(_join(key, name), hints[name], item) for name, item in value.items()})


def check_known(where: str, found: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check those of the keys in `hints` that a stranger's mapping has; the rest of it is not looked at.

    Raises:
        UsageError: a value that is not of its type; None is for want of one.
    """
    for key, hint in hints.items():
        if found.get(key) is not None:
            read(_join(where, key), hint, found[key])


def expected(hint: Any) -> str:
    """Return in words what a value of the type may be, such as `a number or auto`."""
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if origin in _UNIONS:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        words = [", ".join(words_of(kind)) or expected(kind) for kind in kinds]
        return expected(kinds[0]) if len(kinds) == 1 else " or ".join(words)
    return _NAMES.get(hint, "a list" if origin in _LISTS else "a mapping")


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words that a value of the type may be: those of a Literal, or of one in a union with another type."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in _UNIONS:
        return tuple(word for other in typing.get_args(hint) for word in words_of(other))
    return ()


def to_text(value: Any) -> str:
    """Return a plain value as `read` with `text` reads it again."""
    if isinstance(value, list | tuple):
        return ",".join(map(to_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _read_union(key: str, hint: Any, value: Any, text: bool) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if type(None) in typing.get_args(hint) and (value is None or (text and value.lower() == "none")):
        return None
    if len(kinds) == 1:
        return read(key, kinds[0], value, text=text)
    # a word is a word before it is a text
    for kind in sorted(kinds, key=lambda kind: not words_of(kind)):
        try:
            return read(key, kind, value, text=text)
        except UsageError as error:
            # the list or mapping that it should be, with something wrong in it
            if not str(error).startswith(f"{key} must"):
                raise
    raise UsageError(f"{key} must be {expected(hint)}, got {shown(value)}")


def _intervals(hint: Any) -> list[Interval]:
    """Return the intervals that stand beside a type, or beside the types of a union."""
    if typing.get_origin(hint) in _UNIONS:
        return [interval for kind in typing.get_args(hint) for interval in _intervals(kind)]
    return [beside for beside in getattr(hint, "__metadata__", ()) if isinstance(beside, Interval)]


def _fits(hint: Any, value: Any) -> bool:
    # bool is an int to Python, and JSON has one kind of number; one that is none is of no use anywhere
    return (type(value) is hint or (hint is float and type(value) is int)) and (
        not isinstance(value, float) or math.isfinite(value)
    )


def _read_text(hint: Any, text: str) -> tuple[bool, Any]:
    if hint is bool:
        # every text but the empty one is true to bool
        return text.lower() in ("true", "false"), text.lower() == "true"
    try:
        return True, hint(text)
    except ValueError:
        return False, None


def shown(value: Any) -> str:
    """Return a wrong value as a message shows it, the first letters of a long one."""
    text = repr(value) if isinstance(value, str) else ascii(value)
    return _cut(text)


def _join(key: str, name: str) -> str:
    return f"{key}.{_cut(name)}" if key else _cut(name)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
