"""What a bench found: one row a trial, as JSON (`bench.json`), CSV (`bench.csv`), Markdown (`bench.md`) and a table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hfdetox._version import __version__
from hfdetox.bench.cells import portable
from hfdetox.bench.scores import HEADINGS, NARROW, RATES, USUAL, Line, averages, results
from hfdetox.bench.trials import Trial
from hfdetox.defenses import parse_defense
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.results import Measurement
from hfdetox.evaluation.verdict import percent
from hfdetox.reporting import markdown
from hfdetox.reporting.report import Report

BENCH_JSON, BENCH_MARKDOWN, BENCH_CSV, TRIALS_CSV = "bench.json", "bench.md", "bench.csv", "trials.csv"
PLOTS = "plots"
OWN_FILES = frozenset({BENCH_JSON, BENCH_MARKDOWN, BENCH_CSV, TRIALS_CSV, PLOTS})
Status = Literal["done", "failed", "not run"]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One trial and what came of it; the numbers are None unless it is done. Rates are fractions in [0, 1].

    Attributes:
        name: the trial's folder.
        subject: the model it was run on; `model` and `attack` say what that is.
        defense: the suite's name of the defense; `method` is the defense's own, with all of its settings.
        dataset: of a finished trial the id, of a folder the last part; `clean_images` and `eval_images` are counts.
        clean: whether the model is a clean baseline, which is in no average over attacks.
        reason: why it failed or was not run, one line.
        attack_success_before: mean over the model's triggers, None for a model without; so are those after it.
        der: defense effectiveness rating, mean over the triggers, with its 95 % interval over images.
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
    dataset: str | None = None
    clean_images: int | None = None
    eval_images: int | None = None

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
    method, _ = parse_defense(trial.entry.defense, trial.entry.settings)
    row: dict[str, Any] = {
        "name": trial.name, "subject": trial.subject.name, "model": trial.subject.model,
        "attack": trial.subject.attack, "defense": trial.label, "samples": trial.samples, "seed": trial.seed,
        "clean": trial.subject.clean, "method": method.name, "settings": method.settings(),
    }  # fmt: skip
    if report is not None and report.before is not None and report.after is not None:
        defense, rating = report.defense, (report.defense_effectiveness_rating or {}).get("mean")
        row |= {"method": defense.name, "settings": defense.parameters, "device": ", ".join(defense.devices)}
        row |= {"dataset": portable([report.dataset.id])[0], "clean_images": report.dataset.clean_samples,
                "eval_images": report.dataset.eval_samples}  # fmt: skip
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
        """Return the method and the settings of every defense, by the suite's names."""
        return {row.defense: {"method": row.method, **row.settings} for row in self.rows if row.settings is not None}

    def document(self) -> dict[str, Any]:
        """Return the content of `bench.json`; the settings are told once for each defense."""
        trials = [{key: value for key, value in asdict(row).items() if key != "settings"} for row in self.rows]
        return {
            "schema_version": 1, "hfdetox_version": __version__, "suite": self.suite,
            "measured": self.measured(), "defenses": self.settings(),
            "averages": [line.document() for line in averages(self.rows)],
            "results": [line.document() for line in results(self.rows)], "trials": trials,
        }  # fmt: skip

    def measured(self) -> dict[str, list[Any]]:
        """Return on what the finished trials were run and measured; several values where they differ."""
        done = [row for row in self.rows if row.status == "done"]
        keys = ("dataset", "clean_images", "eval_images", "precision", "device")
        # a method that trains nothing has no precision
        return {
            key: [v for v in dict.fromkeys(getattr(row, key) for row in done) if v not in (None, "")] for key in keys
        }

    def about(self) -> str:
        """Return what `measured` says, on one line."""
        words = {"no": "float32"}
        data, clean, held, precision, device = (
            " or ".join(f"{value:,}" if isinstance(value, int) else words.get(value, value) for value in values)
            for values in self.measured().values()
        )
        if not data:
            return "nothing is measured yet"
        return f"{data}: {clean} clean images, measured on {held}; trained in {precision} on {device}"

    def tables(self) -> BenchTables:
        """Return what the terminal shows: every model, the averages; what failed or was not run, with reasons."""
        notes = [*self._notes(), self.about(), f"settings other than the papers': {'; '.join(self._changed())}"]
        return BenchTables([*results(self.rows), *averages(self.rows)], notes)

    def problems(self) -> str | None:
        """Return on one line what failed or was not run, None where all is done."""
        if not self.exit_status:
            return None
        return f"{self.summary()}: {'; '.join(self._notes())}"

    def markdown(self) -> str:
        """Return the content of `bench.md`: averages, every model, the settings, and what failed."""
        lines = ["# Bench", "", self.summary(), "", markdown.text(self.about()), "", _LEGEND, ""]
        for title, group in (("Averages", averages(self.rows)), ("Every model", results(self.rows))):
            lines += [f"## {title}", ""]
            for place in dict.fromkeys(line.place for line in group):
                lines += [
                    f"### {markdown.text(place)}",
                    "",
                    *_markdown_table([x for x in group if x.place == place]),
                    "",
                ]
        lines += ["## Settings", "", f"Fixed by the suite before anything was run; {self._knowing()}.", ""]
        for name, settings in self.settings().items():
            shown = ", ".join(f"{key}={_plain(value)}" for key, value in settings.items() if key != "method")
            lines.append("- " + markdown.text(f"{name} ({settings['method']}): {shown}"))
        notes = [f"- {markdown.text(note)}" for note in self._notes()]
        return "\n".join([*lines, *(["", "## Failed or not run", "", *notes] if notes else []), ""])

    def lines_csv(self) -> str:
        """Return the content of `bench.csv`: the lines of the tables, with rates as fractions."""
        rows = []
        for kind, group in (("average", averages(self.rows)), ("model", results(self.rows))):
            for line in group:
                row = {"table": kind, **line.document(), "attacks": "; ".join(line.attacks)}
                row = {key: value for key, value in row.items() if key not in line.scores}
                for key in RATES:
                    found = line.scores.get(key)
                    row |= {key: found and found.mean, f"{key}_half_width": found and found.half_width}
                rows.append(row)
        return _csv(rows)

    def trials_csv(self) -> str:
        """Return the content of `trials.csv`: a line a trial."""
        return _csv([asdict(row) | {"settings": json.dumps(row.settings)} for row in self.rows])

    def write(self) -> None:
        """Write the four files, each whole or not at all; RunError when one cannot be."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False) + "\n"
        contents = {BENCH_JSON: text, BENCH_MARKDOWN: self.markdown(), BENCH_CSV: self.lines_csv(),
                    TRIALS_CSV: self.trials_csv()}  # fmt: skip
        for name, content in contents.items():
            fresh = self.folder / f".{name}.{os.getpid()}"
            try:
                fresh.write_text(content, encoding="utf-8")
                os.replace(fresh, self.folder / name)
            except OSError as error:
                raise RunError(f"cannot write {self.folder / name}: {error.strerror or error}") from error

    def _changed(self) -> list[str]:
        """Return of every defense the settings that are not its method's defaults, such as `d3: epochs=20`."""
        said = []
        for name, settings in self.settings().items():
            default = parse_defense(settings["method"])[0].settings()
            changed = [f"{key}={_plain(value)}" for key, value in settings.items() if default.get(key, value) != value]
            said.append(f"{name}: {' '.join(changed) or 'none'}")
        return said

    def _knowing(self) -> str:
        """Return which defenses were given a trigger."""
        told = [name for name, settings in self.settings().items() if settings.get("trigger")]
        return f"given a trigger: {markdown.text(', '.join(told))}" if told else "no method sees a trigger"

    def _notes(self) -> list[str]:
        """Return a line for each failed trial, and one for those that were not run."""
        notes = [row.line() for row in self.rows if row.status == "failed"]
        left = Counter(row.reason or "not run yet" for row in self.rows if row.status == "not run")
        return notes + [f"not run: {count} ({reason})" for reason, count in left.items()]


