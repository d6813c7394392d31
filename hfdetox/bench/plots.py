"""The pictures of a bench: a heat map of defenses and attacks, and what a defense takes off against what it costs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from hfdetox.bench.summary import BEFORE, BenchTables, SummaryRow, averages, results
from hfdetox.bench.tasks import PLOTS, folder_part
from hfdetox.files import write_atomically
from hfdetox.reporting.markdown import fit_text
from hfdetox.reporting.plots import DPI, FAINT, INK, WIDTH, house_style

MISSING = "#dfe3e8"
_LONGEST = 28  # letters of a name


def draw_bench(tables: BenchTables) -> list[str]:
    """Draw `plots/heatmap-MODEL.png` and `plots/scatter-MODEL.png` of every model with attacks; returns their paths.

    Raises RunError or OSError when a file cannot be written.
    """
    written, folder = [], tables.folder / PLOTS
    attacked = [row for row in tables.rows if not row["clean"]]
    for model in dict.fromkeys(row["model"] for row in attacked):
        rows = [row for row in attacked if row["model"] == model]
        for kind, draw in (("heatmap", draw_heatmap), ("scatter", draw_scatter)):
            with house_style():
                figure, picture = draw(results(rows), averages(rows)), io.BytesIO()
                if figure is not None:
                    figure.savefig(picture, dpi=DPI, format="png")
                    written.append(f"{kind}-{folder_part(model)}.png")
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(folder / written[-1], picture.getvalue())
    return [f"{PLOTS}/{name}" for name in written]


def draw_heatmap(lines: Sequence[SummaryRow], averages: Sequence[SummaryRow]) -> Figure | None:
    """Return a map of attack success after each defense (rows) on each attack (columns), in percent.

    What failed, was not run or was not asked for is grey and says so; the last column is the average over all attacks,
    where there is one. A star marks numbers of a part of the seeds. None while nothing is done.
    """
    if not any("attack_success" in line.scores for line in lines if line.defense != BEFORE):
        return None
    found = {(line.defense, line.attacks[0]): line for line in lines}
    # a model as it came is the first row, wherever it comes first
    names = sorted(dict.fromkeys(name for name, _ in found), key=lambda name: name != BEFORE)
    attacks = list(dict.fromkeys(attack for _, attack in found))
    if len(attacks) > 1:
        found |= {(line.defense, "mean"): line for line in averages if len(line.attacks) == len(attacks)}
    columns = [*attacks, *["mean"] * (len(attacks) > 1)]
    cells = [[found.get((name, column)) for column in columns] for name in names]
    values = np.array([[_percent(line, "attack_success") for line in row] for row in cells])
    size = max(WIDTH, 1.8 + 0.42 * len(columns)), 1.5 + 0.27 * len(names)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["YlOrRd"].with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, _cell(cells[y][x]), ha="center", va="center", fontsize=7, color="white" if value > 67 else INK)
    axes.set_xticks(range(len(columns)), [fit_text(name, _LONGEST) for name in columns], rotation=25, ha="right")
    axes.set_yticks(range(len(names)), ["no defense" if name == BEFORE else fit_text(name, _LONGEST) for name in names])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if len(attacks) > 1:
        axes.axvline(len(attacks) - 0.5, color="white", linewidth=2)
    model = fit_text(lines[0].model, _LONGEST)
    axes.set_title(f"Attack success rate after each defense, {model} (%; * not all seeds)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="ASR (%)")
    return figure


def draw_scatter(lines: Sequence[SummaryRow], averages: Sequence[SummaryRow]) -> Figure | None:
    """Return attack success after each defense against the accuracy it cost: a point an attack, a mark for the mean.

    All means are over the same attacks: the ones that most defenses have finished, of such sets the largest. A defense
    without all of them has no mark, and the legend says so. None while nothing is done.
    """
    of_set: dict[tuple[str, ...], dict[str, SummaryRow]] = {}
    for line in (*lines, *averages):
        if line.defense != BEFORE and "attack_success" in line.scores:
            of_set.setdefault(tuple(sorted(line.attacks)), {})[line.defense] = line
    if not of_set:
        return None
    attacks = max(of_set, key=lambda attacks: (len(attacks) > 1, len(of_set[attacks]), len(attacks)))
    shown = [line for line in lines if line.attacks[0] in attacks and line.defense != BEFORE]
    names = list(dict.fromkeys(line.defense for line in shown))
    figure = Figure(figsize=(WIDTH, max(4.4, 0.16 * len(names) + 0.8)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        # 10 colours and 11 markers: no pair comes twice among 110 defenses
        style: Mapping[str, Any] = {"color": colormaps["tab10"](number % 10), "marker": "osD^vP*X<>h"[number % 11]}
        own = [line for line in shown if line.defense == name]
        mean, label = of_set[attacks].get(name), fit_text(name, _LONGEST)
        if mean is None:
            label += ": failed" if any("failed" in (line.missing or "") for line in own) else ": incomplete"
        points, mark = ([line for line in group if line is not None and "attack_success" in line.scores]
                        for group in (own, [mean]))  # fmt: skip
        axes.scatter(*_place(points), s=9, alpha=0.45, linewidths=0, **style)
        axes.scatter(*_place(mark), s=55, edgecolors="white", linewidths=0.6, zorder=3, label=label, **style)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set(xlabel="accuracy lost (percentage points)", ylabel="attack success rate after (%)", ylim=(-3, 103))
    axes.set_title(f"What each defense takes off and what it costs, {fit_text(lines[0].model, _LONGEST)}")
    over = f"mean over {len(attacks)} attacks" if len(attacks) > 1 else fit_text(attacks[0], _LONGEST)
    axes.legend(title=over, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    return figure


def _place(lines: Sequence[SummaryRow]) -> list[list[float]]:
    """Return the accuracies lost, and the attack success rates, in percent."""
    return [[_percent(line, key) for line in lines] for key in ("accuracy_lost", "attack_success")]


def _percent(line: SummaryRow | None, key: str) -> float:
    return 100 * line.scores[key].mean if line is not None and key in line.scores else np.nan


def _cell(line: SummaryRow | None) -> str:
    """Return the text of a cell of the heat map."""
    if line is None or (line.missing is None and "attack_success" not in line.scores):
        return "–"
    if line.missing is not None:
        return "failed" if "failed" in line.missing else "not run"
    return f"{_percent(line, 'attack_success'):.1f}" + "*" * (line.seeds < line.seeds_asked)
