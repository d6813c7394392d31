"""The numbers of a bench's tables: means over seeds with their intervals, averages over attacks, cost against FT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from hfdetox.evaluation.verdict import percent

if TYPE_CHECKING:
    from hfdetox.bench.tables import BenchRow

BEFORE = "before"  # the line of a model as it came
FINE_TUNING = "ft"  # the suite's name of the defense that costs are relative to
# what terminals have room for that are narrower than all headings
USUAL = ("defense", "seeds", "ACC", "ASR", "RA", "DER", "seconds", "× ft")
NARROW = ("defense", "seeds", "ACC", "ASR", "DER", "× ft")
HEADINGS = ("defense", "seeds", "ACC", "ASR", "RA", "DER", "worst", "spread", "seconds", "× ft", "memory")
RATES = ("accuracy", "attack_success", "robust_accuracy", "der", "worst_class", "spread")
_RATES_BEFORE = ("accuracy", "attack_success", "robust_accuracy", "worst_class", "spread")


@dataclass(frozen=True)
class Score:
    """A mean over seeds; `half_width` is half of its 95 % interval (Student's t), None for a single seed."""

    mean: float
    half_width: float | None


def score(values: Sequence[float]) -> Score:
    """Return the mean of one value a seed, at least one, with its interval: t(0.975, n − 1) · s / √n on each side."""
    count = len(values)
    if count == 1:
        return Score(float(values[0]), None)
    spread = float(np.std(values, ddof=1))
    return Score(float(np.mean(values)), float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count))


@dataclass(frozen=True)
class Line:
    """A line of a table: a defense on one attack, or on average over several.

    Attributes:
        model: the name of the model.
        attacks: what was done to it: one for a single result.
        defense: the suite's name of the defense; `before` is the model as it came.
        seeds: how many seeds the numbers are of, each run on all of the attacks.
        asked: how many seeds the suite asks for.
        scores: by rate, and `accuracy_lost` from before to after; empty while a trial is missing.
        seconds: mean.
        cost: seconds as a multiple of plain fine-tuning's, the median over attacks; None where that was not run.
        peak_memory: most bytes of any trial.
        missing: why there are no numbers, such as `1 failed, 2 not run`.
    """

    model: str
    attacks: tuple[str, ...]
    defense: str
    seeds: int
    asked: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    seconds: float | None = None
    cost: float | None = None
    peak_memory: int | None = None
    missing: str | None = None

    @property
    def place(self) -> str:
        """What the line is about, which the lines of one table share."""
        return f"{self.model}: {', '.join(self.attacks)}"

    def cells(self) -> list[str]:
        """Return the line's texts under `HEADINGS`; what is not known is a dash."""
        if self.missing is not None:
            return [self.defense, self._seeds(), self.missing, *["–"] * (len(HEADINGS) - 3)]
        rest = [_number(self.seconds, ",.0f"), _number(self.cost, ".1f"), _memory(self.peak_memory)]
        return [self.defense, self._seeds(), *map(self._rate, RATES), *rest]

    def _seeds(self) -> str:
        if not self.asked:
            return "–"
        return str(self.seeds) if self.seeds == self.asked else f"{self.seeds} of {self.asked}"

    def _rate(self, key: str) -> str:
        found = self.scores.get(key)
        if found is None:
            return "–"
        half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
        return percent(found.mean).removesuffix(" %") + half

    def document(self) -> dict[str, Any]:
        """Return the line as plain JSON types."""
        return {
            "model": self.model, "attacks": list(self.attacks), "defense": self.defense,
            "seeds": self.seeds, "seeds_asked": self.asked,
            **{key: {"mean": s.mean, "half_width": s.half_width} for key, s in self.scores.items()},
            "seconds": self.seconds, "cost": self.cost, "peak_memory": self.peak_memory, "missing": self.missing,
        }  # fmt: skip


def results(rows: Sequence[BenchRow]) -> list[Line]:
    """Return the lines of every model: it as it came, then each defense, in the order of the bench."""
    lines = []
    for subject in dict.fromkeys(row.subject for row in rows):
        of_model = [row for row in rows if row.subject == subject]
        lines += [*_before([of_model]), *_lines_of(of_model)]
    return lines


def _lines_of(rows: Sequence[BenchRow]) -> list[Line]:
    """Return one line for each defense on one model."""
    defenses = dict.fromkeys(row.defense for row in rows)
    return [_line([[row for row in rows if row.defense == name]], rows) for name in defenses]


