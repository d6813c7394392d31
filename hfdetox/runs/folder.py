"""The folders of a run: `OUTPUT.run/`, which lets a stopped one go on, and the output itself."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from hfdetox._version import __version__
from hfdetox.config import NONE, DetoxOptions, ImageOptions
from hfdetox.data.load import Images
from hfdetox.defenses import DEFENSES
from hfdetox.documents import read_json
from hfdetox.errors import UsageError, located, on_disk
from hfdetox.files import (
    LEFTOVER,
    LOCK_FILES,
    MANIFEST,
    REPORT_NAMES,
    locked,
    replace_folder,
    sha256_file,
    write_atomically,
)
from hfdetox.logging import is_main_process
from hfdetox.models.classifier import Classifier
from hfdetox.models.network import FILE_NAME
from hfdetox.runs.manifest import foreign_files, remove_own
from hfdetox.training.checkpoints import CHECKPOINT_FILES, CheckpointStore
from hfdetox.triggers import TRIGGERS, Trigger
from hfdetox.values import check_known, read_fields

Given = TypeVar("Given")
Result = TypeVar("Result")

RUN_FILE, FINGERPRINT_FILE, RESULT_FILE = "run.json", "fingerprint.json", "result.json"
_PLACES = ("model", "dataset", "label_map", "output")
_TRIGGERS = "triggers"
_FOLDERS = ("checkpoint", "checkpoint.new", "checkpoint.old", _TRIGGERS)
# of options that may be objects, what a run folder has of them
_RECORDED = {"model": str, "dataset": str, "defense": str, "settings": dict[str, str], "triggers": list[str],
             "label_map": str, "output": str}  # fmt: skip
_HUB_PREFIX = re.compile("hf[_-]hub:")


@dataclass(frozen=True, kw_only=True)
class RecordedOptions(DetoxOptions):
    """The options of a run as its folder keeps them, without objects.

    `original_command` is the command that began the run, `threads` the number it computed with, where that is known.
    """

    original_command: str
    threads: int | None = None


def command_of(options: ImageOptions) -> str:
    """Return the shell command that repeats a run, "" where objects took part, which no command can name.

    It is for publishing: of local paths only the last part is left, and where the result is pushed is left out. Of a
    resumed run it is that of its start.

    Args:
        options: without objects.
    """
    if isinstance(options, RecordedOptions):
        return options.original_command
    # neither has a class of the caller's that no package offers
    specs = [spec for spec in map(str, options.triggers) if spec != NONE and not spec.endswith(".safetensors")]
    known = all(spec.partition(":")[0] in TRIGGERS for spec in specs)
    if isinstance(options, DetoxOptions):
        known = known and str(options.defense).partition(":")[0] in DEFENSES
    if options.model is None or options.dataset is None or not known:
        return ""
    return shlex.join(["hfdetox", *options.redact_paths().argv()])


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
        """Raise UsageError when a run is there already; one that was killed before it was recorded is none."""
        found = (
            {name for name in os.listdir(self.path) if not LEFTOVER.fullmatch(name)} if self.path.exists() else set()
        )
        inside = [path for name in _FOLDERS for path in (self.path / name).rglob("*")]
        # what a run never writes there is somebody's own, and would be removed
        foreign = [path for path in inside if path.is_symlink() or not self._own(path)]
        if RUN_FILE in found or foreign or found - {*LOCK_FILES, *_FOLDERS, FINGERPRINT_FILE, RESULT_FILE}:
            raise UsageError(
                f"{self.path} holds a run that did not finish: go on with {self.resume_command()}, or remove it to "
                "start again"
            )

    def _own(self, path: Path) -> bool:
        """Tell whether a path inside a folder of the run is one that a run writes."""
        folder, *names = path.relative_to(self.path).parts
        if len(names) != 1 or LEFTOVER.fullmatch(names[0]):
            return len(names) == 1
        return path.suffix == ".safetensors" if folder == _TRIGGERS else names[0] in CHECKPOINT_FILES

    def resume_command(self) -> str:
        """Return the shell command that goes on with this run."""
        return shlex.join(["hfdetox", "--resume", str(self.path)])

    def begin(self, options: DetoxOptions, triggers: Sequence[Trigger],
              inputs: Mapping[str, str | None] | None = None) -> None:  # fmt: skip
        """Create the folder and record the options, so that they mean the same in any working directory.

        The triggers are kept as files: pictures and targets with commas have no text form. `inputs` is the fingerprint.
        """
        threads = getattr(options, "threads", None) or torch.get_num_threads()
        recorded = options.record() | {"original_command": command_of(options), "threads": threads}
        # with a commit, these are ids of the Hub
        pinned = {"model": options.revision, "dataset": options.dataset_revision}
        recorded |= {name: _absolute(recorded[name]) for name in _PLACES if not pinned.get(name)}
        recorded["output"] = options.output and str(Path(options.output).absolute())
        recorded["triggers"] = [f"{_TRIGGERS}/{trigger.name}.safetensors" for trigger in triggers]
        with on_disk(f"write the run folder {self.path}"):
            # of a run that was killed before it was recorded, or at its end; a checkpoint would be taken for this one's
            if not (self.path / RUN_FILE).exists():
                self.remove()
            (self.path / _TRIGGERS if triggers else self.path).mkdir(parents=True, exist_ok=True)
            for name, trigger in zip(recorded["triggers"], triggers, strict=True):
                write_atomically(self.path / name, trigger.file_bytes())
            if inputs is not None:
                self.record_fingerprint(inputs)
            # the last: with it the folder is a run
            write_atomically(self.path / RUN_FILE, json.dumps(recorded, indent=2) + "\n")

    def recorded(self) -> RecordedOptions:
        """Return the options the run began with; paths below the working directory are relative to it."""
        with located(f"{self.path} is not a run folder of this hfdetox (name the OUTPUT.run/ folder)"):
            plain = read_json(self.path / RUN_FILE, dict[str, Any])
            check_known("", plain, _RECORDED)
            options: RecordedOptions = read_fields("", RecordedOptions, plain)
            places: dict[str, Any] = {name: _relative(getattr(options, name)) for name in _PLACES}
            return replace(options, **places, triggers=[str(self.path / str(name)) for name in options.triggers])

    def remove(self) -> None:
        """Delete what a run wrote, and the folder if nothing else is in it; called only after the result is safe."""
        for name in _FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        # the last: until then the run can be resumed, which removes the rest
        for name in (FINGERPRINT_FILE, RUN_FILE, RESULT_FILE):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for name in filter(LEFTOVER.fullmatch, os.listdir(self.path)):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def record_result(self, folder: Path) -> None:
        """Record which result the run came to, before it is moved to the output; raises RunError."""
        write_atomically(self.path / RESULT_FILE, json.dumps({"manifest": sha256_file(folder / MANIFEST)}) + "\n")

    def finished(self, output: str | Path | None) -> bool:
        """Return whether what lies at the output is the result of this run, which was killed after it put it there."""
        files = [self.path / RESULT_FILE, Path(output or "") / MANIFEST]
        if output is None or not all(file.is_file() for file in files):
            return False
        with contextlib.suppress(UsageError):
            return read_json(files[0], dict[str, Any]).get("manifest") == sha256_file(files[1])
        return False

    def check_fingerprint(self, found: Mapping[str, str | None]) -> None:
        """Refuse to go on with other inputs than those of the run's start; a run without a record of them goes on.

        Args:
            found: what the run works with now, a hash or version by what it is of.

        Raises:
            UsageError: something changed; the line says what.
        """
        file = self.path / FINGERPRINT_FILE
        recorded = read_json(file, dict[str, Any]) if file.exists() else found
        changed = [f"{name} ({recorded.get(name)}, now {now})" for name, now in found.items()
                   if recorded.get(name) != now]  # fmt: skip
        if changed:
            raise UsageError(f"{self.path} began with other inputs: {'; '.join(changed)} changed since. Put back what "
                             "it began with, or remove the folder and start again")  # fmt: skip

    def record_fingerprint(self, found: Mapping[str, str | None]) -> None:
        """Record what the run works with, once; raises RunError when it cannot be written."""
        if not (self.path / FINGERPRINT_FILE).exists():
            write_atomically(self.path / FINGERPRINT_FILE, json.dumps(found, indent=2) + "\n")


def open_run(options: DetoxOptions) -> tuple[DetoxOptions, RunFolder | None]:
    """Return the options that count and the run folder, None without output.

    A resumed run's options are the recorded ones; how it is published may be added to them, or all of it said anew.

    Raises:
        UsageError: the output holds something, a run is there already, `resume` is not a run folder or one of another
            model, or it is said how to publish and not where.
    """
    run = RunFolder(Path(options.resume)) if options.resume is not None else None
    if run is not None:
        recorded = run.recorded()
        of_it = None if recorded.model is None else str(recorded.model)
        if options.model is not None and not same_model(str(options.model), of_it):
            of = recorded.model or "a loaded model"
            raise UsageError(f"{run.path} is a run of {of}, not of {options.model}: leave the model out, or start anew")
        if options.push_to is not None:
            anew: dict[str, Any] = {**options.publishing(), "push_to": options.push_to}
        else:
            anew = {name: getattr(recorded, name) or given for name, given in options.publishing().items()}
        options = replace(recorded, **anew, log_with=options.log_with, keep_run=options.keep_run)
        options.check_publishing()
    if options.output is not None:
        if run is not None:
            settle(Path(options.output))
        if run is None or not run.finished(options.output):
            check_output(Path(options.output), overwrite=options.overwrite)
        if run is None:
            run = RunFolder.beside(options.output)
            run.refuse_existing()
    return options, run


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


def log_folder(output: str | Path | None) -> Path:
    """Return where a tracker that writes files writes them: beside the output, where they stay after the run."""
    return Path("hfdetox-logs") if output is None else Path(output).with_name(Path(output).name + ".logs")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError when `output` holds something that is not to be replaced.

    An empty folder is taken; with `overwrite` also one that hfdetox wrote.
    """
    if output.name in ("", ".."):
        raise UsageError(f"--output {output} has no name of its own; give the folder a name")
    if output.is_symlink():
        raise UsageError(f"{output} is a link, which the result would replace; name the folder that it leads to")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    made_here = output.is_dir() and any((output / name).is_file() for name in REPORT_NAMES)
    if not made_here:
        raise UsageError(f"{output} exists and was not written by hfdetox; choose another --output")
    if not overwrite:
        raise UsageError(f"{output} holds an earlier result; choose another --output, or replace it with --overwrite")
    _refuse_foreign(output)


