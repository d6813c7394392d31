"""A run: its options, and the folder `OUTPUT.run/` that lets a stopped one go on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from hfdetox.config import COMMANDS, DEFAULT_DEFENSE
from hfdetox.defenses import DEFENSES
from hfdetox.errors import RunError, UsageError
from hfdetox.files import REPORT_NAMES, replace_folder, write_atomically
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.triggers import TRIGGERS, Trigger
from hfdetox.values import read_fields

RUN_FILE = "run.json"
PUBLISHING = ("private", "create_pr", "overwrite")
_NOT_IN_COMMAND = ("model", "push_to", "original_command", "public", "i_know_this_is_backdoored", *PUBLISHING)
_FLAGS = {"triggers": "--trigger", "settings": "--set", "model_args": "--model-arg"}
_PLACES = ("model", "dataset", "label_map", "output")
_TRIGGERS = "triggers"
_HUB_PREFIX = re.compile("hf[_-]hub:")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ABC):
    """The model, the images and the triggers of a run, and where its result goes, as plain data.

    `model` and `dataset` are None for objects. A subclass adds what is done to the model.
    """

    model: str | None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    samples: int | float | None = None
    eval_samples: int | None = None
    label_map: str | None = None
    allow_missing_classes: bool = False
    triggers: list[str]
    target: str | None = None
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"
    revision: str | None = None
    dataset_revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    push_to: str | None = None
    create_pr: bool = False
    overwrite: bool = False

    def command(self) -> str:
        """Return the shell command that repeats the run, "" where objects took part, which no command can name.

        It is for publishing: of local paths only the last part is left; options at their defaults, and where the
        result is pushed, are left out.
        """
        # neither has a class of the caller's that no package offers
        kinds = {spec.partition(":")[0] for spec in self.triggers if not spec.endswith(".safetensors")} - {"none"}
        if self.model is None or self.dataset is None or not all(kind in TRIGGERS for kind in kinds):
            return ""
        shown = self._without_places()
        words = ["hfdetox", *shown.command_word(), str(shown.model)]
        for option in fields(self):
            value = getattr(shown, option.name)
            if option.name in _NOT_IN_COMMAND or value in (option.default, None, False, [], {}):
                continue
            flag = _FLAGS.get(option.name, "--" + option.name.replace("_", "-"))
            if value is True:
                words.append(flag)
            elif isinstance(value, dict):
                words += [word for key, item in value.items() for word in (flag, f"{key}={_text(item)}")]
            else:
                words += [
                    word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))
                ]
        return shlex.join(words)

    @abstractmethod
    def command_word(self) -> list[str]:
        """Return the words between `hfdetox` and the model."""

    def _without_places(self) -> Self:
        # only what the Hub has is pinned to a revision; an id that is also a folder's name stays an id then
        model = self.model if self.model is None or self.revision else last_part(self.model)
        dataset = self.dataset if self.dataset is None or self.dataset_revision else last_part(self.dataset)
        return replace(
            self, model=model, dataset=dataset,
            label_map=last_part(self.label_map) if self.label_map else None,
            output=f"./{Path(self.output).resolve().name}" if self.output else None,
            triggers=[
                last_part(spec) if spec.endswith(".safetensors")
                else re.sub("(?<==)[^,]*/[^,]*", lambda path: last_part(path[0]), spec)
                for spec in self.triggers
            ],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions(ImageOptions):
    """Everything that decides a cleaning run's result and where it goes, as plain data.

    `settings` are the defense's by the names and in the texts that `--set` takes. `typed` is the command of the run
    that these options resume, None at its start.
    """

    samples: int | float = 0.05
    defense: str = DEFAULT_DEFENSE
    settings: dict[str, str]
    private: bool = False
    original_command: str | None = None

    def publishing(self) -> dict[str, Any]:
        """Return how the result is published, as the keyword arguments of `push_to_hub`."""
        return {name: getattr(self, name) for name in PUBLISHING}

    def command(self) -> str:
        """Return the shell command that repeats the run: of a resumed one, that of its start."""
        if self.original_command is not None:
            return self.original_command
        return super().command() if self.defense.partition(":")[0] in DEFENSES else ""

    def command_word(self) -> list[str]:
        """Return `detox` where a model of that name would be taken for a command."""
        return ["detox"] if self.model in COMMANDS else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def last_part(text: str) -> str:
    """Return the name of a path that exists here, without where it lies; any other text as it is."""
    return f"./{Path(text).resolve().name}" if Path(text).exists() else text


class RunFolder:
    """`OUTPUT.run/`: the options of the run as `run.json`, its triggers as files, and the last checkpoint.

    Raises:
        UsageError: the folder is there and is not to be resumed, or is not a run.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path)

    @classmethod
    def beside(cls, output: str | Path) -> RunFolder:
        """Return the run folder that belongs to an output folder."""
        output = Path(output)
        return cls(output.with_name(output.name + ".run"))

    def refuse_existing(self) -> None:
        """Raise UsageError when a run is there already."""
        if self.path.exists():
            raise UsageError(
                f"{self.path} holds a run that did not finish: go on with {self.resume_command()}, or remove it to "
                "start again"
            )

    def resume_command(self) -> str:
        """Return the shell command that goes on with this run."""
        return shlex.join(["hfdetox", "--resume", str(self.path)])

    def begin(self, options: RunOptions, triggers: Sequence[Trigger]) -> None:
        """Create the folder and record the options, so that they mean the same in any working directory.

        The triggers are kept as files: pictures and targets with commas have no text form.
        """
        recorded = replace(
            options,
            original_command=options.command(),
            # with a commit, these are ids of the Hub
            model=options.model if options.revision else _absolute(options.model),
            dataset=options.dataset if options.dataset_revision else _absolute(options.dataset),
            label_map=_absolute(options.label_map),
            output=options.output and str(Path(options.output).absolute()),
            triggers=[f"{_TRIGGERS}/{trigger.name}.safetensors" for trigger in triggers],
        )
        try:
            (self.path / _TRIGGERS if triggers else self.path).mkdir(parents=True, exist_ok=True)
            for name, trigger in zip(recorded.triggers, triggers, strict=True):
                write_atomically(self.path / name, trigger.file_bytes())
            write_atomically(self.path / RUN_FILE, json.dumps(asdict(recorded), indent=2) + "\n")
        except OSError as error:
            raise RunError(f"cannot write the run folder {self.path}: {error.strerror or error}") from error

    def recorded(self) -> RunOptions:
        """Return the options the run began with; paths below the working directory are relative to it."""
        try:
            plain: dict[str, Any] = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            options: RunOptions = read_fields("", RunOptions, plain)
            places: dict[str, Any] = {name: _relative(getattr(options, name)) for name in _PLACES}
            return replace(options, **places, triggers=[str(self.path / name) for name in options.triggers])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.path} is not a run folder of this hfdetox ({error}); name the OUTPUT.run/ folder"
            ) from error

    def remove(self) -> None:
        """Delete the folder; called only after the result is safe."""
        shutil.rmtree(self.path, ignore_errors=True)