@dataclass(frozen=True)
class BenchTables:
    """The tables of a terminal, one for each model and attack or set of attacks; a narrow one has fewer columns."""

    lines: Sequence[Line]
    notes: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbound = options.update_width(_UNBOUND)
        for headings in (HEADINGS, USUAL, NARROW):
            tables = self._tables(headings)
            # numbers are never cut, and all tables have the same columns
            if all(console.measure(table, options=unbound).maximum <= options.max_width for table in tables):
                break
        yield from tables
        yield from map(Text, self.notes)

    def _tables(self, headings: Sequence[str]) -> list[Table]:
        tables = []
        for place in dict.fromkeys(line.place for line in self.lines):
            # Text, not markup: a defense may be named "[red]"
            table = Table(box=SIMPLE, title=Text(place), title_justify="left")
            for heading in headings:
                # what has no room in the narrowest is the name
                name = heading == "defense"
                table.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
            for line in self.lines:
                if line.place == place:
                    cells = dict(zip(HEADINGS, line.cells(), strict=True))
                    table.add_row(*(Text(cells[heading]) for heading in headings))
            tables.append(table)
        return tables


_UNBOUND = 1000  # columns, more than any table has
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LEGEND = (
    "Rates in percent; ± is half a 95 % interval over seeds (Student's t: of two or three seeds so wide that it may "
    "reach beyond 0 and 100). DER is the defense effectiveness rating, worst the accuracy of the worst class, "
    "spread the standard deviation over the classes; '× ft' the method's seconds over those of the suite's defense "
    "named ft on the same model, the median over attacks. Runs that share a machine (`--jobs`) slow each other "
    "down, so seconds are rough. Memory is the GPU's, or on a CPU the most that the process held since its start. "
    "Seeds that were not run on all models are left out ('1 of 3'); a line with a failed run has no numbers."
)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as CSV; a cell that a spreadsheet would run is text."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
                         for key, value in row.items()})  # fmt: skip
    return stream.getvalue()


