"""The numbers of a bench's tables: means over seeds with their intervals, averages over attacks, cost against FT."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from hfdetox._version import __version__
from hfdetox.bench.tables import Row, Tables, at_path, csv_table, redacted, rich_table, shown
from hfdetox.bench.tasks import BENCH_CSV, BENCH_FILES, BENCH_JSON, BENCH_MARKDOWN, TRIALS_CSV, Run
from hfdetox.defenses import parse_defense
from hfdetox.errors import UsageError
from hfdetox.evaluation.verdict import Verdict, percent
from hfdetox.hub.upload import PushResult
from hfdetox.reporting.report import Report

BEFORE = "before"  # the line of a model as it came
FINE_TUNING = "ft"  # the suite's name of the defense that costs are relative to
# what terminals have room for that are narrower than all headings
USUAL = ("defense", "seeds", "ACC", "ASR", "RA", "largest", "DER", "seconds", "× ft")
FEWER = ("defense", "seeds", "ACC", "ASR", "RA", "DER", "seconds", "× ft")
NARROW = ("defense", "seeds", "ACC", "ASR", "DER", "× ft")
HEADINGS = ("defense", "seeds", "ACC", "ASR", "RA", "largest", "excess", "DER", "worst", "spread", "seconds", "× ft",
            "memory")  # fmt: skip
_UNBOUND = 1000  # columns, more than any table has
RATES = ("accuracy", "attack_success", "robust_accuracy", "largest_share", "excess", "der", "worst_class", "spread")
# which verdict is counted beside which rate
REJECTED, REDIRECTED = (Verdict.REJECTED, "rejected"), (Verdict.REDIRECTED, "redirected")
FLAGS = {"accuracy": ("accuracy_verdict", *REJECTED), "attack_success": ("verdict", *REDIRECTED)}
# What a run's row says of its report, and where that lies there; rates are fractions in [0, 1].
_STATES = {
    "accuracy": "accuracy.value",
    # means over the model's triggers, None for a model without
    "attack_success": "triggers.*.attack_success_rate.value",
    "robust_accuracy": "triggers.*.robust_accuracy.value",
    # of what carries a trigger the largest share in any one class, and by how much the trigger raises that share; None
    # in reports of schema versions 1 and 2, and so are the verdicts
    "largest_share": "triggers.*.destination.rate.value",
    "excess": "triggers.*.destination.excess.value",
    # lowest accuracy of a class, and the standard deviation of the accuracies over the classes
    "worst_class": "classes.worst.value",
    "spread": "classes.spread",
}
# seconds of the method alone, without measuring; bytes of memory, see the report
_METHOD = ("epochs", "steps", "seconds", "images_per_second", "peak_memory", "precision")
MEASURED = {
    "method": "defense.name",  # the defense's own name, where `defense` is the suite's, with all of its settings
    "settings": "defense.parameters",
    **{f"{key}{when}": f"{state}.{path}" for key, path in _STATES.items()
       for when, state in (("_before", "before"), ("", "after"))},
    "accuracy_verdict": "accuracy_loss.verdict",
    # defense effectiveness rating, mean over the triggers, with its 95 % interval over images
    "der": "defense_effectiveness_rating.mean.value",
    "der_low": "defense_effectiveness_rating.mean.interval.0",
    "der_high": "defense_effectiveness_rating.mean.interval.1",
    **{key: f"defense.{key}" for key in _METHOD},
    "device": "defense.devices",
    "dataset": "dataset.id",  # of a folder the last part
    "clean_images": "dataset.clean_samples",
    "eval_images": "dataset.eval_samples",
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """A mean over seeds; `half_width` is half of its 95 % interval (Student's t), None for a single seed."""

    mean: float
    half_width: float | None = None


@dataclass(frozen=True)
class SummaryRow:
    """A line of a table: a defense on one attack, or on average over several.

    Attributes:
        model: the name of the model.
        attacks: what was done to it: one for a single result.
        defense: the suite's name of the defense; `before` is the model as it came.
        seeds: how many seeds the numbers are of, each run on all of the attacks.
        seeds_asked: how many seeds the suite asks for.
        scores: by rate, and `accuracy_lost` from before to after; empty while a run is missing.
        seconds: mean.
        cost: seconds as a multiple of plain fine-tuning's, the median over attacks; None where that was not run.
        peak_memory: most bytes of any run.
        flags: how many runs have a verdict of `FLAGS`, by its rate, such as `2 of 3 rejected`.
        missing: why there are no numbers, such as `1 failed, 2 not run`.
    """

    model: str
    attacks: tuple[str, ...]
    defense: str
    seeds: int = 0
    seeds_asked: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    seconds: float | None = None
    cost: float | None = None
    peak_memory: int | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None

    @property
    def place(self) -> str:
        """What the row is about, which the rows of one table share."""
        return f"{self.model}: {', '.join(self.attacks)}"

    def cells(self) -> list[str]:
        """Return the row's texts under `HEADINGS`; what is not known is a dash."""
        seeds = str(self.seeds) if self.seeds == self.seeds_asked else f"{self.seeds} of {self.seeds_asked}"
        name = [self.defense, seeds if self.seeds_asked else "–"]
        if self.missing is not None:
            return [*name, self.missing, *["–"] * (len(HEADINGS) - 3)]
        memory = self.peak_memory and f"{self.peak_memory / 2**30:.1f} GiB"
        return [*name, *map(self._rate, RATES), shown(self.seconds, ",.0f"), shown(self.cost, ".1f"), shown(memory)]

    def _rate(self, key: str) -> str:
        found = self.scores.get(key)
        half = "" if found is None or found.half_width is None else f" ± {100 * found.half_width:.1f}"
        flag = f" ({self.flags[key]})" if key in self.flags else ""
        return shown(found and percent(found.mean).removesuffix(" %")) + half + flag

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON types, each score under its own name."""
        plain = {**vars(self), "attacks": list(self.attacks)}
        last = {key: plain.pop(key) for key in ("seconds", "cost", "peak_memory", "flags", "missing")}
        return plain | {key: vars(score) for key, score in plain.pop("scores").items()} | last


def results(rows: Sequence[Row]) -> list[SummaryRow]:
    """Return the lines of every model: it as it came, then each defense, in the order of the bench's `rows`."""
    return [line for _, of_model in _frame(rows).groupby("subject", sort=False)
            for line in _lines(of_model, of_model["defense"].unique())]  # fmt: skip


def averages(rows: Sequence[Row]) -> list[SummaryRow]:
    """Return the averages over attacks: of one model, over the attacks that several defenses were asked to meet.

    Every set of attacks that some defense was asked for gets a table of the defenses that were asked for all of it, so
    that the averages in one table are over the same models. Clean baselines are in none, and the suite's subjects are
    not averaged: each is a model of its own, met by whatever triggers are known of it.
    """
    frame, lines = _frame(rows), []
    for _, of_model in frame[~frame["clean"].astype(bool)].groupby("model", sort=False):
        asked = of_model.groupby("defense", sort=False)["subject"].agg(frozenset)
        several = {subjects for subjects in asked if len(subjects) > 1}
        for subjects in sorted(several, key=lambda subjects: (len(subjects), sorted(subjects))):
            lines += _lines(of_model[of_model["subject"].isin(subjects)],
                            [name for name, of in asked.items() if subjects <= of])  # fmt: skip
    return lines


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, dtype=object)
    numbers = [*RATES, *(f"{rate}_before" for rate in RATES if rate != "der"), "seconds", "peak_memory"]
    frame[numbers] = frame[numbers].astype(float)
    return frame.assign(accuracy_lost=frame["accuracy_before"] - frame["accuracy"])


