"""A run: its options, and the folder `OUTPUT.run/` that lets a stopped one go on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hfdetox.checkpoints import CheckpointStore
from hfdetox.errors import RunError, UsageError
from hfdetox.report import from_plain

RUN_FILE = "run.json"
PUBLISHING = ("private", "create_pr", "overwrite")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Everything that decides a run's result and where it goes, as plain data.

    `model` and `dataset` are None for objects; `settings` are the defence's by the names and in the texts that
    `--set` takes.
    """

    model: str | None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    samples: int | float = 0.05
    eval_samples: int | None = None
    label_map: str | None = None
    allow_missing_classes: bool = False
    defense: str = "d3:paper"
    settings: dict[str, str]
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
    private: bool = False
    create_pr: bool = False
    overwrite: bool = False

    def publishing(self) -> dict[str, Any]:
        """Return how the result is published, as the keyword arguments of `push_to_hub`."""
        return {name: getattr(self, name) for name in PUBLISHING}

    def command(self) -> str:
        """Return the shell command that repeats the run, "" where objects took part, which no command can name.

        It is for publishing: of local paths only the last part is left; options at their defaults, and where the
        result is pushed, are left out.
        """
        if self.model is None or self.dataset is None:
            return ""
        shown = self._without_places()
        words = [
            "hfdetox",
            *(["detox"] if shown.model in ("demo", "detox", "evaluate", "push", "list") else []),
            str(shown.model),
        ]
        flags = {"triggers": "--trigger", "settings": "--set"}
        for option in fields(self):
            value = getattr(shown, option.name)
            flag = flags.get(option.name, "--" + option.name.replace("_", "-"))
            if option.name in ("model", "push_to", *PUBLISHING) or value in (option.default, None, False, [], {}):
                continue
            if value is True:
                words.append(flag)
            elif isinstance(value, dict):
                words += [word for key, text in value.items() for word in (flag, f"{key}={text}")]
            else:
                words += [
                    word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))
                ]
        return shlex.join(words)

    def _without_places(self) -> RunOptions:
        # only what the Hub has is pinned to a revision; an id that is also a folder's name stays an id then
        model = self.model if self.model is None or self.revision else _last_part(self.model)
        dataset = self.dataset if self.dataset is None or self.dataset_revision else _last_part(self.dataset)
        return replace(
            self, model=model, dataset=dataset,
            label_map=_last_part(self.label_map) if self.label_map else None,
            output=f"./{Path(self.output).resolve().name}" if self.output else None,
            triggers=[
                _last_part(spec) if spec.endswith(".safetensors")
                else re.sub("(?<==)[^,]*/[^,]*", lambda path: _last_part(path[0]), spec)
                for spec in self.triggers
            ],
        )  # fmt: skip


def _last_part(text: str) -> str:
    return f"./{Path(text).resolve().name}" if Path(text).exists() else text


class RunFolder:
    """`OUTPUT.run/`: the options of the run as `run.json`, and the last checkpoint.

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

    def begin(self, options: RunOptions) -> None:
        """Create the folder and record the options."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = self.path / (RUN_FILE + ".new")
            fresh.write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")
            os.replace(fresh, self.path / RUN_FILE)
        except OSError as error:
            raise RunError(f"cannot write the run folder {self.path}: {error.strerror or error}") from error

    def recorded(self) -> RunOptions:
        """Return the options the run began with."""
        try:
            plain: dict[str, Any] = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            options = from_plain(RunOptions, plain)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self.path} is not a run folder of this hfdetox ({error}); name the OUTPUT.run/ folder"
            ) from error
        return replace(options)

    def remove(self) -> None:
        """Delete the folder; called only after the result is safe."""
        shutil.rmtree(self.path, ignore_errors=True)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError when `output` holds something that is not to be replaced.

    An empty folder is taken; with `overwrite` also one that hfdetox wrote.
    """
    if output.name in ("", ".."):
        raise UsageError(f"--output {output} has no name of its own; give the folder a name")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    made_here = output.is_dir() and (output / "detox_report.json").is_file()
    if not made_here:
        raise UsageError(f"{output} exists and was not written by hfdetox; choose another --output")
    if not overwrite:
        raise UsageError(f"{output} holds an earlier result; choose another --output, or replace it with --overwrite")


def publish_folder(fresh: Path, output: Path) -> None:
    """Move the finished folder `fresh` (on the same disk) to `output` in one rename; an old result goes only then."""
    old = output.with_name(f".{output.name}.old")
    try:
        if output.exists():
            # what a killed process left there would be in the way
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        os.replace(fresh, output)
    except OSError as error:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise RunError(f"cannot move the result to {output}: {error.strerror or error}") from error
    shutil.rmtree(old, ignore_errors=True)


def trigger_specs(specs: Sequence[Any]) -> list[str]:
    """Return the text form of trigger specifications or objects."""
    return [spec if isinstance(spec, str) else spec.recorded() for spec in specs]