def _absolute(place: str | None) -> str | None:
    """Return a path that exists here as an absolute one; a Hub id as it is."""
    return str(Path(place).absolute()) if place is not None and Path(place).exists() else place


def _relative(place: str | None) -> str | None:
    # the report names these; where the working directory lies is nobody's business
    here = Path.cwd()
    return str(Path(place).relative_to(here)) if place is not None and Path(place).is_relative_to(here) else place


def same_model(given: str, recorded: str | None) -> bool:
    """Tell whether a model as it is typed is the one that a run recorded: the same folder, or the same Hub id."""
    if recorded is None or Path(given).is_dir() or Path(recorded).is_absolute():
        return recorded is not None and Path(given).resolve() == Path(recorded).resolve()
    ids = [_HUB_PREFIX.sub("", name, count=1).partition("@")[0] for name in (given, recorded)]
    return ids[0] == ids[1]


def log_folder(output: str | None) -> Path:
    """Return where a tracker that writes files writes them: beside the output, where they stay after the run."""
    return Path("hfdetox-logs") if output is None else Path(output).with_name(Path(output).name + ".logs")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError when `output` holds something that is not to be replaced.

    An empty folder is taken; with `overwrite` also one that hfdetox wrote.
    """
    if output.name in ("", ".."):
        raise UsageError(f"--output {output} has no name of its own; give the folder a name")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    made_here = output.is_dir() and any((output / name).is_file() for name in REPORT_NAMES)
    if not made_here:
        raise UsageError(f"{output} exists and was not written by hfdetox; choose another --output")
    if not overwrite:
        raise UsageError(f"{output} holds an earlier result; choose another --output, or replace it with --overwrite")


def publish_folder(fresh: Path, output: Path) -> None:
    """Move the finished folder `fresh` (on the same disk) to `output` in one rename; an old result goes only then."""
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        # what a killed process left there would be in the way
        shutil.rmtree(old, ignore_errors=True)
    try:
        replace_folder(fresh, output, old)
    except OSError as error:
        raise RunError(f"cannot move the result to {output}: {error.strerror or error}") from error
    shutil.rmtree(old, ignore_errors=True)


def trigger_specs(specs: Sequence[Any]) -> list[str]:
    """Return the text form of trigger specifications or objects."""
    return [spec if isinstance(spec, str) else spec.recorded() for spec in specs]