def _refuse_foreign(output: Path) -> None:
    foreign = foreign_files(output)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UsageError(f"{output} holds {foreign[0]}{more}, which is not as hfdetox wrote it: --overwrite removes "
                         "only what hfdetox wrote; move it away, or choose another --output")  # fmt: skip


def fresh_name(output: Path) -> str:
    """Return what the folders begin with, beside an output, that are written before it; they are its run's alone."""
    return f".{output.name}.hfdetox-"


def settle(output: Path) -> None:
    """Put right what a killed process left beside an output, on the main process, which holds the run folder.

    Unfinished folders go, and so does what is left of a run folder that was being removed and of an earlier result that
    was replaced; one that was being replaced is put back.
    """
    parent, old = output.absolute().parent, _old_place(output)
    if not is_main_process() or not parent.is_dir():
        return
    for name in os.listdir(parent):
        if name.startswith(fresh_name(output)) and not (parent / name).is_symlink():
            shutil.rmtree(parent / name, ignore_errors=True)
    run = RunFolder.beside(output)
    if (run.path / RESULT_FILE).exists() and not (run.path / RUN_FILE).exists():
        run.remove()
    if old.is_dir() and os.path.lexists(output):
        remove_own(old)
    elif old.is_dir():
        with on_disk(f"move the earlier result back to {output}"):
            os.replace(old, output)


