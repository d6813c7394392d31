"""Directives that write the reference from the program itself, so that no page can be behind it.

:::{hfdetox-command} detox        the options of a command, from the Typer app
:::{hfdetox-members} defenses     the members of a family with presets and settings, as `hfdetox list` has them
:::{hfdetox-schema} detox         the fields of a report, from its dataclasses
:::{hfdetox-statuses}             the exit statuses, from the errors
:::{hfdetox-rooms}                the rooms, from the contract of import-linter and their docstrings
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
import types
import typing
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hfdetox import errors
from hfdetox.cli.app import INTERRUPTED, app


def text(value: str) -> str:
    """Return plain text for a cell of a Markdown table: one line in which only `code` is syntax."""
    parts = " ".join(value.split()).replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else re.sub(r"([<*\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def code(value: object) -> str:
    """Return a value as code in a cell of a table."""
    return "`" + " ".join(str(value).split()).replace("|", "\\|") + "`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, with empty lines around it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return ["", *lines, ""]


class Generated(SphinxDirective):
    """A directive whose content is Markdown that `lines` gives for its argument."""

    optional_arguments = 1

    @abstractmethod
    def lines(self, name: str) -> Iterator[str]:
        """Give the lines of Markdown."""

    def run(self) -> list[nodes.Node]:
        """Parse the lines where the directive stands."""
        found = [line for part in self.lines(*self.arguments) for line in part.splitlines() or [""]]
        node = nodes.container()
        self.state.nested_parse(StringList(found, source="generated"), 0, node, match_titles=True)
        return node.children


class Command(Generated):
    """Usage, help and options of one command."""

    def lines(self, name: str) -> Iterator[str]:
        [command] = [c for c in app.registered_commands if (c.name or c.callback.__name__) == name]
        panels: dict[str, list[Option]] = {"Arguments": []}
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
            if (option := Option.of(parameter)) is not None:
                panels.setdefault(option.panel, []).append(option)
        usage = " ".join(["hfdetox", name, *(option.metavar for option in panels["Arguments"]), "[OPTIONS]"])
        yield from ["```text", usage, "```", "", inspect.cleandoc(command.callback.__doc__ or ""), ""]
        for panel, options in panels.items():
            if options:
                yield f"**{panel}**"
                yield from table(
                    ["argument" if panel == "Arguments" else "option", "", "default"],
                    (option.cells() for option in options),
                )


@dataclasses.dataclass
class Option:
    """An argument or option of a command, as its function declares it to Typer."""

    names: Sequence[str]
    metavar: str
    help: str
    default: str
    panel: str

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Option | None:
        """Return what `Annotated[type, typer.Option(…)]` says; None for a parameter that is Typer's own."""
        if typing.get_origin(parameter.annotation) is not typing.Annotated:
            return None
        hint, info = typing.get_args(parameter.annotation)[:2]
        argument = isinstance(info, typer.models.ArgumentInfo)
        metavar = info.metavar or _metavar(hint)
        # what Typer is given first counts as a default until it sees that it is a name
        names = [] if argument else [name for name in (info.default, *(info.param_decls or ())) if _is_name(name)]
        default = info.show_default if isinstance(info.show_default, str) else _plain(parameter.default)
        if argument:
            default, metavar = "", info.metavar or parameter.name.upper()
        panel = "Arguments" if argument else info.rich_help_panel or "Options"
        return cls(names, metavar, info.help or "", default, panel)

    def cells(self) -> list[str]:
        """Return the option's row: how it is spelt, its help, and its default."""
        spelt = ", ".join(code(f"{name} {self.metavar}".strip()) for name in self.names) or code(self.metavar)
        return [spelt, text(self.help), text(self.default)]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("-")


