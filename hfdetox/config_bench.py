"""The options of what runs a suite, declared as in `config.py`."""

from dataclasses import dataclass, field
from pathlib import Path

from hfdetox.arguments import Options, about, option
from hfdetox.config import HUB, IMAGES, RUN, Device, Precision


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(Options):
    """The arguments of `run_suite`: the tasks of a suite, and where and how they are run."""

    suite: Path | None = field(default=None, kw_only=False, metadata=about(
        IMAGES, "A suite file (YAML).", metavar="SUITE", path="file"))  # fmt: skip
    dataset: str | None = option(None, IMAGES, "Images of all runs, in place of the suite's: a Hub id or a folder.")
    jobs: int = option(1, RUN, "Runs at a time.", least=1, more="Each gets its share of the cores unless "
                       "OMP_NUM_THREADS is set.")  # fmt: skip
    precision: Precision = option("auto", RUN, "Mixed precision of the training.")
    device: Device = option("auto", RUN, "Where the runs are computed.")
    output: Path | None = option(None, HUB, "Folder of the reports, tables and pictures.", path="new",
                                 shown="SUITE-bench")  # fmt: skip
    progress: bool = option(False, None, "Say how each run ended, and draw a bar.")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(SuiteOptions):
    """The options of `hfdetox bench SUITE`, the arguments of `run_bench`."""

    zoo: Path | None = option(None, IMAGES, "Folder of the suite's models (hfdetox attack --suite).", path="folder")
    keep_models: bool = option(False, HUB, "Keep the cleaned models, not their reports and cards alone.")
    push_to: str | None = option(None, HUB, "Publish tables and reports there, as a dataset.", metavar="REPO")
    private: bool = option(False, HUB, "Make a new repository private.")
