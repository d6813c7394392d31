"""The command line's options, made of the argument dataclasses: Typer gets types, defaults and help from them."""

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from hfdetox._version import __version__
from hfdetox.arguments import Option, Options, options_of
from hfdetox.bench.suite import read_plain
from hfdetox.config import NONE, PANELS, AttackOptions, DetoxOptions
from hfdetox.config_bench import BenchOptions, SuiteOptions
from hfdetox.documents import read_untyped
from hfdetox.errors import UsageError
from hfdetox.specs import read_pair
from hfdetox.values import read, to_text

_PREFIXES = ("hf_hub:", "hf-hub:", "timm-arch:")
# what a suite leaves to the command line
_WITH_SUITE = frozenset({"suite", "jobs", "dataset", "output", "precision", "device", "quiet", "as_json", "debug",
                         "dry_run"})  # fmt: skip

Kind = TypeVar("Kind", bound=Options)


class CommandLine:
    """What one command was given.

    Attributes:
        spelled: names of the options that are spelled out, not left at their default.
    """

    def __init__(self, kinds: Sequence[type[Options]], values: dict[str, Any], spelled: set[str]) -> None:
        self._values, self.spelled = values, spelled
        self.known = {name: one for kind in kinds for name, one in options_of(kind).items()}

    def options(self, kind: type[Kind]) -> Kind:
        """Return the options of one dataclass.

        Raises:
            UsageError: a text does not parse, or a value is out of its range.
        """
        hints = typing.get_type_hints(kind)
        values = {name: self._parsed(name, hints[name]) for name in options_of(kind) if name in self._values}
        return kind(**values)

    def flags(self, names: Sequence[str]) -> str:
        """Return options as they are typed, for a message."""
        return ", ".join("MODEL" if name == "model" else f"--{self.known[name].flag}" for name in names)

    def _parsed(self, name: str, hint: Any) -> Any:
        value, one = self._values[name], self.known[name]
        if name == "settings":
            return self._settings(value)
        if value is not None and _kinds(hint) == [int, float]:
            # what is no number at all, the option's own check calls so
            with contextlib.suppress(UsageError):
                return read(one.flag, hint, value, text=True)
        return _model_arguments(value) if _is(hint, Mapping) else value

    def _settings(self, texts: Sequence[str]) -> dict[str, str]:
        """Return `--set` and its short forms as one dict of texts; UsageError for a key that is given twice."""
        short = {one.sets: name for name, one in self.known.items() if one.sets}
        settings = {key: str(self._values[name]) for key, name in short.items() if self._values[name] is not None}
        for key, value in (read_pair("--set", text) for text in texts):
            if key in settings:
                flags = self.flags(sorted(short.values(), key=list(self.known).index))
                raise UsageError(f"the setting {key} is given twice: keep one ({flags} are --set too)")
            settings[key] = value
        return settings


def takes_line(*kinds: type[Options]) -> Callable[[Callable[[CommandLine], Any]], Callable[..., Any]]:
    """Give a command `f(line)` the fields of `kinds` as its Typer parameters, those of Python alone left out."""
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    found = [one for kind in kinds for one in _parameters(kind)]
    parameters += [parameter for _, parameter in sorted(found, key=lambda pair: pair[0])]

    def decorate(command: Callable[[CommandLine], Any]) -> Callable[..., Any]:
        def call(*, context: typer.Context, **values: Any) -> Any:
            sources = {name: context.get_parameter_source(name) for name in context.params}
            spelled = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
            return command(CommandLine(kinds, values, spelled))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def _parameters(kind: type[Options]) -> list[tuple[int, inspect.Parameter]]:
    """Return the Typer parameters of a dataclass, each with the place of its panel."""
    hints, options = typing.get_type_hints(kind), options_of(kind)
    found = []
    for one in fields(kind):
        said = options[one.name]
        if said.panel is None:
            continue
        default = [] if _is(hints[one.name], Sequence, Mapping) else one.default
        if isinstance(default, float) and _kinds(hints[one.name]) == [int, float]:
            default = to_text(default)
        shown = _info(one.name, said, one.default, positional=not one.kw_only)
        found.append((PANELS.index(said.panel), inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[_type(hints[one.name], said), shown],
        )))  # fmt: skip
    return found


