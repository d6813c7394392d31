"""The command line's options as dataclasses: Typer's parameters and the Python functions' arguments come from them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hfdetox._version import __version__
from hfdetox.errors import UsageError
from hfdetox.values import read_pair

# a first word that is none of these is a model
COMMANDS = ("attack", "bench", "demo", "detox", "evaluate", "push", "list")
# chosen by examples/d3_heldout.yaml, whose models it was not made on
DEFAULT_DEFENSE = "d3:auto"
# what a resumed run may be told anew; everything else is the recorded run's
RESUMABLE = frozenset(
    {"model", "resume", "push_to", "private", "create_pr", "overwrite", "keep_run", "log_with"}
    | {"quiet", "as_json", "debug"}
)
# what a dry run needs to know; the rest decides how the work is done
_PLANNED = frozenset(
    {"dataset", "defense", "settings", "triggers", "samples", "eval_samples", "revision", "dataset_revision", "output"}
    | {"push_to", "private", "create_pr", "overwrite", "device", "precision"}
)
_SHORT_SETTINGS = {"epochs": "epochs", "lr": "learning_rate", "batch_size": "batch_size", "reweight": "reweight"}
_PREFIXES = ("hf_hub:", "hf-hub:", "timm-arch:")


def option(*names: str, panel: str, help: str, **rest: Any) -> Any:
    """Return a Typer option with its help, shown in the panel `panel`."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


def show_version(wanted: bool) -> None:
    """Print the version and stop, when `wanted`."""
    if wanted:
        typer.echo(f"hfdetox {__version__}")
        raise typer.Exit


on_images = functools.partial(option, panel="Images")
on_defense = functools.partial(option, panel="Defense")
on_measuring = functools.partial(option, panel="Measuring")
on_run = functools.partial(option, panel="Run")
on_hub = functools.partial(option, panel="Output and Hub")


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions:
    """What is printed, and where."""

    quiet: Annotated[bool, on_run("--quiet", help="Print warnings and errors only.")] = False
    as_json: Annotated[bool, on_run("--json", help="Print the result as JSON and nothing else on standard output.")] = (
        False
    )
    debug: Annotated[bool, on_run("--debug", help="Show the traceback of an error.")] = False
    version: Annotated[
        bool, on_run("--version", help="Print the version and stop.", is_eager=True, callback=show_version)
    ] = False


