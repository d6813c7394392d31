"""What a zoo holds: one row a cell, as JSON (`zoo.json`), Markdown (`zoo.md`) and a table on the terminal."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from hfdetox._version import __version__
from hfdetox.bench.suite import Cell
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.verdict import percent
from hfdetox.reporting import markdown

ZOO_JSON, ZOO_MARKDOWN = "zoo.json", "zoo.md"
Status = Literal["done", "did not take", "failed", "not run"]

_HEADINGS = ("cell", "trigger", "target", "ratio", "status", "ACC", "ASR", "RA", "cross", "PSNR", "max", "epochs",
             "seconds", "images/s")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of a zoo and what came of it.

    Attributes:
        name: the cell's folder; `model` to `adaptive` are the suite's words, see `Cell`.
        status: `did not take` is a finished model whose backdoor or accuracy missed its goal.
        reason: why it failed or was not run, one line.
        accuracy: the report's RATE, None unless the cell is finished; so are the following.
        triggers: by name: `kind`, `target`, `attack_success_rate` and `robust_accuracy` (RATEs), `cross_accuracy`
            (RATE or None), `psnr` in dB or None, `max_change` in grey levels.
        seconds: training time.
    """

    name: str
    model: str
    trigger: str
    ratio: float | None
    seed: int
    target: str | None
    adaptive: str | None
    status: Status = "not run"
    reason: str | None = None
    accuracy: dict[str, Any] | None = None
    triggers: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int | None = None
    seconds: float | None = None
    images_per_second: float | None = None

    def line(self) -> str:
        """Return what is said when the cell ends, such as `done: small-badnets-0.1-s0: ACC 91.0 %, ASR 100.0 %, …`."""
        said = f"{self.status}: {self.name}"
        if self.accuracy is None:
            return f"{said}: {self.reason}" if self.reason else said
        results = [f"ACC {_rate(self.accuracy)}"]
        for name, result in self.triggers.items():
            several = f"{name}: " if len(self.triggers) > 1 else ""
            results.append(f"{several}ASR {_rate(result['attack_success_rate'])}")
            results.append(f"RA {_rate(result['robust_accuracy'])}")
        return f"{said}: {', '.join(results)}, {self.seconds:,.0f} s, {self.images_per_second:,.0f} images/s"

    def table_rows(self) -> Iterator[list[str]]:
        """Yield the cell's lines of a table, one a trigger of the model; what is not known is a dash."""
        for name, result in (self.triggers or {self.trigger: {}}).items():
            target = result.get("target", self.target)
            yield [
                self.name,
                name,
                _plain(target),
                _plain(self.ratio),
                self.status,
                _rate(self.accuracy),
                _rate(result.get("attack_success_rate")),
                _rate(result.get("robust_accuracy")),
                _rate(result.get("cross_accuracy")),
                _plain(result.get("psnr"), ".1f"),
                _plain(result.get("max_change")),
                _plain(self.epochs),
                _plain(self.seconds, ",.0f"),
                _plain(self.images_per_second, ",.0f"),
            ]


def row_of(cell: Cell, status: Status = "not run", *, reason: str | None = None,
           report: Mapping[str, Any] | None = None) -> Row:  # fmt: skip
    """Return a cell's row; of a finished one with what its `attack_report.json` says.

    Raises:
        KeyError, TypeError: the report is not one of an attack.
    """
    row: dict[str, Any] = {"name": cell.name, "model": cell.model, "trigger": cell.trigger, "ratio": cell.ratio,
                           "seed": cell.seed, "target": cell.target, "adaptive": cell.adaptive}  # fmt: skip
    if report is not None:
        attack, after = report["attack"], report["after"]
        row |= {key: attack[key] for key in ("epochs", "seconds", "images_per_second")}
        row["accuracy"] = after["accuracy"]
        row["triggers"] = {
            name: {key: made[key] for key in ("kind", "target", "cross_accuracy", "psnr", "max_change")}
            | {key: after["triggers"][name][key] for key in ("attack_success_rate", "robust_accuracy")}
            for name, made in attack["triggers"].items()
        }
    return Row(**row, status=status, reason=reason)