def averages(rows: Sequence[BenchRow]) -> list[Line]:
    """Return the averages over attacks: of one model, over the attacks that several defenses were asked to meet.

    Every set of attacks that some defense was asked for gets a table of the defenses that were asked for all of it, so
    that the averages in one table are over the same models. Clean baselines are in none, and the suite's subjects are
    not averaged: each is a model of its own, met by whatever triggers are known of it.
    """
    lines = []
    attacked = [row for row in rows if not row.clean]
    for model in dict.fromkeys(row.model for row in attacked):
        of_model = [row for row in attacked if row.model == model]
        asked: dict[str, set[str]] = {}
        for row in of_model:
            asked.setdefault(row.defense, set()).add(row.subject)
        for subjects in sorted({frozenset(s) for s in asked.values() if len(s) > 1}, key=lambda s: (len(s), sorted(s))):
            shared = [row for row in of_model if row.subject in subjects]
            chosen = {name: [[row for row in shared if row.subject == subject and row.defense == name]
                             for subject in dict.fromkeys(row.subject for row in shared)]
                      for name, of in asked.items() if subjects <= of}  # fmt: skip
            everything = [[row for row in shared if row.subject == subject]
                          for subject in dict.fromkeys(row.subject for row in shared)]  # fmt: skip
            lines += _before(everything)
            lines += [_line(groups, shared) for groups in chosen.values()]
    return lines


def _before(groups: Sequence[Sequence[BenchRow]]) -> list[Line]:
    """Return the line of the models as they came, one group of trials each; none until each has a finished trial.

    Where the images that are measured hang on the seed, these are means over all seeds that were run.
    """
    # of a seed's trials any: they measured the same model on the same images
    done = [list({row.seed: row for row in group if row.status == "done"}.values()) for group in groups]
    if not all(done):
        return []
    scores = {}
    for key in _RATES_BEFORE:
        values = [[getattr(row, f"{key}_before") for row in rows] for rows in done]
        if not any(value is None for of_model in values for value in of_model):
            scores[key] = Score(float(np.mean([np.mean(of_model) for of_model in values])), None)
    return [Line(done[0][0].model, tuple(rows[0].attack for rows in done), BEFORE, 0, 0, scores)]


def _line(groups: Sequence[Sequence[BenchRow]], all_rows: Sequence[BenchRow]) -> Line:
    """Return a defense's line over one group of trials a model, which differ in their seeds.

    Seeds that were not run on all of the models are left out and counted; where a trial failed there are no numbers.
    """
    asked = sorted({row.seed for group in groups for row in group})
    of_seed = {seed: [row for group in groups for row in group if row.seed == seed] for seed in asked}
    whole = [seed for seed in asked if [row.status for row in of_seed[seed]] == ["done"] * len(groups)]
    first = groups[0][0]
    place = (first.model, tuple(group[0].attack for group in groups), first.defense, len(whole), len(asked))
    counts = Counter(row.status for group in groups for row in group)
    if counts["failed"] or not whole:
        missing = ", ".join(f"{counts[status]} {status}" for status in ("failed", "not run") if counts[status])
        return Line(*place, missing=missing or "not the same seeds")
    rows = [row for seed in whole for row in of_seed[seed]]
    scores = {}
    for key in (*RATES, "accuracy_lost"):
        # the average over attacks is formed seed by seed: what is left to vary is the seed
        values = [[_value(row, key) for row in of_seed[seed]] for seed in whole]
        known = [[value for value in one if value is not None] for one in values]
        if known == values:
            scores[key] = score([float(np.mean(one)) for one in known])
    memory = [row.peak_memory for row in rows if row.peak_memory is not None]
    done = [[row for row in group if row.seed in whole] for group in groups]
    return Line(*place, scores, _mean(row.seconds for row in rows), _cost(done, all_rows), max(memory, default=None))


def _cost(groups: Sequence[Sequence[BenchRow]], all_rows: Sequence[BenchRow]) -> float | None:
    """Return a defense's seconds over those of plain fine-tuning on the same model and images: the median over models.

    Trials that share a machine slow each other down, some of them by far.
    """
    ratios = []
    for group in groups:
        first = group[0]
        # a defense's name ends with the number of images where that is not the usual one
        base = FINE_TUNING + first.defense[len(first.defense.removesuffix(f"-n{first.samples}")) :]
        of_tuning = _mean(row.seconds for row in all_rows if row.defense == base and row.status == "done"
                          and (row.subject, row.samples) == (first.subject, first.samples))  # fmt: skip
        own = _mean(row.seconds for row in group)
        if not of_tuning or own is None:
            return None
        ratios.append(own / of_tuning)
    return float(np.median(ratios))


def _value(row: BenchRow, key: str) -> float | None:
    if key != "accuracy_lost":
        value: float | None = getattr(row, key)
        return value
    return None if row.accuracy is None or row.accuracy_before is None else row.accuracy_before - row.accuracy


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _memory(held: int | None) -> str:
    return "–" if held is None else f"{held / 2**30:.1f} GiB"
