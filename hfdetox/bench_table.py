"""What a bench found: one row a trial, as JSON (`bench.json`), CSV (`bench.csv`), Markdown (`bench.md`) and a table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

import hfdetox
from hfdetox import markdown
from hfdetox.bench_scores import HEADINGS, Line, averages, results
from hfdetox.errors import RunError, UsageError
from hfdetox.report import Measurement, Report
from hfdetox.trials import Trial
from hfdetox.verdict import percent

BENCH_JSON, BENCH_MARKDOWN, BENCH_CSV, PLOTS = "bench.json", "bench.md", "bench.csv", "plots"
Status = Literal["done", "failed", "not run"]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One trial and what came of it; the numbers are None unless it is done. Rates are fractions in [0, 1].

    Attributes:
        name: the trial's folder.
        subject: the model it was run on; `model` and `attack` say what that is.
        defense: the suite's name of the defence; `method` is the defence's own, with all of its settings.
        clean: whether the model is a clean control, which is in no average over attacks.
        reason: why it failed or was not run, one line.
        attack_success_before: mean over the model's triggers, None for a model without; so are those after it.
        der: defence effectiveness rating, mean over the triggers, with its 95 % interval over images.
        worst_class_before: lowest accuracy of a class.
        spread_before: standard deviation of the accuracies over the classes.
        seconds: of the method alone, without measuring.
        peak_memory: bytes, see the report.
    """

    name: str
    subject: str
    model: str
    attack: str
    defense: str
    samples: int | float
    seed: int
    clean: bool = False
    status: Status = "not run"
    reason: str | None = None
    method: str | None = None
    settings: dict[str, Any] | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    attack_success_before: float | None = None
    attack_success: float | None = None
    robust_accuracy_before: float | None = None
    robust_accuracy: float | None = None
    der: float | None = None
    der_low: float | None = None
    der_high: float | None = None
    worst_class_before: float | None = None
    worst_class: float | None = None
    spread_before: float | None = None
    spread: float | None = None
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    precision: str | None = None
    device: str | None = None

    def line(self) -> str:
        """Return what is said when the trial ends, such as `done: cell/ft-s0: ACC 91.0 %, ASR 3.0 %, DER 96.1 %, …`."""
        said = f"{self.status}: {self.name}"
        if self.accuracy is None or self.seconds is None:
            return f"{said}: {self.reason}" if self.reason else said
        attacked = [f"ASR {percent(self.attack_success)}"] if self.attack_success is not None else []
        rated = [f"DER {percent(self.der)}"] if self.der is not None else []
        return ", ".join([f"{said}: ACC {percent(self.accuracy)}", *attacked, *rated, f"{self.seconds:,.0f} s"])


def row_of(trial: Trial, status: Status = "not run", *, reason: str | None = None,
           report: Report | None = None) -> BenchRow:  # fmt: skip
    """Return a trial's row; of a finished one with what its report says."""
    row: dict[str, Any] = {
        "name": trial.name, "subject": trial.subject.name, "model": trial.subject.model,
        "attack": trial.subject.attack, "defense": trial.label, "samples": trial.samples, "seed": trial.seed,
        "clean": trial.subject.clean,
    }  # fmt: skip
    if report is not None and report.before is not None and report.after is not None:
        defense, rating = report.defense, (report.defense_effectiveness_rating or {}).get("mean")
        row |= {"method": defense.name, "settings": defense.parameters, "device": ", ".join(defense.devices)}
        row |= {key: getattr(defense, key) for key in ("epochs", "steps", "seconds", "images_per_second",
                                                       "peak_memory", "precision")}  # fmt: skip
        row |= {f"{key}_before": value for key, value in _rates(report.before).items()} | _rates(report.after)
        if rating is not None:
            row |= {"der": rating.value, "der_low": rating.interval[0], "der_high": rating.interval[1]}
    return BenchRow(**row, status=status, reason=reason)


def _rates(state: Measurement) -> dict[str, float]:
    """Return the rates of a measurement, those of triggers as their mean."""
    found = {"accuracy": state.accuracy.value}
    results = list(state.triggers.values())
    if results:
        found["attack_success"] = sum(r.attack_success_rate.value for r in results) / len(results)
        found["robust_accuracy"] = sum(r.robust_accuracy.value for r in results) / len(results)
    if state.classes is not None:
        found |= {"worst_class": state.classes.worst.value, "spread": state.classes.spread}
    return found


