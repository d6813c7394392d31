"""The defenses, triggers and attacks that there are: hfdetox's own, and what other packages add.

A built-in member is a class with a name in a module of its room. Another package names its class in an entry point of
the group `hfdetox.defenses`, `hfdetox.triggers` or `hfdetox.attacks`, under the name of the member:

    [project.entry-points."hfdetox.defenses"]
    shrink = "my_package:ShrinkConfig"

It is imported when it is asked for by name, or when all members are listed, and by nothing else.
"""

import importlib
import logging
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hfdetox.errors import UsageError
from hfdetox.values import words_of

logger = logging.getLogger(__name__)

Member = TypeVar("Member")


@dataclass(frozen=True)
class Entry(Generic[Member]):
    """One member as `hfdetox list` shows it.

    Attributes:
        member: the class.
        package: the name and version of the package that brings it, None for hfdetox's own.
        parameters: the default of every setting, by the name that `--set` and specifications know it under.
        words: the words that a setting may be, where it may be words.
    """

    member: type[Member]
    package: str | None
    parameters: dict[str, Any]
    words: dict[str, tuple[str, ...]]


class Registry(Mapping[str, type[Member]]):
    """The members of one room by name, hfdetox's own first.

    A name is loaded when it is asked for, and what is wrong with it is a UsageError then. Who goes through all of them
    gets those that can be used, and one warning for each of the others.
    """

    def __init__(self, room: str, base: type[Any], key: str) -> None:
        """Make the registry of `hfdetox.ROOM`: of the subclasses of `base` that have the class attribute `key`."""
        self.room, self.base, self.key = f"hfdetox.{room}", base, key
        self._what = room.removesuffix("s")
        self._warned: set[str] = set()

    @cached_property
    def builtin(self) -> dict[str, type[Member]]:
        """hfdetox's own members."""
        path = importlib.import_module(self.room).__path__
        modules = [importlib.import_module(f"{self.room}.{found.name}") for found in pkgutil.iter_modules(path)]
        kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
        return {getattr(k, self.key): k for k in kinds if issubclass(k, self.base) and hasattr(k, self.key)}

    @cached_property
    def offered(self) -> dict[str, list[EntryPoint]]:
        """What other packages offer, by name; nothing of it is imported yet."""
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.room), key=_source):
            found.setdefault(point.name, []).append(point)
        return found

    def __getitem__(self, name: str) -> type[Member]:
        if name not in self.builtin:
            return self._load(*self.offered[name])
        for point in self.offered.get(name, ()):
            self._warn(f"{self._offer(point)}; hfdetox has one of that name itself, and uses its own")
        return self.builtin[name]

    def __iter__(self) -> Iterator[str]:
        for name in dict.fromkeys([*self.builtin, *self.offered]):
            try:
                self[name]
            except UsageError as error:
                self._warn(f"{error}; it is left out")
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in self.offered

    def entries(self) -> dict[str, Entry[Member]]:
        """Return what there is to say about every member, in alphabetical order."""
        return {name: _describe(self[name], self._package(name)) for name in sorted(self)}

    def holds(self, kind: type[Member]) -> bool:
        """Tell whether a class is the member of its name, and not a class of the caller's that nobody has registered.

        Raises:
            UsageError: it has no name, or that of another class.
        """
        name = getattr(kind, self.key, None)
        if not isinstance(name, str) or not name:
            raise UsageError(f"{kind.__qualname__} has no name: give the class the attribute `{self.key}`, a text")
        known = self.get(name)
        if known not in (None, kind):
            raise UsageError(f"{kind.__qualname__} calls itself {name!r}, which is the name of another {self._what}; "
                             f"give the class a `{self.key}` of its own")  # fmt: skip
        return known is not None

    def _package(self, name: str) -> str | None:
        return None if name in self.builtin else _source(self.offered[name][0])

    def _load(self, point: EntryPoint, *others: EntryPoint) -> type[Member]:
        if others:
            also = " and ".join(map(_source, others))
            raise UsageError(f"{self._offer(point)}, and so does {also}: keep one of them installed")
        try:
            kind = point.load()
            if isinstance(kind, type) and issubclass(kind, self.base) and getattr(kind, self.key, None) == point.name:
                _describe(kind, None)
                return kind
        # a stranger's module may raise anything, or be a script that ends the process
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"{self._offer(point)}, which cannot be loaded ({reason})") from error
        raise UsageError(f"{self._offer(point)}, which is no {self.base.__name__} with the {self.key} {point.name!r}")

    def _offer(self, point: EntryPoint) -> str:
        return (f"{_source(point)} offers the {self._what} {point.name!r} (entry point {self.room}: {point.name} = "
                f"{point.value})")  # fmt: skip

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)


def _source(point: EntryPoint) -> str:
    """Return the package an entry point is of, with its version."""
    return f"the package {point.dist.name} {point.dist.version}" if point.dist is not None else "a package"


def _describe(kind: type[Member], package: str | None) -> Entry[Member]:
    if not getattr(kind, "presets", True):
        raise ValueError("it has no presets")
    settings = [f for f in fields(typing.cast(Any, kind)) if "tensor" not in f.metadata]
    hints = typing.get_type_hints(kind)
    return Entry(
        kind, package,
        {f.name.rstrip("_"): None if f.default is MISSING else f.default for f in settings},
        {f.name.rstrip("_"): words for f in settings if (words := words_of(hints[f.name]))},
    )  # fmt: skip
