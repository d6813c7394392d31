"""The folder of a bench: the command of every trial, how far it is, and what is kept of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hfdetox.bench.cells import CellFolder, portable
from hfdetox.bench.suite import SubjectEntry, Suite
from hfdetox.bench.tables import BenchOutcome, BenchRow, row_of
from hfdetox.bench.trials import SHARE, Trial, trials_of
from hfdetox.bench.zoo_folder import given_files
from hfdetox.defenses import parse_defense
from hfdetox.errors import UsageError
from hfdetox.hub.checksums import sha256_file
from hfdetox.reporting.report import ATTACK_REPORT_NAME, Report
from hfdetox.runs.folder import RUN_FILE

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Where and how the trials of a suite are run.

    Attributes:
        output: the bench's folder.
        zoo: the folder of the suite's zoo, None where only models that are not of a zoo are tried.
        dataset: Hub id or folder, in place of the suite's.
        precision: of the training, as `--precision` takes it.
        device: as `--device` takes it; not a part of what a trial is.
        threads: of one process, None leaves them to the environment.
        keep_models: keep the weights of the cleaned models, not their reports and cards alone.
    """

    output: Path
    zoo: Path | None = None
    dataset: str | None = None
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    keep_models: bool = False


class Bench(CellFolder[Trial, BenchRow]):
    """The folder of a suite's trials, and the state of each.

    Raises:
        UsageError: no dataset; a dataset or model of this machine that is not there; a cell of a zoo is asked for and
            no zoo is named; a folder is there that another suite or command made.
    """

    title = "bench"

    def __init__(self, suite: Suite, place: BenchSettings) -> None:
        self.suite, self.place = suite, place
        self.folder, self.threads = place.output, place.threads
        self.dataset = place.dataset or suite.dataset.id
        if self.dataset is None:
            raise UsageError(f"{suite.file} names no dataset: add one to it, or give --dataset")
        self.cells = {trial.name: trial for trial in trials_of(suite)}
        _check_there("dataset", self.dataset)
        for trial in self.cells.values():
            if isinstance(trial.subject.source, SubjectEntry):
                _check_there(f"subject {trial.subject.name}: model", self.model(trial))
        if place.zoo is None and any(not isinstance(t.subject.source, SubjectEntry) for t in self.cells.values()):
            raise UsageError(f"{suite.file} tries models of a zoo: name its folder with --zoo (hfdetox attack --suite "
                             f"{suite.file} --output ZOO builds it)")  # fmt: skip
        self._dataset_files = _fingerprint(Path(self.dataset))
        self._sources = {t.subject.name: self._source(t) for t in self.cells.values()}
        self.rows = {name: self.row(trial) for name, trial in self.cells.items()}

    def command(self, trial: Trial) -> list[str]:
        """Return the words after `hfdetox` that run a trial, without where it goes."""
        source = trial.subject.source
        words = ["detox", self.model(trial), "--dataset", str(self.dataset), *self._dataset_options()]
        words += ["--defense", trial.entry.defense]
        words += [w for key, value in trial.entry.settings.items() for w in ("--set", f"{key}={value}")]
        words += ["--seed", str(trial.seed)]
        words += [w for trigger in self._triggers(trial) for w in ("--trigger", trigger)]
        if isinstance(source, SubjectEntry):
            words += ["--target", source.target] if source.target is not None else []
            words += ["--revision", source.revision] if source.revision is not None else []
        words += ["--samples", str(trial.samples)] if trial.samples != SHARE else []
        return words + (["--precision", self.place.precision] if self.place.precision != "auto" else [])

    def model(self, trial: Trial) -> str:
        """Return the trial's model: the folder of the zoo's cell, or what the suite names."""
        source = trial.subject.source
        return source.model if isinstance(source, SubjectEntry) else str(self._cell_folder(trial))

    def words(self, trial: Trial) -> list[str]:
        """Return the words of a trial's process: a killed one of the same command goes on from its checkpoint."""
        device = ["--device", self.place.device] if self.place.device != "auto" else []
        run = self._run(trial)
        made = self.made(trial)
        same = self._same(trial) and made.get("device", "auto") == self.place.device
        # a run that was killed while it began has no record of itself
        if same and (run / RUN_FILE).is_file():
            return ["detox", "--resume", str(run)]
        shutil.rmtree(run, ignore_errors=True)
        return [*self.command(trial), "--output", str(self.folder / trial.name), *device]

    def recorded(self, trial: Trial) -> dict[str, Any]:
        """Return what NAME.json says of a trial: its command, without where things lie, and what it was run on.

        `model_weights` is the SHA-256 of the zoo's model, or those of a folder's weight files, None for a model of the
        Hub; `triggers` are those of its trigger files and pictures; `dataset_files` is one over the names and sizes of
        a folder's files, None for a dataset of the Hub.
        """
        source = self._sources[trial.subject.name]
        # a defense may be given a trigger file too
        own = [text for key, text in trial.entry.settings.items() if key == "trigger"]
        triggers = source["triggers"] + [sha256_file(file) for file in given_files(own)]
        return {"schema_version": 1, "command": portable(self.command(trial)), "dataset_files": self._dataset_files,
                "model_weights": source["model_weights"], "triggers": triggers}  # fmt: skip

    def extras(self, trial: Trial) -> dict[str, Any]:
        """Return how a trial is run, and why it failed before: it stays failed in the tables until it is done."""
        before = self.made(trial) if self._same(trial) else {}
        failed = {"failed": before["failed"]} if "failed" in before else {}
        return {"device": self.place.device, "kept": self.place.keep_models, **failed}

    def remember(self, trial: Trial, reason: str) -> None:
        """Keep why a trial failed."""
        self.record(trial, {**self.extras(trial), "failed": reason})

    def _same(self, trial: Trial) -> bool:
        """Tell whether NAME.json is of this very trial."""
        made, expected = self.made(trial), self.recorded(trial)
        return isinstance(made, dict) and {key: made.get(key) for key in expected} == expected

    def row(self, trial: Trial) -> BenchRow:
        """Return a trial as it lies in the bench: `done`, `failed`, or `not run` with the reason where it cannot be.

        Raises:
            UsageError: its folder was made by another command or on another model, or its report cannot be read.
        """
        folder = self.folder / trial.name
        if not (folder / Report.NAME).is_file():
            source = trial.subject.source
            missing = (
                not isinstance(source, SubjectEntry) and not (self._cell_folder(trial) / ATTACK_REPORT_NAME).is_file()
            )
            if missing:
                return row_of(trial, reason=f"the zoo has no model {trial.subject.name}")
            failed = self.made(trial).get("failed") if self._same(trial) else None
            return row_of(trial) if failed is None else self.failed(trial, str(failed))
        report = Report.load(folder)
        # settings that the command does not name may have had other defaults in another version
        settings = parse_defense(trial.entry.defense, trial.entry.settings)[0].settings()
        if not self._same(trial) or report.defense.parameters != settings:
            raise UsageError(f"{folder} is a finished run of another suite, command, model or version; it is not "
                             "replaced: choose another --output, or remove the folder to run it again")  # fmt: skip
        return row_of(trial, "done", report=report)

    def failed(self, trial: Trial, reason: str) -> BenchRow:
        """Return the row of a trial that failed."""
        return row_of(trial, "failed", reason=reason)

    def tidy(self, trial: Trial, returncode: int) -> None:
        """Remove what a failed run would go on from, and the weights of a finished one unless they are kept."""
        if returncode > 0 and returncode != _INTERRUPTED:
            # it would only fail again at the same place
            shutil.rmtree(self._run(trial), ignore_errors=True)
        if returncode == 0:
            self._drop_weights(trial)

    def tidy_done(self) -> None:
        """Put in order finished trials whose bench was stopped before it could."""
        for name, trial in self.cells.items():
            if self.rows[name].status == "done":
                self._drop_weights(trial)

    def _drop_weights(self, trial: Trial) -> None:
        if not self.made(trial).get("kept"):
            for weights in (self.folder / trial.name).glob("*.safetensors"):
                weights.unlink()

    def outcome(self) -> BenchOutcome:
        """Return the bench's rows as they are now."""
        return BenchOutcome(self.folder, self.suite.file.name, list(self.rows.values()))

    def write(self) -> None:
        """Write the bench's tables."""
        self.outcome().write()

    def _run(self, trial: Trial) -> Path:
        return self.folder / f"{trial.name}.run"

    def _cell_folder(self, trial: Trial) -> Path:
        return (self.place.zoo or Path()) / trial.subject.name

    def _triggers(self, trial: Trial) -> Sequence[str]:
        source = trial.subject.source
        if isinstance(source, SubjectEntry):
            return source.triggers
        return [str(file) for file in sorted((self._cell_folder(trial) / "triggers").glob("*.safetensors"))]

    def _source(self, trial: Trial) -> dict[str, Any]:
        weights: Any = None
        if not isinstance(trial.subject.source, SubjectEntry):
            try:
                report = json.loads((self._cell_folder(trial) / ATTACK_REPORT_NAME).read_text(encoding="utf-8"))
                weights = report["output"]["weights_sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                weights = None
        elif (folder := Path(trial.subject.source.model)).is_dir():
            weights = [sha256_file(file) for file in sorted(folder.glob("*.safetensors"))]
        return {
            "model_weights": weights,
            "triggers": [sha256_file(file) for file in given_files(self._triggers(trial))],
        }

    def _dataset_options(self) -> Iterator[str]:
        entry = self.suite.dataset
        for option in fields(entry):
            value = getattr(entry, option.name)
            # a revision is that of the suite's own dataset, and the samples are the attacks'
            if option.name in ("id", "samples") or value is None or (
                option.name == "revision" and self.place.dataset
            ):  # fmt: skip
                continue
            flag = "dataset-revision" if option.name == "revision" else option.name.replace("_", "-")
            yield from (f"--{flag}", str(value))


def _check_there(what: str, name: str) -> None:
    """Raise UsageError for a path that is not there; another name may be one of the Hub."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise UsageError(f"{what} {name}: no such folder")


def _fingerprint(folder: Path) -> str | None:
    """Return the SHA-256 over the names and sizes of a folder's files, None where there is no such folder."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listed.encode("utf-8", "surrogatepass")).hexdigest()