def _old_place(output: Path) -> Path:
    return output.absolute().with_name(f".{output.name}.old")


def publish_folder(fresh: Path, output: Path) -> None:
    """Move the finished folder `fresh` (on the same disk) to `output` in one rename; an old result goes only then."""
    old = _old_place(output)
    if output.exists():
        _refuse_foreign(output)
        # what a killed process left there would be in the way
        remove_own(old)
    with on_disk(f"move the result to {output}"):
        replace_folder(fresh, output, old)
    remove_own(old)


def holds_output(run: Callable[[Given], Result]) -> Callable[[Given], Result]:
    """Make a run hold the run folder of the output that it is given, or resumes, on the main process, while it runs.

    The function raises UsageError when another process holds it.
    """

    @functools.wraps(run)
    def held(given: Given) -> Result:
        output, resume = getattr(given, "output", None), getattr(given, "resume", None)
        with contextlib.ExitStack() as locks:
            if is_main_process() and resume is not None and Path(str(resume)).is_dir():
                locks.enter_context(locked(Path(str(resume)), f"the run in {resume}"))
            elif is_main_process() and output is not None and Path(str(output)).name not in ("", ".."):
                locks.enter_context(locked(RunFolder.beside(str(output)).path, f"the output {output}"))
                settle(Path(str(output)))
            return run(given)

    return held


def fingerprint(classifier: Classifier, images: Images) -> dict[str, str | None]:
    """Return what a resumed run must find as it was: the version, the model, which images, and what is on them.

    Of the preprocessing that is what it makes of the first image; a function of the caller's has no other mark.
    """
    clean, prepare = images.clean, classifier.preprocessing
    correction = classifier.folder and classifier.folder / FILE_NAME
    pixels = hashlib.sha256(b"".join(map(clean.fingerprint, range(len(clean))))).hexdigest()
    prepared = str((prepare.mean, prepare.std, prepare.scale, prepare.prepare(clean.image(0)).tolist()))
    labels = json.dumps([list(classifier.labels), [int(label) for label in clean.labels]])
    return {
        "hfdetox version": __version__, "model weights": classifier.info.weights_sha256,
        "correction": sha256_file(correction) if correction is not None and correction.is_file() else None,
        "rows of the clean images": images.info.indices_sha256, "clean images": pixels,
        "rows of the evaluation images": images.info.eval_indices_sha256,
        "labels": hashlib.sha256(labels.encode()).hexdigest(),
        "preprocessing": hashlib.sha256(prepared.encode()).hexdigest(),
    }  # fmt: skip