def _metavar(hint: Any) -> str:
    """Return what stands behind an option: nothing for a switch, the words, or what it is."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not types.NoneType]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(arguments)
    if arguments:
        return _metavar(arguments[0])
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")


def _plain(value: Any) -> str:
    plain = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    return str(value) if plain and value is not inspect.Parameter.empty else ""


class Members(Generated):
    """The members of a family: summary, presets, settings with their defaults and what their docstring says."""

    def lines(self, name: str) -> Iterator[str]:
        room = "hfdetox.evidence.base" if name == "scores" else f"hfdetox.{name}"
        registry = getattr(importlib.import_module(room), name.upper())
        for key, entry in registry.entries().items():
            told = attributes(entry.member)
            yield from ["", f"## {code(key)}", "", getattr(self, f"_{name}")(entry.member), ""]
            rows = [
                [code(setting), self._told(told.get(setting, ""), entry.words.get(setting, ())), self._value(default)]
                for setting, default in entry.parameters.items()
            ]
            if rows:
                yield from table(["setting", "", "default"], rows)

    def _told(self, told: str, words: Sequence[str]) -> str:
        """Return what a docstring says of a setting, and the words it may be unless they are in there."""
        missing = not all(f"`{word}`" in told for word in words)
        return text(told) + (f" One of {', '.join(map(code, words))}." if missing else "")

    def _value(self, default: Any) -> str:
        return code(",".join(map(str, default)) if isinstance(default, tuple) else default)

    def _defenses(self, member: Any) -> str:
        needs = f"Needs {text(member.data)}; its cost, relative to plain fine-tuning: {text(member.cost)}."
        lines = [f"{_sentence(member.summary)} From {text(member.paper)}. {needs}", ""]
        for preset, values in member.presets.items():
            changes = ", ".join(code(f"{key.rstrip('_')}={value}") for key, value in values.items())
            lines.append(
                f"- {code(f'{member.name}:{preset}')} {f'sets {changes}' if changes else 'is the defaults below'}"
            )
        return "\n".join(lines)

    def _triggers(self, member: Any) -> str:
        return f"{_sentence(member.summary)} From {text(member.paper)}."

    def _scores(self, member: Any) -> str:
        needs = "clean images" if member.needs_images else "no images"
        when = {"both": "before and after cleaning"}.get(member.when, f"{member.when} cleaning")
        told = (
            f"{_sentence(member.summary)} From {text(member.paper)}. Needs {needs}; {when}; cost: {text(member.cost)}."
        )
        # indented lines are formulas
        return f"{told} Cost: {text(member.cost)}.\n\n{_prose(member)}"

    def _attacks(self, member: Any) -> str:
        return f"{_sentence(member.summary)} {_sentence(member.how)}"


def _sentence(value: str) -> str:
    value = text(value)
    return value[:1].upper() + value[1:].rstrip(".") + "."


def attributes(kind: type) -> dict[str, str]:
    """Return what the `Attributes:` of a class and its bases say, by name without a trailing underscore."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        lines = inspect.cleandoc(one.__dict__.get("__doc__") or "").splitlines()
        if "Attributes:" not in lines:
            continue
        name = ""
        for line in lines[lines.index("Attributes:") + 1 :]:
            if line and not line.startswith(" "):
                break
            if match := re.match(r"    ([\w, ]+): (.*)", line):
                name, rest = match[1], match[2]
                for each in name.split(", "):
                    found[each.rstrip("_")] = rest
            elif name:
                for each in name.split(", "):
                    found[each.rstrip("_")] += " " + line.strip()
    return found


class Schema(Generated):
    """The fields of a report, object by object."""

    def lines(self, name: str) -> Iterator[str]:
        from hfdetox.reporting.report import AttackReport, Report

        seen: list[type] = [{"detox": Report, "attack": AttackReport}[name]]
        for kind in seen:
            hints = typing.get_type_hints(kind)
            told = attributes(kind)
            rows = []
            for field in dataclasses.fields(kind):
                seen += [inner for inner in _dataclasses(hints[field.name]) if inner not in seen]
                rows.append([code(field.name), _type(hints[field.name]), text(told.get(field.name, ""))])
            width = 3 if told else 2
            yield from [f"### {kind.__name__}", "", _prose(kind), ""]
            yield from table(["field", "type", ""][:width], (row[:width] for row in rows))


def _prose(kind: type) -> str:
    """Return the docstring of a dataclass without its `Attributes:`."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:")[0].strip()


def _dataclasses(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [kind for argument in typing.get_args(hint) for kind in _dataclasses(argument)]


def _type(hint: Any) -> str:
    """Return a type as the JSON file has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    if origin is typing.Literal:
        return " or ".join(code(f'"{word}"') for word in arguments)
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        types.NoneType: "null",
        Any: "any",
    }
    return names.get(hint, code(hint))


class Statuses(Generated):
    """The exit statuses and the exceptions of the Python API behind them."""

    optional_arguments = 0

    def lines(self) -> Iterator[str]:
        kinds = (errors.RunError, errors.UsageError, errors.HubError)
        rows: list[list[str]] = [["0", "", "Done."]]
        rows += [[str(kind.exit_status), code(kind.__name__), text(inspect.getdoc(kind) or "")] for kind in kinds]
        rows.append(
            [str(INTERRUPTED), code("KeyboardInterrupt"), "Stopped by Ctrl-C; the last line says how to go on."]
        )
        yield from table(["exit status", "Python", "meaning"], rows)


class Rooms(Generated):
    """The rooms of the package from the top floor down, and what the docstring of each says."""

    optional_arguments = 0

    def lines(self) -> Iterator[str]:
        root = Path(__file__).parents[2]
        linter = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
        rows = []
        for layer in linter["contracts"][0]["layers"]:
            for name in (part.strip(" ()") for part in layer.split("|")):
                place = root / "hfdetox" / name
                file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                rows.append([code(f"{name}/" if place.is_dir() else f"{name}.py"), text(told.split("\n\n")[0])])
        yield from table(["room", "holds"], rows)


def setup(app: Sphinx) -> Mapping[str, Any]:
    """Register the directives."""
    for name, directive in {
        "command": Command,
        "members": Members,
        "schema": Schema,
        "statuses": Statuses,
        "rooms": Rooms,
    }.items():
        app.add_directive(f"hfdetox-{name}", directive)
    return {"parallel_read_safe": True}
