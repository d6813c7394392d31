"""The pictures of a bench: a heat map of defenses and attacks, and what a defense takes off against what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfdetox.bench.scores import BEFORE, Line, averages, results
from hfdetox.bench.suite import folder_part
from hfdetox.bench.tables import PLOTS, BenchOutcome
from hfdetox.errors import RunError
from hfdetox.reporting.markdown import one_line
from hfdetox.reporting.plots import DPI, FAINT, INK, WIDTH, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "#dfe3e8"
_LONGEST = 28  # letters of a name


def draw_bench(outcome: BenchOutcome) -> list[str]:
    """Draw `plots/heatmap-MODEL.png` and `plots/scatter-MODEL.png` of every model with attacks; returns their paths.

    Raises RunError when a file cannot be written.
    """
    written = []
    attacked = [row for row in outcome.rows if not row.clean]
    folder = outcome.folder / PLOTS
    for model in dict.fromkeys(row.model for row in attacked):
        rows = [row for row in attacked if row.model == model]
        lines, means = results(rows), averages(rows)
        for kind, draw in (("heatmap", draw_heatmap), ("scatter", draw_scatter)):
            with house_style():
                figure = draw(lines, means)
                if figure is None:
                    continue
                path = folder / f"{kind}-{folder_part(model)}.png"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    fresh = path.with_name(f".{path.name}.{os.getpid()}")
                    figure.savefig(fresh, dpi=DPI, format="png")
                    os.replace(fresh, path)
                except OSError as error:
                    raise RunError(f"the plots could not be written to {folder}: {error.strerror or error}") from error
                written.append(f"{folder.name}/{path.name}")
    return written


def draw_heatmap(lines: Sequence[Line], averages: Sequence[Line]) -> Figure | None:
    """Return a map of attack success after each defense (rows) on each attack (columns), in percent.

    What failed, was not run or was not asked for is grey and says so; the last column is the average over all attacks,
    where there is one. A star marks numbers of a part of the seeds. None while nothing is done.
    """
    import matplotlib.pyplot as plt

    found = {(line.defense, line.attacks[0]): line for line in lines}
    if not any("attack_success" in line.scores for line in lines if line.defense != BEFORE):
        return None
    defenses, attacks = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    names = [BEFORE] * (BEFORE in defenses) + [name for name in defenses if name != BEFORE]
    several = len(attacks) > 1
    means = {line.defense: line for line in averages if len(line.attacks) == len(attacks)}
    cells = [[found.get((name, attack)) for attack in attacks] + [means.get(name)] * several for name in names]
    values = np.array([[_percent(line, "attack_success") for line in row] for row in cells])
    height = 0.9 + 0.27 * len(names) + 0.6
    figure, axes = plt.subplots(figsize=(max(WIDTH, 1.8 + 0.42 * values.shape[1]), height), layout="constrained")
    colours = plt.get_cmap("YlOrRd").with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        line = cells[y][x]
        star = "*" * (line is not None and line.seeds < line.asked)
        text = f"{value:.1f}{star}" if np.isfinite(value) else _absent(line)
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if value > 67 else INK)
    columns = [*map(_short, attacks), *["mean"] * several]
    axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right")
    axes.set_yticks(range(len(names)), ["no defense" if name == BEFORE else _short(name) for name in names])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if several:
        axes.axvline(len(attacks) - 0.5, color="white", linewidth=2)
    axes.set_title(f"Attack success rate after each defense, {_short(lines[0].model)} (%; * not all seeds)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="ASR (%)")
    return figure


def draw_scatter(lines: Sequence[Line], averages: Sequence[Line]) -> Figure | None:
    """Return attack success after each defense against the accuracy it cost: a point an attack, a mark for the mean.

    All means are over the same attacks: the ones that most defenses have finished, of such sets the largest. A defense
    without all of them has no mark, and the legend says so. None while nothing is done.
    """
    import matplotlib.pyplot as plt

    of_set: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in (*lines, *averages):
        if line.defense != BEFORE and "attack_success" in line.scores:
            of_set.setdefault(tuple(sorted(line.attacks)), {})[line.defense] = line
    if not of_set:
        return None
    attacks = max(of_set, key=lambda attacks: (len(attacks) > 1, len(of_set[attacks]), len(attacks)))
    shown = [line for line in lines if line.attacks[0] in attacks and line.defense != BEFORE]
    names = list(dict.fromkeys(line.defense for line in shown))
    figure, axes = plt.subplots(figsize=(WIDTH, max(4.4, 0.16 * len(names) + 0.8)), layout="constrained")
    colours = plt.get_cmap("tab10")
    markers = "osD^vP*X<>h"
    for number, name in enumerate(names):
        # 10 colours and 11 markers: no pair comes twice among 110 defenses
        style: dict[str, Any] = {"color": colours(number % 10), "marker": markers[number % len(markers)]}
        points = [line for line in shown if line.defense == name and "attack_success" in line.scores]
        axes.scatter(*_place(points), s=9, alpha=0.45, linewidths=0, **style)
        mean = of_set[attacks].get(name)
        label = _short(name) if mean is not None else f"{_short(name)}: {_why(shown, name)}"
        axes.scatter(*_place([mean] if mean is not None else []), s=55, edgecolors="white", linewidths=0.6, zorder=3,
                     label=label, **style)  # fmt: skip
    _frame(axes)
    axes.set_title(f"What each defense takes off and what it costs, {_short(lines[0].model)}")
    over = f"mean over {len(attacks)} attacks" if len(attacks) > 1 else _short(attacks[0])
    axes.legend(title=over, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    return figure


def _place(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Return the accuracies lost, and the attack success rates, in percent."""
    return [_percent(line, "accuracy_lost") for line in lines], [_percent(line, "attack_success") for line in lines]


def _why(lines: Sequence[Line], name: str) -> str:
    """Return why a defense has no mean."""
    return "failed" if any("failed" in (line.missing or "") for line in lines if line.defense == name) else "incomplete"


def _frame(axes: Axes) -> None:
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("accuracy lost (percentage points)")
    axes.set_ylabel("attack success rate after (%)")
    axes.set_ylim(-3, 103)


def _percent(line: Line | None, key: str) -> float:
    return 100 * line.scores[key].mean if line is not None and key in line.scores else np.nan


def _absent(line: Line | None) -> str:
    if line is None or line.missing is None:
        return "–"
    return "failed" if "failed" in line.missing else "not run"


def _short(name: str) -> str:
    text = one_line(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