def _markdown_table(lines: Sequence[Line]) -> list[str]:
    rows = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    return rows + [f"| {' | '.join(map(markdown.text, line.cells()))} |" for line in lines]


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def check_place(output: Path, suite: str, trials: Collection[str]) -> None:
    """Raise UsageError unless the suite's bench may be run in `output`: a folder missing or empty, or its own bench.

    One without `bench.json` is its own where nothing is in it but folders of `trials`, and tables to be made again.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder for the bench")
    there = {path.name for path in output.iterdir() if not path.name.startswith(".")} if output.exists() else set()
    foreign = sorted(there - {name.split("/")[0] for name in trials} - OWN_FILES)
    if foreign and BENCH_JSON not in there:
        raise UsageError(f"--output {output} holds something else than this bench "
                         f"({markdown.one_line(foreign[0])}, and no {BENCH_JSON}); choose another folder")  # fmt: skip
    if BENCH_JSON in there:
        try:
            table = json.loads((output / BENCH_JSON).read_text(encoding="utf-8"))
            of, done = table["suite"], {trial["name"] for trial in table["trials"] if trial["status"] == "done"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{output / BENCH_JSON} is no table that this hfdetox reads ({error!r}); choose another "
                             "--output, or remove the file: the runs beside it are kept") from error  # fmt: skip
        # a suite of the same name may be another one
        if of != suite or (done and done.isdisjoint(trials)):
            whose = f"another {of}" if of == suite else of
            raise UsageError(f"--output {output} is the bench of {whose}; choose another folder, or remove its "
                             f"{BENCH_JSON} to make it that of {suite}: runs of equal settings are kept")  # fmt: skip
