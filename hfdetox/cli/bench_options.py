"""The options of `hfdetox bench` as a dataclass, like those of the other commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hfdetox.bench.suite_yaml import read_yaml
from hfdetox.config import ConsoleOptions, on_hub, on_images, on_run
from hfdetox.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ConsoleOptions):
    """The options of `hfdetox bench SUITE`."""

    suite: Annotated[
        Path | None,
        typer.Argument(metavar="SUITE", exists=True, dir_okay=False, show_default=False, help="A suite file (YAML)."),
    ] = None
    zoo: Annotated[
        Path | None,
        on_images("--zoo", exists=True, file_okay=False, help="Folder of the suite's models (hfdetox attack --suite)."),
    ] = None
    dataset: Annotated[
        str | None, on_images("--dataset", help="Images of all runs, in place of the suite's: a Hub id or a folder.")
    ] = None
    jobs: Annotated[int, on_run("--jobs", min=1, help="Runs at a time.")] = 1
    precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"], on_run("--precision", help="Mixed precision of the training.")
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], on_run("--device", help="Where the runs are computed.")
    ] = "auto"
    output: Annotated[
        Path | None, on_hub("--output", help="Folder of the reports, tables and pictures.", show_default="SUITE-bench")
    ] = None
    keep_models: Annotated[
        bool, on_hub("--keep-models", help="Keep the cleaned models, not their reports and cards alone.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `run_bench`; UsageError without a suite that can be read."""
        if self.suite is None:
            raise UsageError("SUITE is missing: name a suite file (see hfdetox bench --help)")
        # what is wrong with these is said before the libraries are loaded
        read_yaml(self.suite)
        names = ("zoo", "dataset", "jobs", "precision", "device", "keep_models")
        place = self.output if self.output is not None else Path(f"{self.suite.stem}-bench")
        for path in (place, *place.parents):
            if path.is_file():
                raise UsageError(f"--output {place}: {path} is a file; name a folder for the bench")
        return {"file": self.suite, "output": place, **{name: getattr(self, name) for name in names}}