@dataclass(frozen=True, kw_only=True)
class DataOptions(ConsoleOptions):
    """The model, the images and the known triggers; shared by `detox` and `evaluate`."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A Hub id, a timm id (hf_hub:… or timm/…), or a local folder.", show_default=False
        ),
    ] = None
    dataset: Annotated[
        str | None,
        on_images("--dataset", help="Clean images: a Hub id or a local folder; else what the model's card names."),
    ] = None
    config: Annotated[str | None, on_images("--config", help="The dataset's configuration.")] = None
    split: Annotated[str | None, on_images("--split", help="Split of the defense's images.")] = None
    eval_split: Annotated[str | None, on_images("--eval-split", help="Split that is measured.")] = None
    image_column: Annotated[str | None, on_images("--image-column", help="The column of the images.")] = None
    label_column: Annotated[str | None, on_images("--label-column", help="The column of the labels.")] = None
    eval_samples: Annotated[int | None, on_images("--eval-samples", min=1, help="Measure on so many images.")] = None
    label_map: Annotated[
        Path | None,
        on_images(
            "--label-map",
            exists=True,
            dir_okay=False,
            help="JSON or YAML file: the dataset's label names to the model's.",
        ),
    ] = None
    dataset_revision: Annotated[str | None, on_images("--dataset-revision", help="The dataset's commit or branch.")] = (
        None
    )
    allow_missing_classes: Annotated[
        bool, on_images("--allow-missing-classes", help="Go on without images of some classes.")
    ] = False
    triggers: Annotated[
        list[str],
        on_measuring(
            "--trigger", metavar="SPEC", help="A known trigger, NAME:key=value,… or a trigger file; repeatable."
        ),
    ] = field(default_factory=list)
    target: Annotated[
        str | None,
        on_measuring(
            "--target", metavar="LABEL", help="Label or all-to-all, for triggers that name none (else label 0)."
        ),
    ] = None
    seed: Annotated[int, on_run("--seed", min=0, help="Seed of everything random.")] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], on_run("--device", help="Where to run.")] = "auto"
    revision: Annotated[str | None, on_hub("--revision", help="The model's commit or branch.")] = None
    trust_remote_code: Annotated[
        bool, on_hub("--trust-remote-code", help="Run the Python code that the model's repository brings.")
    ] = False

    def data_arguments(self) -> dict[str, Any]:
        """Return these options as the keyword arguments that `detoxify` and `evaluate` share."""
        names = {f.name for f in dataclasses.fields(DataOptions)} - {f.name for f in dataclasses.fields(ConsoleOptions)}
        return {name: getattr(self, name) for name in sorted(names - {"model"})}


@dataclass(frozen=True, kw_only=True)
class DetoxOptions(DataOptions):
    """The options of `hfdetox MODEL`."""

    samples: Annotated[
        str,
        on_images(
            "--samples", metavar="N|FRACTION", help="Clean images of the defense: a fraction with a point, or a count."
        ),
    ] = "0.05"
    defense: Annotated[str, on_defense("--defense", metavar="NAME[:PRESET]", help="See `hfdetox list defenses`.")] = (
        DEFAULT_DEFENSE
    )
    settings: Annotated[
        list[str], on_defense("--set", metavar="KEY=VALUE", help="One of the defense's own settings; repeatable.")
    ] = field(default_factory=list)
    epochs: Annotated[int | None, on_defense("--epochs", min=1, help="Short for --set epochs=N.")] = None
    lr: Annotated[float | None, on_defense("--lr", help="Short for --set learning_rate=X.")] = None
    batch_size: Annotated[int | None, on_defense("--batch-size", min=1, help="Short for --set batch_size=N.")] = None
    reweight: Annotated[
        str | None,
        on_defense(
            "--reweight",
            metavar="none|class|wasserstein",
            help="Short for --set reweight=…: weigh images so that no class's accuracy pays for the defense.",
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"], on_run("--precision", help="Mixed precision of the training.")
    ] = "auto"
    log_with: Annotated[
        Literal["tensorboard", "trackio", "wandb"] | None, on_run("--log-with", help="Tracker of the training.")
    ] = None
    resume: Annotated[
        Path | None,
        on_run("--resume", exists=True, file_okay=False, help="Go on with the run in this folder (OUTPUT.run)."),
    ] = None
    keep_run: Annotated[bool, on_run("--keep-run", help="Keep the run folder after success.")] = False
    dry_run: Annotated[bool, on_run("--dry-run", help="Say what would be pulled, chosen and pushed, and stop.")] = False
    output: Annotated[
        Path | None, on_hub("--output", help="Folder of the result.", show_default="MODEL's name with -detoxed")
    ] = None
    push_to: Annotated[str | None, on_hub("--push-to", metavar="REPO", help="Publish the result there.")] = None
    private: Annotated[bool, on_hub("--private", help="Make a new repository private.")] = False
    create_pr: Annotated[bool, on_hub("--create-pr", help="Open a pull request on the existing repository.")] = False
    overwrite: Annotated[
        bool,
        on_hub("--overwrite", help="Replace an earlier result in --output, and a repository hfdetox did not make."),
    ] = False

    def arguments(self, given: Iterable[str]) -> dict[str, Any]:
        """Return the keyword arguments of `detoxify` and `plan`, the model left out.

        Args:
            given: names of the options that the command line spells out.

        Raises:
            UsageError: the options contradict each other or do not parse.
        """
        push = {name: getattr(self, name) for name in ("push_to", "private", "create_pr", "overwrite")}
        kept = {**push, "resume": self.resume, "keep_run": self.keep_run, "log_with": self.log_with}
        if self.resume is not None:
            anew = sorted(set(given) - RESUMABLE)
            if anew:
                spelt = ", ".join(f"--{flag_of(name)}" for name in anew)
                raise UsageError(f"--resume goes on with the options recorded in {self.resume}: leave out {spelt}")
            return kept
        if self.model is None:
            raise UsageError("MODEL is missing: name a Hub id or a local folder (see hfdetox --help)")
        if self.push_to is None and (self.private or self.create_pr):
            raise UsageError("--private and --create-pr say how to publish: name the repository with --push-to")
        return {
            **self.data_arguments(),
            **kept,
            "samples": parse_samples(self.samples),
            "defense": self.defense,
            "settings": given_settings(self),
            "precision": self.precision,
            "output": self.output or default_output(self.model),
        }

    def run_folder(self) -> Path | None:
        """Return where this run keeps its checkpoints (see design: `OUTPUT.run/`), None without a model."""
        if self.resume is not None:
            return self.resume
        if self.model is None:
            return None
        output = self.output or default_output(self.model)
        return output.with_name(f"{output.name}.run")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """The options of `hfdetox evaluate MODEL`."""

    gallery: Annotated[
        Path | None,
        on_hub("--gallery", metavar="FILE.png", help="Draw each trigger on a few images, with the model's answers."),
    ] = None


def planned_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `detoxify`'s arguments that `plan` takes."""
    return {name: value for name, value in arguments.items() if name in _PLANNED}