def _lines(frame: pd.DataFrame, defenses: Iterable[str]) -> list[SummaryRow]:
    """Return the line of the models as they came, where each has a finished run, and one line a defense."""
    attacks = tuple(frame.groupby("subject", sort=False)["attack"].first())
    row = SummaryRow(frame["model"].iloc[0], attacks, BEFORE)
    done = frame[frame["status"] == "done"]
    found = []
    if done["subject"].nunique() == len(attacks):
        # of a seed's runs any: they measured the same model on the same images, which hang on the seed
        any_of_seed = done.drop_duplicates(["subject", "seed"], keep="last")
        rates = any_of_seed.filter(regex="_before$").dropna(axis="columns")
        means = rates.groupby(any_of_seed["subject"]).mean().mean()
        found = [replace(row, scores={key.removesuffix("_before"): Score(mean) for key, mean in means.items()})]
    return found + [_line(replace(row, defense=name), frame) for name in defenses]


def _line(row: SummaryRow, frame: pd.DataFrame) -> SummaryRow:
    """Return a defense's line with its numbers over all models of `frame`.

    Seeds that were not run on all of the models are left out and counted; where a run failed there are no numbers.
    """
    runs = frame[frame["defense"] == row.defense]
    done = runs[runs["status"] == "done"]
    models = done.groupby("seed")["subject"].nunique()
    whole = models.index[models == len(row.attacks)]
    row = replace(row, seeds=len(whole), seeds_asked=runs["seed"].nunique())
    if "failed" in (statuses := runs["status"].value_counts()) or whole.empty:
        missing = ", ".join(f"{statuses[status]} {status}" for status in ("failed", "not run") if status in statuses)
        return replace(row, missing=missing or "not the same seeds")
    done = done[done["seed"].isin(whole)]
    # the average over attacks is formed seed by seed: what is left to vary is the seed
    of_seeds = done[[*RATES, "accuracy_lost"]].dropna(axis="columns").groupby(done["seed"]).mean()
    half_widths = stdtrit(len(whole) - 1, 0.975) * of_seeds.sem() if len(whole) > 1 else {}
    scores = {key: Score(mean, half_widths.get(key)) for key, mean in of_seeds.mean().items()}
    counts = {key: (done[column] == verdict).sum() for key, (column, verdict, _) in FLAGS.items()}
    flags = {key: f"{count} of {len(done)} {FLAGS[key][2]}" for key, count in counts.items() if count}
    memory = done["peak_memory"].max()
    return replace(row, scores=scores, flags=flags, seconds=float(done["seconds"].mean()), cost=_cost(done, frame),
                   peak_memory=None if np.isnan(memory) else int(memory))  # fmt: skip