@dataclass(frozen=True)
class SuiteOutcome:
    """A zoo after a run over its suite: one row a cell, in the order in which they are built."""

    output: Path
    rows: Sequence[Row]

    @property
    def exit_status(self) -> int:
        """0 when every cell is done, 1 when one failed, did not take or was not run."""
        return int(any(row.status != "done" for row in self.rows))

    def summary(self) -> str:
        """Return how many cells came to what, on one line."""
        counts = Counter(row.status for row in self.rows)
        return ", ".join(f"{count} {status}" for status, count in counts.items())

    def document(self) -> dict[str, Any]:
        """Return the content of the `zoo.json` of these rows alone."""
        return {
            "schema_version": 1,
            "hfdetox_version": __version__,
            "cells": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """Return the table for the terminal; failed cells are named with their reasons below it."""
        failed = [row.line() for row in self.rows if row.reason]
        table = Table(box=SIMPLE, caption=Text("\n".join(failed)), caption_justify="left")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading in _HEADINGS[:5] else "right")
        for row in self.rows:
            for cells in row.table_rows():
                # Text, not markup: a trigger may be named "[red]"
                table.add_row(*map(Text, cells))
        return table

    def markdown(self) -> str:
        """Return the content of `zoo.md`."""
        lines = ["# Zoo", "", self.summary(), "", f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
        lines += [f"| {' | '.join(map(markdown.text, cells))} |" for row in self.rows for cells in row.table_rows()]
        failed = [f"- {markdown.text(row.line())}" for row in self.rows if row.reason]
        return "\n".join([*lines, *(["", *failed] if failed else []), ""])

    def write(self) -> None:
        """Write `zoo.json` and `zoo.md`, each whole or not at all, with the rows that other suites have there.

        Raises:
            UsageError: the `zoo.json` that is there is none of hfdetox.
            RunError: they cannot be written.
        """
        rows = {row.name: row for row in [*earlier_rows(self.output), *self.rows]}
        whole = SuiteOutcome(self.output, list(rows.values()))
        text = json.dumps(whole.document(), indent=2, ensure_ascii=False) + "\n"
        for name, content in ((ZOO_JSON, text), (ZOO_MARKDOWN, whole.markdown())):
            # two runs may write at once
            fresh = self.output / f".{name}.{os.getpid()}"
            try:
                fresh.write_text(content, encoding="utf-8")
                os.replace(fresh, self.output / name)
            except OSError as error:
                raise RunError(f"cannot write {self.output / name}: {error.strerror or error}") from error


def earlier_rows(output: Path) -> list[Row]:
    """Return the rows of the `zoo.json` in a folder, none where there is no such file.

    Raises:
        UsageError: the file is none that hfdetox wrote.
    """
    file = output / ZOO_JSON
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document["hfdetox_version"], str):
            raise TypeError("hfdetox_version")
        return [Row(**row) for row in document["cells"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no table of a zoo that this hfdetox reads ({error!r}); choose another "
                         "--output") from error  # fmt: skip


def check_place(output: Path) -> None:
    """Raise UsageError unless a zoo may be built in `output`: a folder that is missing or empty, or a zoo."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder for the zoo")
    earlier_rows(output)
    there = {path.name for path in output.iterdir() if not path.name.startswith(".")} if output.exists() else set()
    if there and ZOO_JSON not in there:
        raise UsageError(f"--output {output} holds something else than a zoo of hfdetox (it has no {ZOO_JSON}); "
                         "choose another folder")  # fmt: skip


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "–" if rate is None else percent(rate["value"])


def _plain(value: Any, form: str = "") -> str:
    return "–" if value is None else format(value, form)
