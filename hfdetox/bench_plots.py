"""The pictures of a bench: a heat map of defences and attacks, and what a defence takes off against what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfdetox.bench_scores import Line, results
from hfdetox.bench_table import PLOTS, BenchOutcome
from hfdetox.errors import RunError
from hfdetox.markdown import one_line
from hfdetox.plots import DPI, FAINT, INK, WIDTH, house_style
from hfdetox.suite import folder_part

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
    lines = [line for line in results(attacked) if line.defense != "before"]
    came = [line for line in results(attacked) if line.defense == "before"]
    folder = outcome.folder / PLOTS
    for model in dict.fromkeys(line.model for line in lines):
        own, before = ([line for line in some if line.model == model] for some in (lines, came))
        for kind, draw in (("heatmap", draw_heatmap), ("scatter", draw_scatter)):
            with house_style():
                figure = draw(own, before)
                if figure is None:
                    continue
                path = folder / f"{kind}-{folder_part(model)}.png"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    fresh = path.with_name(f".{path.name}")
                    figure.savefig(fresh, dpi=DPI, format="png")
                    os.replace(fresh, path)
                except OSError as error:
                    raise RunError(f"the plots could not be written to {folder}: {error.strerror or error}") from error
                written.append(f"{folder.name}/{path.name}")
    return written


def draw_heatmap(lines: Sequence[Line], before: Sequence[Line]) -> Figure | None:
    """Return a map of attack success after each defence (rows) on each attack (columns), in percent.

    What failed, was not run or was not asked for is grey and says so. None while nothing is done.
    """
    import matplotlib.pyplot as plt

    found = {(line.defense, line.attacks[0]): line for line in lines}
    if not any("attack_success" in line.scores for line in lines):
        return None
    came = {line.attacks[0]: line for line in before if "attack_success" in line.scores}
    defenses, attacks = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    rows = [("no defence", came), *((name, {a: found[name, a] for a in attacks if (name, a) in found})
                                    for name in defenses)]  # fmt: skip
    values = np.array([[_percent(of.get(attack), "attack_success") for attack in attacks] for _, of in rows])
    height = 0.9 + 0.27 * len(rows) + 0.6
    figure, axes = plt.subplots(figsize=(max(WIDTH, 1.8 + 0.42 * len(attacks)), height), layout="constrained")
    colours = plt.get_cmap("YlOrRd").with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=100, aspect="auto")
    for y, (_, of) in enumerate(rows):
        for x, attack in enumerate(attacks):
            text = f"{values[y, x]:.1f}" if np.isfinite(values[y, x]) else _absent(of.get(attack))
            axes.text(x, y, text, ha="center", va="center", fontsize=7,
                      color="white" if values[y, x] > 78 else INK)  # fmt: skip
    axes.set_xticks(range(len(attacks)), [_short(name) for name in attacks], rotation=25, ha="right")
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_title(f"Attack success rate after each defence, {_short(lines[0].model)} (%)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="ASR (%)")
    return figure


def draw_scatter(lines: Sequence[Line], before: Sequence[Line]) -> Figure | None:
    """Return attack success after each defence against the accuracy it cost: a point an attack, a mark for the mean.

    None while nothing is done.
    """
    import matplotlib.pyplot as plt

    came = {line.attacks[0]: line.scores["accuracy"].mean for line in before if "accuracy" in line.scores}
    done = [line for line in lines if "attack_success" in line.scores and line.attacks[0] in came]
    if not done:
        return None
    names = list(dict.fromkeys(line.defense for line in done))
    figure, axes = plt.subplots(figsize=(WIDTH, max(4.4, 0.16 * len(names) + 0.8)), layout="constrained")
    colours = plt.get_cmap("tab20")
    markers = "osD^vP*X<>hp"
    for number, name in enumerate(names):
        own = [line for line in done if line.defense == name]
        losses = [100 * (came[line.attacks[0]] - line.scores["accuracy"].mean) for line in own]
        successes = [100 * line.scores["attack_success"].mean for line in own]
        style: dict[str, Any] = {"color": colours(number % 20), "marker": markers[number % len(markers)]}
        axes.scatter(losses, successes, s=9, alpha=0.45, linewidths=0, **style)
        axes.scatter(np.mean(losses), np.mean(successes), s=55, edgecolors="white", linewidths=0.6, zorder=3,
                     label=f"{_short(name)} ({len(own)})", **style)  # fmt: skip
    _frame(axes)
    axes.set_title(f"What each defence takes off and what it costs, {_short(done[0].model)}")
    axes.legend(title="mean of (attacks)", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    return figure


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