def _info(name: str, said: Option, default: Any, *, positional: bool) -> Any:
    rest: dict[str, Any] = {"help": said.help, "metavar": said.metavar}
    if said.path in ("file", "folder"):
        rest |= {"exists": True, "file_okay": said.path == "file", "dir_okay": said.path == "folder"}
    if positional:
        return typer.Argument(**rest, show_default=False)
    if name == "version":
        rest |= {"is_eager": True, "callback": show_version}
    if said.shown:
        rest["show_default"] = said.shown
    flags = f"--{said.flag}/--no-{said.flag}" if default is True else f"--{said.flag}"
    return typer.Option(flags, **rest, min=said.least, rich_help_panel=said.panel)


def _type(hint: Any, said: Option) -> Any:
    """Return what Typer reads an option as: text, where it is parsed afterwards."""
    if _is(hint, Sequence, Mapping):
        return list[str]
    kinds = _kinds(hint)
    one = Path if said.path else kinds[0] if len(kinds) == 1 else str
    return one | None if type(None) in typing.get_args(hint) or hint is Any else one


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a value may have besides None; an object that only Python can give is one too."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return [str if hint is Any else hint]
    return [kind for kind in typing.get_args(hint) if kind is not type(None)]


def _is(hint: Any, *bases: type[Any]) -> bool:
    return any(typing.get_origin(kind) in bases for kind in _kinds(hint))


def _model_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` texts as a dict; a value is a number, true or false, a list or a text, as JSON or YAML has it.

    Raises:
        UsageError: not KEY=VALUE, a key given twice, or a value that is none of these.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, value = read_pair("--model-arg", text)
        if not key.isidentifier():
            raise UsageError(f"--model-arg {text!r} is not KEY=VALUE")
        if key in arguments:
            raise UsageError(f"--model-arg {key} is given twice")
        arguments[key] = read_untyped(f"--model-arg {text!r}", value)
    return arguments


def show_version(wanted: bool) -> None:
    """Print the version and stop, when `wanted`."""
    if wanted:
        typer.echo(f"hfdetox {__version__}")
        raise typer.Exit


def detox_options(line: CommandLine) -> DetoxOptions:
    """Return the arguments of `detoxify`; without `--output` the result goes beside, named after the model.

    Raises:
        UsageError: the options contradict each other or do not parse.
    """
    options = line.options(DetoxOptions)
    if options.resume is not None:
        anew = sorted(name for name in line.spelled if name != "model" and not line.known[name].anew)
        if anew:
            raise UsageError(
                f"--resume goes on with the options recorded in {options.resume}: leave out {line.flags(anew)}"
            )
        return options
    options.check()
    return options if options.output else replace(options, output=default_output(str(options.model)))


def run_folder(options: DetoxOptions) -> Path | None:
    """Return where a run keeps its checkpoints (`OUTPUT.run/`)."""
    if options.resume is not None:
        return Path(options.resume)
    return Path(options.output).with_name(f"{Path(options.output).name}.run") if options.output else None


def attack_options(line: CommandLine) -> AttackOptions:
    """Return the arguments of `implant`; without `--output` the result goes beside, named after the model."""
    options = line.options(AttackOptions)
    options.check()
    if options.output:
        return options
    suffix = "-clean" if list(options.triggers) == [NONE] else "-backdoored"
    return replace(options, output=default_output(str(options.model), suffix))


def suite_options(line: CommandLine) -> SuiteOptions:
    """Return the arguments of `run_suite`; UsageError for options that a suite decides by itself."""
    wrong = sorted(line.spelled - _WITH_SUITE)
    if wrong:
        raise UsageError(f"--suite says itself what is built: leave out {line.flags(wrong)}")
    options = line.options(SuiteOptions)
    read_plain(options.suite or Path())
    if options.output is None:
        raise UsageError("--suite builds a folder of models: name it with --output")
    return options


def bench_options(line: CommandLine) -> BenchOptions:
    """Return the arguments of `run_bench`; UsageError without a suite that can be read."""
    options = line.options(BenchOptions)
    if options.suite is None:
        raise UsageError("SUITE is missing: name a suite file (see hfdetox bench --help)")
    # what is wrong with these is said before the libraries are loaded
    read_plain(options.suite)
    output = options.output or Path(f"{options.suite.stem}-bench")
    for path in (output, *output.parents):
        if path.is_file():
            raise UsageError(f"--output {output}: {path} is a file; name a folder for the bench")
    return replace(options, output=output)


def default_output(model: str, suffix: str = "-detoxed") -> Path:
    """Return the folder that a run writes when `--output` is not given: the model's last name with `suffix`."""
    if Path(model).is_dir():
        return Path(f"{Path(model).resolve().name}{suffix}")
    for prefix in _PREFIXES:
        model = model.removeprefix(prefix)
    return Path(f"{model.partition('@')[0].rstrip('/').rpartition('/')[2]}{suffix}")
