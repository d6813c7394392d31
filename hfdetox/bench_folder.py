"""The folder of a bench: the command of every trial, how far it is, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hfdetox.bench_table import BenchOutcome, BenchRow, row_of
from hfdetox.cell_folder import CellFolder, portable
from hfdetox.checksums import sha256_file
from hfdetox.errors import UsageError
from hfdetox.report import ATTACK_REPORT_NAME, Report
from hfdetox.suite import SubjectEntry, Suite
from hfdetox.trials import SHARE, Trial, trials_of

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class BenchPlace:
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
        UsageError: no dataset; a cell of a zoo is asked for and no zoo is named; a folder is there that another suite
            or command made.
    """

    title = "bench"

    def __init__(self, suite: Suite, place: BenchPlace) -> None:
        self.suite, self.place = suite, place
        self.folder, self.threads = place.output, place.threads
        self.dataset = place.dataset or suite.dataset.id
        if self.dataset is None:
            raise UsageError(f"{suite.file} names no dataset: add one to it, or give --dataset")
        self.cells = {trial.name: trial for trial in trials_of(suite)}
        if place.zoo is None and any(not isinstance(t.subject.source, SubjectEntry) for t in self.cells.values()):
            raise UsageError(f"{suite.file} tries models of a zoo: name its folder with --zoo (hfdetox attack --suite "
                             f"{suite.file} --output ZOO builds it)")  # fmt: skip
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
        if run.is_dir() and self.made(trial) == self.recorded(trial):
            return ["detox", "--resume", str(run)]
        shutil.rmtree(run, ignore_errors=True)
        return [*self.command(trial), "--output", str(self.folder / trial.name), *device]

    def recorded(self, trial: Trial) -> dict[str, Any]:
        """Return what NAME.json says of a trial: its command, without where things lie, and what it was run on.

        `model_weights` is the SHA-256 of the zoo's model, None for one that is not of the zoo; `triggers` are those of
        its trigger files.
        """
        return {"schema_version": 1, "command": portable(self.command(trial)), **self._sources[trial.subject.name]}

    def row(self, trial: Trial) -> BenchRow:
        """Return a trial as it lies in the bench: `done` or `not run`, with the reason where it cannot be.

        Raises:
            UsageError: its folder was made by another command or on another model, or its report cannot be read.
        """
        folder = self.folder / trial.name
        if not (folder / Report.NAME).is_file():
            source = trial.subject.source
            missing = (
                not isinstance(source, SubjectEntry) and not (self._cell_folder(trial) / ATTACK_REPORT_NAME).is_file()
            )
            return row_of(trial, reason=f"the zoo has no model {trial.subject.name}" if missing else None)
        if self.made(trial) != self.recorded(trial):
            raise UsageError(f"{folder} is a finished run of another suite, command or model; it is not replaced: "
                             "choose another --output, or remove the folder to run it again")  # fmt: skip
        return row_of(trial, "done", report=Report.load(folder))

    def failed(self, trial: Trial, reason: str) -> BenchRow:
        """Return the row of a trial that failed."""
        return row_of(trial, "failed", reason=reason)

    def tidy(self, trial: Trial, returncode: int) -> None:
        """Remove what a failed run would go on from, and the weights of a finished one unless they are kept."""
        if returncode > 0 and returncode != _INTERRUPTED:
            # it would only fail again at the same place
            shutil.rmtree(self._run(trial), ignore_errors=True)
        if returncode == 0 and not self.place.keep_models:
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
        weights = None
        if not isinstance(trial.subject.source, SubjectEntry):
            try:
                report = json.loads((self._cell_folder(trial) / ATTACK_REPORT_NAME).read_text(encoding="utf-8"))
                weights = report["output"]["weights_sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                weights = None
        files = [spec for spec in self._triggers(trial) if spec.endswith(".safetensors")]
        return {"model_weights": weights, "triggers": [sha256_file(Path(file)) for file in files]}

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
