"""The tables of `d3:auto` on models that had no say: each run, what they come to, fewer images, and three seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from hfdetox.evaluation.metrics import defense_effectiveness_rating
from tests.benchmarks.evidence_tables import KINDS, NOT_RUN, unlearnt_rows, unlearnt_table
from tests.benchmarks.markdown import exists, percent, read, source, table

NAME, TWINS, BETS = "auto_heldout", "auto_twins", "bets"
MANY, FEW = 2500, 500
ARMS = ("d3:auto", "d3:auto-1", "ft", "ft-sam", "d3:paper", "nad", "bnp", "sau")
Row = dict[str, Any]


def _rows(samples: int = MANY, seed: int | None = 0) -> list[Row]:
    return [row for row in read(NAME)["rows"]
            if row["samples"] == samples and seed in (None, row.get("seed", 0))] if exists(NAME) else []  # fmt: skip


def auto_held_out() -> list[str]:
    """Return each run with 2,500 images and seed 0."""
    return [*unlearnt_table(_rows()), *source(NAME)] if exists(NAME) else NOT_RUN


def auto_few() -> list[str]:
    """Return each run with 500 images."""
    rows = _rows(FEW)
    return unlearnt_table(rows) if rows else NOT_RUN


def auto_goals() -> list[str]:
    """Return, by architecture, images and defense, means, and how many runs keep to each goal."""
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for samples in (MANY, FEW):
        for row in _rows(samples):
            groups[row["cell"].split("-")[0], samples, row["arm"]].append(row)
    if not groups:
        return NOT_RUN
    lines = []
    for kind, samples, arm in sorted(groups, key=lambda key: (list(KINDS).index(key[0]), -key[1], ARMS.index(key[2]))):
        rows = groups[kind, samples, arm]
        attacked = [row for row in rows if "asr" in row["after"]]
        never = [_cost(row) for row in rows if "asr" not in row["after"]]
        if attacked:
            lines.append([KINDS[kind], f"{samples:,}", f"`{arm}`", str(len(attacked)),
                          _mean(map(_cost, attacked)), _count(_cost(row) <= _allowed(samples) for row in attacked),
                          _mean(row["after"]["asr"] for row in attacked),
                          _count(map(_removed, attacked)),
                          _mean(row["after"]["ra"] for row in attacked), _count(map(_own_class, attacked)),
                          _mean(map(_der, attacked)), _mean(never),
                          f"{sum(row['passes'] for row in rows) / len(rows):,.0f}"])  # fmt: skip
    header = ["model", "images", "defense", "runs", "cost", "in bounds", "ASR", "removed", "RA", "own class", "DER",
              "cost, no backdoor", "passes"]  # fmt: skip
    return table(header, lines, text_columns=3)


def auto_seeds() -> list[str]:
    """Return the least and the most of three seeds of the defense and of its images."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in _rows(seed=None):
        groups[row["cell"], row["arm"]].append(row)
    groups = {key: rows for key, rows in groups.items() if len({row.get("seed", 0) for row in rows}) > 1}
    lines = []
    for key in sorted(groups, key=lambda key: ("clean" in key[0], key)):
        rows = groups[key]
        named = unlearnt_rows(rows[:1])[0][:3]
        rates = [
            _range(row["after"][rate] for row in rows) if rate in rows[0]["after"] else "–" for rate in ("asr", "ra")
        ]
        lines.append([*named, str(len(rows)), _range(map(_cost, rows)), *rates])
    header = ["model", "attack", "defense", "seeds", "cost", "ASR", "RA"]
    return table(header, lines, text_columns=3) if lines else NOT_RUN


def auto_bets() -> list[str]:
    """Return ideas that were measured alone on the development half, by model."""
    if not exists(BETS):
        return NOT_RUN
    rows = sorted(read(BETS)["rows"], key=lambda row: (-row["samples"], row["cell"]))
    # the place of the idea stands where other tables have the defense
    cells = unlearnt_rows([{**row, "arm": row["arm"].replace("-0", "−0")} for row in rows])
    lines = [[kind, attack, f"{row['samples']:,}", arm.strip("`"), *rest]
             for row, (kind, attack, arm, *rest) in zip(rows, cells, strict=True)]  # fmt: skip
    header = ["model", "attack", "images", "idea", "ACC", "ASR", "RA", "into one class", "passes"]
    return [*table(header, lines, text_columns=4), *source(BETS)]


def _removed(row: Row) -> bool:
    """Tell whether no more ASR is left than 5 %, or than a model without a backdoor has on the same trigger."""
    named = row["after"].get("trigger")
    twins = [twin["asr"] for twin in read(TWINS)["rows"]
             if twin["cell"] == row["cell"] and named in (None, twin["trigger"])] if exists(TWINS) else []  # fmt: skip
    return bool(row["after"]["asr"] <= max([0.05, *twins]))


def _cost(row: Row) -> float:
    return row["before"]["accuracy"] - row["after"]["accuracy"]


def _allowed(samples: int) -> float:
    """Return the accuracy that the goal lets a run cost; rates are counts of 2,000."""
    return (0.01 if samples == MANY else 0.03) + 1e-9


def _own_class(row: Row) -> bool:
    """Tell whether triggered images are read as they are without the trigger, and no class gets many more."""
    after = row["after"]
    return after["ra"] >= 0.8 * after["without"] and after["excess"] <= 0.2


def _der(row: Row) -> float:
    before, after = row["before"], row["after"]
    return defense_effectiveness_rating((before["accuracy"], after["accuracy"]), (before["asr"], after["asr"]))


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return percent(sum(found) / len(found)) if found else "–"


def _count(kept: Iterable[bool]) -> str:
    found = list(kept)
    return f"{sum(found)} of {len(found)}"


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{percent(found[0])} to {percent(found[-1])}"


TABLES: dict[str, Callable[[], list[str]]] = {
    "auto_goals": auto_goals, "auto_held_out": auto_held_out, "auto_few": auto_few, "auto_seeds": auto_seeds,
    "auto_bets": auto_bets,
}  # fmt: skip