def _cost(done: pd.DataFrame, frame: pd.DataFrame) -> float | None:
    """Return a defense's seconds over those of plain fine-tuning on the same model and images: the median over models.

    Runs that share a machine slow each other down, some of them by far.
    """
    name, samples = done["defense"].iloc[0], done["samples"].iloc[0]
    # a defense's name ends with the number of images where that is not the usual one
    base = FINE_TUNING + name[len(name.removesuffix(f"-n{samples}")) :]
    tuned = frame[(frame["defense"] == base) & (frame["samples"] == samples) & (frame["status"] == "done")]
    ratios = done.groupby("subject")["seconds"].mean() / tuned.groupby("subject")["seconds"].mean()
    return float(ratios.median()) if np.isfinite(ratios).all() else None


@dataclass(frozen=True)
class BenchTables(Tables):
    """A bench after a run over its suite.

    A row's `subject` is the model that a defense was tried on, `model` and `attack` say what that is; `clean` is
    whether it is a clean baseline, which is in no average over attacks. `defense` is the suite's name of the defense.

    Attributes:
        pushed: where the bench was published; None where it was not.
    """

    title = "bench"
    files = BENCH_FILES

    pushed: PushResult | None = None

    @staticmethod
    def row(task: Run, status: str = "not run", reason: str | None = None, report: Report | None = None) -> Row:
        """Return a run's row; of a finished one with what its report says."""
        method, target = parse_defense(task.entry.defense, task.entry.settings)[0], task.target
        row = {"name": task.name, "subject": target.name, "model": target.model, "attack": target.attack,
               "defense": task.label, "samples": task.samples, "seed": task.seed, "clean": target.clean,
               "status": status, "reason": reason, **dict.fromkeys(MEASURED), "verdict": None,
               "method": method.name, "settings": method.settings()}  # fmt: skip
        if report is None or report.before is None or report.after is None:
            return row
        plain = report.to_dict()
        found = {column: at_path(plain, path) for column, path in MEASURED.items()}
        return {**row, **found, "status": "done", "device": ", ".join(found["device"]), "verdict": report.verdict,
                "dataset": redacted([str(found["dataset"])])[0]}  # fmt: skip

    @staticmethod
    def numbers(row: Row) -> list[str]:
        """Return the rates after the defense, and its seconds."""
        rates = {"ACC": row["accuracy"], "ASR": row["attack_success"], "DER": row["der"]}
        found = [f"{name} {percent(rate)}" for name, rate in rates.items() if rate is not None]
        seconds = [] if row["seconds"] is None else [f"{row['seconds']:,.0f} s"]
        return found + seconds + [str(verdict) for column, verdict, _ in FLAGS.values() if row[column] == verdict]

    @cached_property
    def averages(self) -> list[SummaryRow]:
        """The lines over several attacks."""
        return averages(self.rows)

    @cached_property
    def results(self) -> list[SummaryRow]:
        """The lines of every model."""
        return results(self.rows)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the method and the settings of every defense, by the suite's names."""
        return {row["defense"]: {"method": row["method"], **row["settings"]} for row in self.rows}

    def document(self) -> dict[str, Any]:
        """Return the content of `bench.json`; the settings are told once for each defense."""
        trials = [{key: value for key, value in row.items() if key != "settings"} for row in self.rows]
        return {
            "schema_version": 1, "hfdetox_version": __version__, "suite": self.suite,
            "measured": self.measured(), "defenses": self.settings(),
            "averages": [line.document() for line in self.averages],
            "results": [line.document() for line in self.results], "trials": trials,
        }  # fmt: skip

    def read(self, document: Any) -> tuple[str, set[str]]:
        """Return the suite of a `bench.json`, and the names of the runs that were done."""
        return document["suite"], {run["name"] for run in document["trials"] if run["status"] == "done"}

    def check_place(self, tasks: Collection[str]) -> None:
        """Raise UsageError also where the folder is the bench of another suite."""
        super().check_place(tasks)
        of, done = self.earlier() or (self.suite, set())
        # a suite of the same name may be another one
        if of != self.suite or (done and done.isdisjoint(tasks)):
            whose = f"another {of}" if of == self.suite else of
            raise UsageError(f"--output {self.folder} is the bench of {whose}; choose another folder, or remove its "
                             f"{BENCH_JSON} to make it that of {self.suite}: equal runs are kept")  # fmt: skip

    def measured(self) -> dict[str, list[Any]]:
        """Return on what the finished runs were run and measured; several values where they differ."""
        done = [row for row in self.rows if row["status"] == "done"]
        keys = ("dataset", "clean_images", "eval_images", "precision", "device")
        # a method that trains nothing has no precision
        return {key: [v for v in dict.fromkeys(row[key] for row in done) if v not in (None, "")] for key in keys}

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show a table for each model and average, fewer columns on a narrow terminal, and what failed with reasons."""
        for headings in (HEADINGS, USUAL, FEWER, NARROW):
            tables = list(self._tables(headings))
            # numbers are never cut, and all tables have the same columns
            if all(console.measure(table, options=options.update_width(_UNBOUND)).maximum <= options.max_width
                   for table in tables):  # fmt: skip
                break
        yield from tables
        yield from map(Text, [*self._notes(), self.about()])
        changed = []
        for name, settings in self.settings().items():
            default = parse_defense(settings["method"])[0].settings()
            others = {key: value for key, value in settings.items() if default.get(key, value) != value}
            changed.append(f"{name}: {_listed(others, ' ') or 'none'}")
        yield Text(f"settings other than the papers': {'; '.join(changed)}")

    def _tables(self, headings: Sequence[str]) -> Iterator[Table]:
        for place, lines in groupby([*self.results, *self.averages], key=lambda line: line.place):
            cells = [dict(zip(HEADINGS, line.cells(), strict=True)) for line in lines]
            table = rich_table(headings, [[row[key] for key in headings] for row in cells], ["defense"], title=place)
            for column in table.columns:
                # what has no room in the narrowest is the name
                column.no_wrap, column.overflow = column.header != "defense", "fold"
            yield table

    def problems(self) -> str | None:
        """Return on one line what failed or was not run, None where all is done."""
        return f"{self.summary()}: {'; '.join(self._notes())}" if self.exit_status else None

    def texts(self) -> dict[str, str]:
        """Return the contents of `bench.md`, `bench.csv` (a line each of its lines) and `trials.csv` (a line a run)."""
        trials = [row | {"settings": json.dumps(row["settings"])} for row in self.rows]
        lines = [_csv_row(table, line) for table, group in (("average", self.averages), ("model", self.results))
                 for line in group]  # fmt: skip
        return {BENCH_MARKDOWN: self.markdown(), BENCH_CSV: csv_table(lines), TRIALS_CSV: csv_table(trials)}

    def markdown(self) -> str:
        """Return the content of `bench.md`: averages, every model, the settings, and what failed."""
        groups = {title: [(place, list(lines)) for place, lines in groupby(group, key=lambda line: line.place)]
                  for title, group in (("Averages", self.averages), ("Every model", self.results))}  # fmt: skip
        settings = [{"name": name, "trigger": own.get("trigger"), "method": own.pop("method"),
                           "listed": _listed(own, ", ")} for name, own in self.settings().items()]  # fmt: skip
        return self.rendered("bench.md.jinja", headings=HEADINGS, groups=groups, settings=settings, notes=self._notes())

    def _notes(self) -> list[str]:
        """Return a line for each failed run, and one for those that were not run."""
        notes = [self.line(row) for row in self.rows if row["status"] == "failed"]
        left = Counter(row["reason"] or "not run yet" for row in self.rows if row["status"] == "not run")
        return notes + [f"not run: {count} ({reason})" for reason, count in left.items()]


def _csv_row(table: str, line: SummaryRow) -> dict[str, Any]:
    """Return a line of the tables for a CSV file, with rates as fractions."""
    row = {"table": table, **replace(line, scores={}).document(), "attacks": "; ".join(line.attacks)}
    for key in RATES:
        found = line.scores.get(key)
        row |= {key: found and found.mean, f"{key}_half_width": found and found.half_width}
    return row


def _listed(settings: Mapping[str, Any], between: str) -> str:
    return between.join(f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
                        for key, value in settings.items())  # fmt: skip