@dataclass(frozen=True)
class BenchOutcome:
    """A bench after a run over its suite: one row a trial, in the order in which they are run."""

    folder: Path
    suite: str
    rows: Sequence[BenchRow]

    @property
    def exit_status(self) -> int:
        """0 when every trial is done, 1 when one failed or was not run."""
        return int(any(row.status != "done" for row in self.rows))

    def summary(self) -> str:
        """Return how many trials came to what, on one line."""
        counts = Counter(row.status for row in self.rows)
        return ", ".join(f"{counts[status]} {status}" for status in ("done", "failed", "not run") if counts[status])

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the method and the settings of every defence that has a finished trial, by the suite's names."""
        return {row.defense: {"method": row.method, **row.settings} for row in self.rows if row.settings is not None}

    def document(self) -> dict[str, Any]:
        """Return the content of `bench.json`; the settings are told once for each defence."""
        trials = [{key: value for key, value in asdict(row).items() if key != "settings"} for row in self.rows]
        return {
            "schema_version": 1, "hfdetox_version": hfdetox.__version__, "suite": self.suite,
            "defenses": self.settings(), "averages": [line.document() for line in averages(self.rows)],
            "results": [line.document() for line in results(self.rows)], "trials": trials,
        }  # fmt: skip

    def table(self) -> Table:
        """Return the table for the terminal: the averages; what failed or was not run is named with reasons below."""
        table = Table(box=SIMPLE, caption=Text("\n".join(self._notes())), caption_justify="left")
        for heading in ("model", "attacks", *HEADINGS):
            table.add_column(heading, justify="left" if heading in ("model", "attacks", "defence") else "right")
        last = None
        for line in averages(self.rows):
            if last is not None and last != line.place:
                table.add_section()
            last = line.place
            # Text, not markup: a defence may be named "[red]"
            table.add_row(*map(Text, (line.model, str(len(line.attacks)), *line.cells())))
        return table

    def markdown(self) -> str:
        """Return the content of `bench.md`: averages, every model, the settings, and what failed."""
        lines = ["# Bench", "", self.summary(), "", _LEGEND, ""]
        for title, group in (("Averages", averages(self.rows)), ("Every model", results(self.rows))):
            lines += [f"## {title}", ""]
            for place in dict.fromkeys(line.place for line in group):
                lines += [
                    f"### {markdown.text(place)}",
                    "",
                    *_markdown_table([x for x in group if x.place == place]),
                    "",
                ]
        lines += ["## Settings", "", "Fixed by the suite before anything was run; no method sees a trigger.", ""]
        for name, settings in self.settings().items():
            shown = ", ".join(f"{key}={_plain(value)}" for key, value in settings.items() if key != "method")
            lines.append("- " + markdown.text(f"{name} ({settings['method']}): {shown}"))
        notes = [f"- {markdown.text(note)}" for note in self._notes()]
        return "\n".join([*lines, *(["", "## Failed or not run", "", *notes] if notes else []), ""])

    def csv(self) -> str:
        """Return the content of `bench.csv`: a line a trial; a cell that a spreadsheet would run is text."""
        stream = io.StringIO()
        names = [f.name for f in fields(BenchRow)]
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            plain = asdict(row) | {"settings": json.dumps(row.settings) if row.settings is not None else None}
            writer.writerow({key: f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
                             for key, value in plain.items()})  # fmt: skip
        return stream.getvalue()

    def write(self) -> None:
        """Write the three files, each whole or not at all; RunError when one cannot be."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False) + "\n"
        for name, content in ((BENCH_JSON, text), (BENCH_MARKDOWN, self.markdown()), (BENCH_CSV, self.csv())):
            fresh = self.folder / f".{name}.{os.getpid()}"
            try:
                fresh.write_text(content, encoding="utf-8")
                os.replace(fresh, self.folder / name)
            except OSError as error:
                raise RunError(f"cannot write {self.folder / name}: {error.strerror or error}") from error

    def _notes(self) -> list[str]:
        """Return a line for each failed trial, and one for those that were not run."""
        notes = [row.line() for row in self.rows if row.status == "failed"]
        left = Counter(row.reason or "not run yet" for row in self.rows if row.status == "not run")
        return notes + [f"not run: {count} ({reason})" for reason, count in left.items()]


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LEGEND = (
    "Rates in percent; ± is half a 95 % interval over seeds (Student's t). DER is the defence effectiveness rating, "
    "worst the accuracy of the worst class, spread the standard deviation over the classes; «× ft» the method's "
    "seconds over those of the suite's defence named ft on the same model; memory is the GPU's, or on a CPU the whole "
    "process's. Seeds that were not run on all "
    "models are left out («1 of 3»); a line with a failed run has no numbers."
)


def _markdown_table(lines: Sequence[Line]) -> list[str]:
    rows = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    return rows + [f"| {' | '.join(map(markdown.text, line.cells()))} |" for line in lines]


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def check_place(output: Path, suite: str, subjects: Collection[str]) -> None:
    """Raise UsageError unless the suite's bench may be run in `output`: a folder missing or empty, or its own bench.

    One without `bench.json` is its own where nothing is in it but folders of `subjects`, and tables to be made again.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder for the bench")
    there = {path.name for path in output.iterdir() if not path.name.startswith(".")} if output.exists() else set()
    foreign = sorted(there - set(subjects) - {BENCH_MARKDOWN, BENCH_CSV, PLOTS})
    if foreign and BENCH_JSON not in there:
        raise UsageError(f"--output {output} holds something else than this bench "
                         f"({markdown.one_line(foreign[0])}, and no {BENCH_JSON}); choose another folder")  # fmt: skip
    if BENCH_JSON in there:
        try:
            of = json.loads((output / BENCH_JSON).read_text(encoding="utf-8"))["suite"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{output / BENCH_JSON} is no table that this hfdetox reads ({error!r}); choose another "
                             "--output, or remove the file: the runs beside it are kept") from error  # fmt: skip
        if of != suite:
            raise UsageError(f"--output {output} is the bench of {of}; choose another folder, or remove its "
                             f"{BENCH_JSON} to make it that of {suite}: runs of equal settings are kept")  # fmt: skip
