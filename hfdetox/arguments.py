"""What an option is, and how a dataclass of options becomes the arguments of a function and a record of a run."""

from __future__ import annotations

import functools
import inspect
import json
import numbers
import textwrap
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

from hfdetox.errors import UsageError
from hfdetox.values import shown, to_text

Arguments = ParamSpec("Arguments")
Given = TypeVar("Given", bound="Options")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Option:
    """What there is to say of an option besides its name, type and default.

    Attributes:
        panel: one of PANELS; None for what only Python can give (an object).
        help: one line, as the command line shows it.
        more: what Python's documentation says besides.
        flag: the long option without dashes, where it is not the field's name.
        metavar: what the help calls the value.
        shown: what the help shows as the default, where that is not the default's text.
        least: the smallest number that may be given.
        check: called with the flag and the value; raises UsageError.
        path: `file` or `folder` that must exist, or `new`; the command line then gives a `Path`.
        was: the argument's name in Python until this release.
        anew: it may be said anew when a run is resumed, and is no part of the command that repeats the run.
        sets: the setting that it is short for.
    """

    panel: str | None
    help: str
    more: str = ""
    flag: str = ""
    metavar: str | None = None
    shown: str | None = None
    least: int | None = None
    check: Callable[[str, Any], None] | None = None
    path: Literal["", "file", "folder", "new"] = ""
    was: str = ""
    anew: bool = False
    sets: str = ""


def about(panel: str | None, help: str, **rest: Any) -> dict[str, Option]:
    """Return the metadata of a dataclass field that is an option; the keyword arguments are the fields of `Option`."""
    return {"option": Option(panel, help, **rest)}


def option(default: Any, panel: str | None, help: str, **rest: Any) -> Any:
    """Return a dataclass field that is an option, see `about`."""
    return field(default=default, metadata=about(panel, help, **rest))


def options_of(kind: type[Any] | Options) -> dict[str, Option]:
    """Return the options of a dataclass by the field's name; a `flag` is never empty."""
    found = {one.name: one.metadata["option"] for one in fields(kind) if "option" in one.metadata}
    return {name: replace(one, flag=one.flag or name.replace("_", "-")) for name, one in found.items()}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that check themselves: each by its own rule when they are made, together by `check`."""

    def __post_init__(self) -> None:
        for name, one in options_of(self).items():
            value = getattr(self, name)
            if value is not None and one.least is not None:
                if not isinstance(value, numbers.Integral):
                    raise UsageError(f"--{one.flag} must be a whole number, got {value!r}")
                if not one.least <= int(value) < 2**63:
                    most = "" if value < one.least else " and below 2^63"
                    raise UsageError(f"--{one.flag} must be at least {one.least}{most}, got {shown(value)}")
            if value is not None and one.check is not None:
                one.check(f"--{one.flag}", value)
            if isinstance(value, str | Path) and not _can_be_a_name(str(value)):
                raise UsageError(f"--{one.flag} {shown(str(value))}: no file and no repository can be called that")
            if isinstance(value, str) and not value.strip():
                raise UsageError(f"--{one.flag} is empty: give it a value, or leave it out")

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""

    def record(self) -> dict[str, Any]:
        """Return the options as plain JSON types, as `run.json` keeps them; what only Python can give is left out.

        A trigger is its specification; None stands for other objects.
        """
        hidden = {name for name, one in options_of(self).items() if one.panel is None}
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self) if one.name not in hidden}

    def plain(self) -> Self:
        """Return the options without objects."""
        return type(self)(**self.record())

    def changed(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, by name."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}


def takes(kind: Callable[Arguments, Given]) -> Callable[[Callable[[Given], Result]], Callable[Arguments, Result]]:
    """Give a function of one dataclass of options the dataclass's fields as its arguments.

    Its signature has their names, types and defaults, and `{arguments}` in its docstring becomes what they mean. Old
    names work for one release, with a FutureWarning.
    """
    options, hints = options_of(typing.cast(Any, kind)), typing.get_type_hints(kind)
    parameters = [p.replace(annotation=hints[name]) for name, p in inspect.signature(kind).parameters.items()]
    old = {one.was: name for name, one in options.items() if one.was}

    def decorate(function: Callable[[Given], Result]) -> Callable[Arguments, Result]:
        signature = inspect.Signature(parameters, return_annotation=typing.get_type_hints(function)["return"])

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            given = renamed(kwargs, old)
            try:
                signature.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            made = typing.cast(Any, kind)(*args, **given)
            made.check()
            return function(made)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": signature.return_annotation}
        call.__doc__ = _documented(function.__doc__ or "", options)
        return call

    return decorate


def renames(**old: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a function's arguments be given under their old names (`old=new`) for one release, with a FutureWarning."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return typing.cast(Any, function)(*args, **renamed(kwargs, old))

        return call

    return decorate


def renamed(given: Mapping[str, Any], old: Mapping[str, str]) -> dict[str, Any]:
    """Return keyword arguments under their new names.

    Args:
        old: the new name of each old one; a FutureWarning says it.

    Raises:
        TypeError: an argument is there under both names.
    """
    found = dict(given)
    for was, name in old.items():
        if was in found:
            if name in found:
                raise TypeError(f"{was}= is the old name of {name}=: give one of them")
            # of whoever calls the function
            warnings.warn(
                f"{was}= is now {name}=; the old name goes with the next release", FutureWarning, stacklevel=3
            )
            found[name] = found.pop(was)
    return found


def argv(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command: None is left out, True is its option, False its negation.

    A list or mapping repeats it.
    """
    words = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            value = [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is True or item is False:
                words.append(f"--{name}" if item else f"--no-{name}")
            elif item is not None:
                words += [f"--{name}", to_text(item)]
    return words


def _documented(text: str, options: Mapping[str, Option]) -> str:
    lines = [f"{name}: {one.help} {one.more}".rstrip() for name, one in options.items()]
    wrapped = [textwrap.fill(line, 108, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines]
    return text.replace("        {arguments}", "\n".join(wrapped))


def _can_be_a_name(text: str) -> bool:
    """Tell whether a file may be called that: text, no part too long even with the endings that outputs get."""
    try:
        parts = text.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in text and len(text) < 3000 and max(map(len, parts)) < 220


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.recorded() if hasattr(value, "recorded") else None
