"""Compares defenses: every run of a suite's bench by a process of its own, and the tables and pictures of them all."""

import contextlib
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfdetox.arguments import takes
from hfdetox.bench.folder import TaskFolder, given_files, weights_of
from hfdetox.bench.plots import draw_bench
from hfdetox.bench.publish import check_push, push_bench
from hfdetox.bench.runner import run_tasks
from hfdetox.bench.suite import SuiteFile, TargetEntry
from hfdetox.bench.summary import BenchTables
from hfdetox.bench.tables import redacted
from hfdetox.bench.tasks import SHARE, Run, Task, bench_runs, load_suite
from hfdetox.checks import check_there
from hfdetox.config import DetoxOptions
from hfdetox.config_bench import BenchOptions
from hfdetox.data.opened import OpenedDataset, open_dataset
from hfdetox.defenses import parse_defense
from hfdetox.errors import RunError, UsageError
from hfdetox.files import locked, sha256_file
from hfdetox.progress import draws, note
from hfdetox.reporting.report import ATTACK_REPORT_NAME, Report
from hfdetox.runs.estimate import Timed, count_images, time_like
from hfdetox.runs.folder import RUN_FILE
from hfdetox.training.devices import accelerate_state_kept


@takes(BenchOptions)
@accelerate_state_kept()
def run_bench(given: BenchOptions) -> BenchTables:
    """Run what a suite's `bench` asks for and is not there; the same call goes on after a stop.

    Args:
        {arguments}

    With `push_to` the tables and the runs' reports are published at the end, what failed included; models and pictures
    of images are not. Whether that can succeed is asked before anything is run.

    Raises:
        UsageError: the suite is wrong, a finished folder of another suite or a folder that is no bench is in the way,
            or `push_to` holds something else; nothing was written.
        HubError: no token, no right to write, or the Hub cannot be reached; all that was run stays.
        RunError: the bench cannot be written. A run that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `bench.json` says what was not run.
    """
    if given.private and given.push_to is None:
        raise UsageError("--private says how to publish: name the repository with --push-to")
    suite = load_suite(given.suite or Path())
    if given.push_to is not None:
        check_push(given.push_to, suite.file.name, private=given.private)
    bench = Bench(suite, given)
    if draws(given.progress):
        note(bench.describe_cost(), shown=True)
    tables: BenchTables = run_tasks(bench)
    if given.push_to is None:
        return tables
    return replace(tables, pushed=push_bench(tables, given.push_to, private=given.private))


@takes(BenchOptions)
@accelerate_state_kept()
def plan_bench(given: BenchOptions) -> dict[str, Any]:
    """Return what `run_bench` with these arguments would run, and how long that takes; nothing is written.

    Args:
        {arguments}

    Raises:
        UsageError: as `run_bench` does.
    """
    return Bench(load_suite(given.suite or Path()), given).plan()