def flag_of(name: str) -> str:
    """Return the long option (without dashes) of a field's name."""
    return {"triggers": "trigger", "settings": "set", "as_json": "json", "model_args": "model-arg"}.get(
        name, name.replace("_", "-")
    )


def given_settings(options: Any) -> dict[str, str]:
    """Return `--set` and its short forms as one dict of texts; UsageError for a key that is given twice."""
    # an attack has no weights to choose
    short = {key: getattr(options, name, None) for name, key in _SHORT_SETTINGS.items()}
    settings = {key: str(value) for key, value in short.items() if value is not None}
    for key, value in (read_pair("--set", text) for text in options.settings):
        if key in settings:
            raise UsageError(
                f"the setting {key} is given twice: keep one (--epochs, --lr, --batch-size, --reweight are --set too)"
            )
        settings[key] = value
    return settings


def parse_samples(text: str) -> int | float:
    """Return a count of images (int, at least 1) or, with a point, a fraction (float in (0, 1]); else UsageError."""
    try:
        number = float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(f"--samples {text!r} is neither a count such as 500 nor a fraction such as 0.05") from None
    if isinstance(number, float) and not (math.isfinite(number) and 0 < number <= 1):
        raise UsageError(f"--samples {text} is not a fraction above 0 and up to 1.0; a count has no point")
    if number < 1 and isinstance(number, int):
        raise UsageError(f"--samples {text} leaves no images: give a count of at least 1, or a fraction such as 0.05")
    return number


def default_output(model: str, suffix: str = "-detoxed") -> Path:
    """Return the folder that a run writes when `--output` is not given: the model's last name with `suffix`."""
    if Path(model).is_dir():
        return Path(f"{Path(model).resolve().name}{suffix}")
    for prefix in _PREFIXES:
        model = model.removeprefix(prefix)
    return Path(f"{model.partition('@')[0].rstrip('/').rpartition('/')[2]}{suffix}")


def takes(kind: type[ConsoleOptions]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `f(context, options)` the fields of `kind` as its Typer parameters."""
    hints = typing.get_type_hints(kind, include_extras=True)
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for one in dataclasses.fields(kind):
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        parameters.append(
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name])
        )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def call(*, context: typer.Context, **values: Any) -> Any:
            return command(context, kind(**values))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def given_options(context: typer.Context) -> set[str]:
    """Return the names of the options that the command line spells out (not those left at their default)."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
