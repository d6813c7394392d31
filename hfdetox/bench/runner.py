"""Compares defenses: every trial of a suite by a process of its own, and the tables and pictures of all of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hfdetox.bench.cell_runner import CellRunner, share_of_cores
from hfdetox.bench.folder import Bench, BenchSettings
from hfdetox.bench.plots import draw_bench
from hfdetox.bench.suite_file import load_suite
from hfdetox.bench.tables import BenchOutcome, check_place
from hfdetox.errors import RunError


def run_bench(file: Path, *, output: Path, zoo: Path | None = None, dataset: str | None = None, jobs: int = 1,
              precision: str = "auto", device: str = "auto", keep_models: bool = False,
              progress: bool = False) -> BenchOutcome:  # fmt: skip
    """Run what a suite's `bench` asks for and is not there; the same call goes on after a stop.

    Args:
        zoo: folder of the suite's models, as `hfdetox attack --suite` builds it.
        dataset: Hub id or folder, in place of the suite's.
        jobs: processes at a time; each gets its share of the cores unless OMP_NUM_THREADS is set.
        precision: as `--precision` takes it.
        device: as `--device` takes it.
        keep_models: keep the cleaned models' weights; their reports and cards are kept in any case.
        progress: say on standard error how each trial ended, and draw a bar.

    Raises:
        UsageError: the suite is wrong, or a finished folder of another suite or a folder that is no bench is in the
            way; nothing was written.
        RunError: the bench cannot be written. A trial that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `bench.json` says what was not run.
    """
    place = BenchSettings(output=output, zoo=zoo, dataset=dataset, precision=precision, device=device,
                       threads=share_of_cores(jobs), keep_models=keep_models)  # fmt: skip
    suite = load_suite(file)
    try:
        bench = Bench(suite, place)
        check_place(output, suite.file.name, bench.cells)
        output.mkdir(parents=True, exist_ok=True)
        bench.tidy_done()
        bench.write()
        try:
            CellRunner(bench, jobs, progress=progress).run()
        except BaseException:
            # the pictures are of what there is; what goes wrong with them hides nothing else
            with contextlib.suppress(RunError):
                draw_bench(bench.outcome())
            raise
        draw_bench(bench.outcome())
    except OSError as error:
        raise RunError(f"cannot run the bench in {output}: {error.strerror or error}") from error
    return bench.outcome()