class Bench(TaskFolder[Run, BenchOptions]):
    """The folder of a suite's runs, and the state of each.

    Raises:
        UsageError: no dataset; a dataset or model of this machine that is not there; a model of a zoo is asked for and
            no zoo is named; a folder is there that another suite or command made.
    """

    title, word = "bench", "run"
    report = Report
    tables = BenchTables

    def prepare(self, suite: SuiteFile) -> list[Run]:
        """Return the runs; models and images of this machine are there, and their fingerprints are taken."""
        runs = bench_runs(suite)
        check_there("dataset", self.dataset)
        targets = {run.target.name: run.target for run in runs}
        for name, target in targets.items():
            if isinstance(target.source, TargetEntry):
                check_there(f"subject {name}: model", target.source.model)
            elif self.settings.zoo is None:
                raise UsageError(f"{suite.file} tries models of a zoo: name its folder with --zoo (hfdetox attack "
                                 f"--suite {suite.file} --output ZOO builds it)")  # fmt: skip
        self._opened: OpenedDataset | None = None
        self._counts: dict[Any, tuple[int, int]] = {}
        self._timed: dict[str, Timed] = {}
        self._dataset_files = _fingerprint(Path(self.dataset))
        self._weights = {name: self._weights_of(target.source, name) for name, target in targets.items()}
        return runs

    def command(self, run: Run) -> list[str]:
        """Return the words after `hfdetox` that do a run, without where it goes."""
        source = run.target.source
        known = {} if isinstance(source, Task) else {"target": source.target, "revision": source.revision}
        # the samples of the suite's dataset are the attacks'
        last = {"defense": run.entry.defense, "set": run.entry.settings, "seed": run.seed,
                "trigger": self._triggers(run), **known,
                "samples": None if run.samples == SHARE else run.samples}  # fmt: skip
        model = str(self._zoo_folder(run.target.name)) if isinstance(source, Task) else source.model
        # what a bench compares is measured with the true triggers
        return ["detox", model, *self.options({}, last), "--no-scan"]

    def argv(self, run: Run) -> list[str]:
        """Return the words of a run's process: a stopped one of the same command goes on from its checkpoint."""
        folder = self.beside(run, "run")
        same = self.same(run) and self.made(run).get("device", "auto") == self.settings.device
        # a run that was killed while it began has no record of itself
        if same and (folder / RUN_FILE).is_file():
            return ["detox", "--resume", str(folder)]
        self._forget(run)
        return [*self.command(run), *self.place(run)]

    def recorded(self, run: Run) -> dict[str, Any]:
        """Return what NAME.json says of a run: its command, without where things lie, and what it was run on.

        `model_weights` is the SHA-256 of the zoo's model, or those of a folder's weight files, None for a model of the
        Hub; `triggers` are those of its trigger files and pictures; `dataset_files` is one over the names and sizes of
        a folder's files, None for a dataset of the Hub.
        """
        # a defense may be given a trigger file too
        given = [*self._triggers(run), *(text for key, text in run.entry.settings.items() if key == "trigger")]
        return {"schema_version": 1, "command": redacted(self.command(run)), "dataset_files": self._dataset_files,
                "model_weights": self._weights[run.target.name],
                "triggers": [sha256_file(file) for file in given_files(given)]}  # fmt: skip

    def how(self) -> dict[str, Any]:
        """Return the device, and whether the weights are kept."""
        return {"device": self.settings.device, "kept": self.settings.keep_models}

    def missing(self, run: Run) -> str | None:
        """Return that the zoo does not have the model (yet)."""
        name = run.target.name
        there = not isinstance(run.target.source, Task) or (self._zoo_folder(name) / ATTACK_REPORT_NAME).is_file()
        return None if there else f"the zoo has no model {name}"

    def difference(self, run: Run, report: Report) -> str | None:
        """Return what a finished run is that is not this one."""
        # settings that the command does not name may have had other defaults in another version
        settings = parse_defense(run.entry.defense, run.entry.settings)[0].settings()
        same = self.same(run) and report.defense.parameters == settings
        return None if same else "run of another suite, command, model or version"

    def tidy(self, run: Run, returncode: int) -> None:
        """Remove the checkpoints of a run that cannot go on, and the weights of a finished one unless they are kept.

        What failed otherwise goes on from its checkpoint when the bench is run again, as its message says.
        """
        if returncode == UsageError.exit_status:
            self._forget(run)
        # a run that is rejected for its accuracy is a result too
        if returncode in (0, RunError.exit_status) and not self.made(run).get("kept"):
            for weights in (self.folder / run.name).glob("*.safetensors"):
                weights.unlink()

    def finish(self) -> None:
        """Put in order what was finished when the bench was stopped, and draw the pictures of what there is."""
        for name, run in self.tasks.items():
            if self.rows[name]["status"] == "done":
                self.tidy(run, 0)
        draw_bench(self.outcome())

    def minutes_of(self, run: Run) -> tuple[float, float]:
        """Return how long a run takes; one model of each row of the suite's models is timed."""
        options, name = self._options(run), run.target.model
        if run.samples not in self._counts:
            self._opened = self._opened or open_dataset(self.dataset, options, warn=lambda _: None)
            self._counts[run.samples] = count_images(self._opened, options)
        if name not in self._timed:
            self._timed[name] = time_like(options)
        method = parse_defense(run.entry.defense, run.entry.settings)[0]
        return self._timed[name].cost(method, *self._counts[run.samples], options).minutes

    def _options(self, run: Run) -> DetoxOptions:
        """Return the options of a run, as far as they decide how long it takes."""
        source, read = run.target.source, self.suite.dataset
        model = self._zoo_folder(run.target.name) if isinstance(source, Task) else source.model
        return DetoxOptions(
            str(model), revision=None if isinstance(source, Task) else source.revision, dataset=self.dataset,
            dataset_config=read.config, split=read.split, eval_split=read.eval_split, image_column=read.image_column,
            label_column=read.label_column, dataset_revision=None if self.settings.dataset else read.revision,
            clean_samples=run.samples, eval_samples=read.eval_samples, triggers=self._triggers(run),
            device=self.settings.device, scan=False)  # fmt: skip

    def _forget(self, run: Run) -> None:
        """Remove a run's folder, unless a process that somebody else started works in it."""
        folder = self.beside(run, "run")
        with contextlib.suppress(UsageError, RunError), locked(folder, run.name):
            shutil.rmtree(folder, ignore_errors=True)

    def _zoo_folder(self, name: str) -> Path:
        return (self.settings.zoo or Path()) / name

    def _triggers(self, run: Run) -> list[str]:
        if isinstance(run.target.source, TargetEntry):
            return list(run.target.source.triggers)
        return [str(file) for file in sorted((self._zoo_folder(run.target.name) / "triggers").glob("*.safetensors"))]

    def _weights_of(self, source: Task | TargetEntry, name: str) -> Any:
        if isinstance(source, Task):
            return weights_of(self._zoo_folder(name))
        folder = Path(source.model)
        return [sha256_file(file) for file in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else None


def _fingerprint(folder: Path) -> str | None:
    """Return the SHA-256 over the names and sizes of a folder's files, None where there is no such folder."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listed.encode("utf-8", "surrogatepass")).hexdigest()
