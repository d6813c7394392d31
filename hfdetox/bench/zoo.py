"""Builds the zoo of a suite: every cell by a process of its own, what is there is kept, what failed is shown."""

from __future__ import annotations

from pathlib import Path

from hfdetox.bench.cell_runner import CellRunner, share_of_cores
from hfdetox.bench.suite_file import load_suite
from hfdetox.bench.zoo_folder import Zoo, ZooSettings
from hfdetox.bench.zoo_table import SuiteOutcome, check_place
from hfdetox.errors import RunError


def run_suite(file: Path, *, output: Path, dataset: str | None = None, jobs: int = 1, precision: str = "auto",
              device: str = "auto", progress: bool = False) -> SuiteOutcome:  # fmt: skip
    """Build the zoo of a suite file in `output`, whatever of it is not there; the same call goes on after a stop.

    Several suites may share a zoo: its table keeps the rows of the others.

    Args:
        dataset: Hub id or folder, in place of the suite's.
        jobs: processes at a time; each gets its share of the cores unless OMP_NUM_THREADS is set.
        precision: as `--precision` takes it.
        device: as `--device` takes it.
        progress: say on standard error how each cell ended, and draw a bar.

    Raises:
        UsageError: the suite is wrong, or a finished folder of another suite or a folder that is no zoo is in the way;
            nothing was written.
        RunError: the zoo cannot be written. A cell that fails is not an error: its row says so.
        KeyboardInterrupt: the processes are stopped, and `zoo.json` says what was not run.
    """
    place = ZooSettings(
        output=output, dataset=dataset, precision=precision, device=device, threads=share_of_cores(jobs)
    )
    zoo = Zoo(load_suite(file), place)
    try:
        check_place(output)
        output.mkdir(parents=True, exist_ok=True)
        zoo.write()
        CellRunner(zoo, jobs, progress=progress).run()
    except OSError as error:
        raise RunError(f"cannot build the zoo in {output}: {error.strerror or error}") from error
    return zoo.outcome()
