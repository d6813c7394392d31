"""The folder of a zoo: what each cell's command is, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hfdetox.attacks import parse_attack_settings
from hfdetox.bench.cells import CellFolder, portable
from hfdetox.bench.suite import Cell, Suite
from hfdetox.bench.suite_yaml import SuiteError
from hfdetox.bench.zoo_table import Row, SuiteOutcome, row_of
from hfdetox.config import NONE
from hfdetox.errors import UsageError
from hfdetox.hub.checksums import sha256_file
from hfdetox.reporting.report import ATTACK_REPORT_NAME
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import TRIGGERS, parse_triggers


@dataclass(frozen=True, kw_only=True)
class ZooSettings:
    """Where and how the cells of a suite are run.

    Attributes:
        output: the zoo's folder.
        dataset: Hub id or folder, in place of the suite's.
        precision: of the training, as `--precision` takes it.
        device: as `--device` takes it; not a part of what a cell is.
        threads: of one process, None leaves them to the environment.
    """

    output: Path
    dataset: str | None = None
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None


class Zoo(CellFolder[Cell, Row]):
    """The folder of a suite's models, and the state of every cell.

    Raises:
        UsageError: no dataset; a setting, or a clean model that a cell is made on, is not known; a folder is there
            that another suite made.
    """

    title = "zoo"

    def __init__(self, suite: Suite, place: ZooSettings) -> None:
        self.suite, self.place = suite, place
        self.folder, self.threads = place.output, place.threads
        self.dataset = place.dataset or suite.dataset.id
        if self.dataset is None:
            raise UsageError(f"{suite.file} names no dataset: add one to it, or give --dataset")
        self.cells = {cell.name: cell for cell in suite.cells()}
        self._controls = {name: self._control(cell) for name, cell in self.cells.items()}
        self.rows: dict[str, Row] = {name: self.row(cell) for name, cell in self.cells.items()}

    def command(self, cell: Cell) -> list[str]:
        """Return the words after `hfdetox` that make a cell, without where it goes and what it is made on."""
        entry = cell.entry
        words = ["attack", entry.model, "--dataset", str(self.dataset), "--seed", str(cell.seed)]
        words += self._dataset_options()
        words += [w for key, value in entry.model_args.items() for w in ("--model-arg", f"{key}={json.dumps(value)}")]
        words += ["--input-size", str(entry.input_size)] if entry.input_size is not None else []
        words += ["--init", entry.init] if entry.init is not None else []
        words += [w for spec in cell.specs or (NONE,) for w in ("--trigger", spec)]
        words += ["--poison-ratio", repr(cell.ratio)] if cell.ratio is not None else []
        words += ["--target", cell.target] if cell.target is not None else []
        words += ["--adaptive", cell.adaptive] if cell.adaptive is not None else []
        words += [w for key, value in cell.settings.items() for w in ("--set", f"{key}={value}")]
        return words + (["--precision", self.place.precision] if self.place.precision != "auto" else [])

    def _dataset_options(self) -> Iterator[str]:
        entry = self.suite.dataset
        for option in fields(entry):
            value = getattr(entry, option.name)
            # a revision is that of the suite's own dataset
            if option.name == "id" or value is None or (option.name == "revision" and self.place.dataset):
                continue
            flag = "dataset-revision" if option.name == "revision" else option.name.replace("_", "-")
            yield from (f"--{flag}", str(value))

    def recorded(self, cell: Cell) -> dict[str, Any]:
        """Return what NAME.json says of a cell: its command, without where on this machine things lie, and its sources.

        `files` are the SHA-256 of the trigger files and pictures that it names, `surrogate_weights` that of the clean
        model it is made on, None where there is none (yet).
        """
        control = self.surrogate(cell)
        return {
            "schema_version": 1, "command": portable(self.command(cell)), "surrogate": control,
            "files": [sha256_file(path) for path in given_files(cell.specs)],
            "surrogate_weights": None if control is None else self._weights(control),
        }  # fmt: skip

    def _weights(self, control: str) -> Any:
        try:
            report = json.loads((self.folder / control / ATTACK_REPORT_NAME).read_text(encoding="utf-8"))
            return report["output"]["weights_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def surrogate(self, cell: Cell) -> str | None:
        """Return the name of the clean baseline that a cell is made on, None for one that is made on none."""
        return self._controls[cell.name]

    def _control(self, cell: Cell) -> str | None:
        where = f"{self.suite.file}: cell {cell.name}"
        try:
            triggers = parse_triggers(cell.specs)
            _, recipes = parse_attack_settings([trigger.kind for trigger in triggers], cell.settings)
            parse_adaptive(cell.adaptive)
        except UsageError as error:
            raise SuiteError(f"{where}: {error}") from error
        if not any(recipes[trigger.kind].on_clean_model(trigger) for trigger in triggers):
            return None
        if cell.control not in self.cells:
            if not cell.entry.from_scratch:
                return None  # a trained model is clean before the attack
            raise SuiteError(f"{where} is made on a clean model: add the trigger none for model {cell.model} and seed "
                             f"{cell.seed} to a grid")  # fmt: skip
        return cell.control

    def row(self, cell: Cell) -> Row:
        """Return a cell as it lies in the zoo: `done`, `did not take` or `not run`.

        Raises:
            UsageError: its folder was made by another command or of other sources, or its report cannot be read.
        """
        folder = self.folder / cell.name
        file = folder / ATTACK_REPORT_NAME
        if not file.is_file():
            return row_of(cell)
        if wrong := self._difference(cell, self.made(cell)):
            raise UsageError(f"{folder} is a finished model that {wrong}; it is not replaced: choose another --output, "
                             "or remove the folder to build the cell again")  # fmt: skip
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            return row_of(
                cell,
                "done" if report["succeeded" if "succeeded" in report else "took"] else "did not take",
                report=report,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} cannot be read ({error!r}); remove the folder to build the cell again") from error

    def _difference(self, cell: Cell, made: Any) -> str | None:
        """Return what is wrong with a finished cell whose NAME.json says `made`, None for nothing.

        What an earlier version did not write, and a clean model that is not there, are held against nothing.
        """
        expected = self.recorded(cell)
        sources = {key: expected.pop(key) for key in ("files", "surrogate_weights")}
        if not isinstance(made, dict) or {key: made[key] for key in made if key not in sources} != expected:
            return "another suite or command made"
        other = [key for key, value in sources.items() if value is not None and made.get(key, value) != value]
        return "was made with other trigger files or on another clean model" if other else None

    def failed(self, cell: Cell, reason: str) -> Row:
        """Return the row of a cell that failed."""
        return row_of(cell, "failed", reason=reason)

    def words(self, cell: Cell) -> list[str]:
        """Return the words after `hfdetox` of the cell's process."""
        words = [*self.command(cell), "--output", str(self.folder / cell.name)]
        if (surrogate := self.surrogate(cell)) is not None:
            words += ["--surrogate", str(self.folder / surrogate)]
        return words + (["--device", self.place.device] if self.place.device != "auto" else [])

    def obstacle(self, cell: Cell) -> str | None:
        """Return what is said of a cell whose clean model failed."""
        control = self.surrogate(cell)
        broken = control is not None and self.rows[control].status == "failed"
        return f"its clean model {control} failed" if broken else None

    def later(self, cell: Cell) -> bool:
        """Return whether the clean model that a cell is made on is not there yet."""
        control = self.surrogate(cell)
        return control is not None and self.rows[control].status == "not run"

    def outcome(self) -> SuiteOutcome:
        """Return the zoo's rows as they are now."""
        return SuiteOutcome(self.folder, list(self.rows.values()))

    def write(self) -> None:
        """Write the zoo's table."""
        self.outcome().write()


def given_files(specs: Sequence[str]) -> Iterator[Path]:
    """Yield the trigger files and pictures that specifications name."""
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if spec.endswith(".safetensors"):
            yield Path(spec)
        else:
            pairs = [item.partition("=") for item in rest.split(",")]
            yield from (Path(value) for key, _, value in pairs if key in TRIGGERS[kind].tensor_fields())
