"""The pictures of the card: opaque light panels, drawn for the width of a Hub page and legible in both of its modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfdetox.errors import RunError
from hfdetox.evaluation.results import Rate
from hfdetox.reporting.markdown import one_line
from hfdetox.reporting.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILES = ("before_after.png", "training.png", "weight_changes.png", "samples.png")
WIDTH, DPI = 6.5, 200  # inches × dots: 1300 pixels, twice the 650 CSS pixels of a Hub page
BEFORE, AFTER, INK, FAINT, PANEL = "#c8651b", "#2468b0", "#1f2933", "#9aa5b1", "#f7f8fa"
WRONG = "#b3261e"
MAX_COLUMNS, MAX_LAYERS = 6, 6
# matplotlib ships DejaVu Sans only; labels in other scripts need one of these from the system
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)
STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PANEL,
    "figure.facecolor": PANEL,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#dfe3e8",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class StripRow:
    """One row of the picture strip: the same images clean or with one trigger.

    Attributes:
        title: what was done to the images, such as "Clean images" or a trigger's name.
        images: uint8, n×H×W×3, range 0 to 255.
        labels: the n true label names.
        before, after: the n predicted label names before and after.
    """

    title: str
    images: np.ndarray[Any, Any]
    labels: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]


def draw_plots(
    report: Report, folder: Path, *, weight_changes: Mapping[str, np.ndarray[Any, Any]], strip: Sequence[StripRow]
) -> list[str]:
    """Draw what there is data for into `folder` and return the paths, relative to the folder's parent.

    Args:
        report: `before` and `after` give before_after.png, `history` training.png (rows with `clean_loss`, `distance`).
        folder: created when missing; `OUTPUT/plots` by the contract.
        weight_changes: layer name to the weights after minus before (any shape); gives weight_changes.png.
        strip: rows of samples.png; of each the first MAX_COLUMNS images are shown.

    Raises RunError when a file cannot be written.
    """
    drawings: dict[str, Callable[[], Figure | None]] = {
        "before_after.png": lambda: draw_before_after(report),
        "training.png": lambda: draw_training(report),
        "weight_changes.png": lambda: draw_weight_changes(weight_changes),
        "samples.png": lambda: draw_samples(strip),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            with house_style():
                figure = draw()
                if figure is not None:
                    figure.savefig(folder / name, dpi=DPI)
                    written.append(f"{folder.name}/{name}")
    except OSError as error:
        raise RunError(
            f"the plots could not be written to {folder}: {error.strerror or error}; free space and run again"
        ) from error
    return written


def draw_before_after(report: Report) -> Figure | None:
    """Return horizontal bars with 95 % intervals of accuracy and of each trigger's ASR and RA; None until measured."""
    before, after = report.before, report.after
    if before is None or after is None:
        return None
    groups: list[tuple[str, list[tuple[str, Rate, Rate]]]] = [
        ("Accuracy", [("ACC, higher is better", before.accuracy, after.accuracy)])
    ]
    for name in (name for name in before.triggers if name in after.triggers):
        old, new = before.triggers[name], after.triggers[name]
        groups.append(
            (
                f"Trigger {name}",
                [
                    ("ASR, lower is better", old.attack_success_rate, new.attack_success_rate),
                    ("RA, higher is better", old.robust_accuracy, new.robust_accuracy),
                ],
            )
        )
    rows = sum(1.15 + len(bars) for _, bars in groups)
    figure, axes = _figure(0.8 + 0.34 * rows)
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for title, bars in groups:
        axes.text(0, y + 0.1, fit_text(title, 70), fontweight="bold", va="center", ha="left")
        y += 0.85
        axes.vlines(0, y - 0.45, y + len(bars) - 0.55, color=FAINT, linewidth=0.9)
        for name, *rates in bars:
            ticks.append((y, name))
            for rate, color, offset in zip(rates, (BEFORE, AFTER), (-0.2, 0.2), strict=True):
                _bar(axes, y + offset, rate, color)
            y += 1.0
        y += 0.3
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(y - 0.55, -0.45), xlim=(0, 116), xticks=range(0, 101, 20))
    axes.set_xticklabels([f"{tick} %" for tick in range(0, 101, 20)])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("share of images, with 95 % intervals")
    handles = [
        axes.barh([-9], [0], color=color, label=label) for color, label in ((BEFORE, "before"), (AFTER, "after"))
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


def draw_training(report: Report) -> Figure | None:
    """Return loss and distance over the epochs of all phases; None when the history has neither."""
    series = {"clean_loss": "Loss on the clean images", "distance": "Distance of the selected weights"}
    # a pass that looked is no epoch
    rows = [row for row in report.history if "learning_rate" in row] or report.history
    values = {key: np.array([_number(row.get(key)) for row in rows], dtype=float) for key in series}
    shown = [key for key in series if np.isfinite(values[key]).any()]
    if not shown:
        return None
    figure, axes = _figure(0.3 + 1.75 * len(shown), len(shown))
    epochs = np.arange(1, len(rows) + 1)
    phases = [str(row.get("phase", "")) for row in rows]
    starts = [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
    for axis, key in zip(np.atleast_1d(axes), shown, strict=True):
        axis.plot(
            epochs, values[key], color=AFTER, linewidth=1.8, markersize=4, marker="o" if len(epochs) < 12 else None
        )
        axis.set_title(series[key])
        axis.set_xlim(0.5, len(epochs) + 0.5)
        axis.margins(y=0.12)
        for i, start in enumerate([0, *starts] if starts else []):
            if i:
                axis.axvline(start + 0.5, color=FAINT, linewidth=0.8)
            axis.text(
                start + 0.6,
                1.0,
                fit_text(phases[start], 24),
                transform=axis.get_xaxis_transform(),
                va="top",
                fontsize=7.5,
            )
    if "clean_loss" in shown:
        _mark_epsilon(np.atleast_1d(axes)[0], report)
    last = np.atleast_1d(axes)[-1]
    last.set_xlabel("epoch")
    last.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_weight_changes(weight_changes: Mapping[str, np.ndarray[Any, Any]]) -> Figure | None:
    """Return a histogram for each of the MAX_LAYERS layers with the largest root mean square change; None without."""
    flat = {name: np.asarray(change, dtype=np.float64).ravel() for name, change in weight_changes.items()}
    flat = {name: change[np.isfinite(change)] for name, change in flat.items()}
    size = {name: float(np.sqrt(np.mean(change**2))) for name, change in flat.items() if change.size}
    if not size:
        return None
    names = sorted(size, key=lambda name: -size[name])[:MAX_LAYERS]
    names = [name for name in flat if name in names]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure, axes = _figure(0.55 + 1.75 * lines, lines, columns, sharex=False)
    for axis, name in zip(np.atleast_1d(axes).ravel(), names, strict=False):
        axis.hist(flat[name], bins=60, color=AFTER)
        axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axis.set_title(f"{fit_text(name, 80 // columns)}\n", fontsize=8.5, linespacing=1.0)
        axis.text(
            0,
            1.03,
            f"{flat[name].size:,} weights, root mean square {size[name]:.3g}",
            transform=axis.transAxes,
            fontsize=7.5,
        )
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        axis.locator_params(axis="x", nbins=10 // columns)
    for axis in np.atleast_1d(axes).ravel()[len(names) :]:
        axis.set_visible(False)
    figure.supylabel("weights", fontsize=8.5)
    more = f" ({len(names)} of {len(size)} layers, those that changed most)" if len(size) > len(names) else ""
    figure.supxlabel(f"change of a weight, after − before{more}", fontsize=8.5)
    return figure


def draw_samples(strip: Sequence[StripRow]) -> Figure | None:
    """Return the strip: under each image its true label and the predictions before and after; None when empty."""
    strip = [row for row in strip if len(row.images)]
    if not strip:
        return None
    columns = min(MAX_COLUMNS, max(len(row.images) for row in strip))
    gutter, cell = 0.55, (WIDTH - 0.55 - 0.1) / max(columns, 4)
    height, width = strip[0].images.shape[1:3]
    tall = cell * 0.92 * min(1.5, height / width)
    line, title, foot = 0.135, 0.3, 0.12
    row_height = title + tall + 3 * line + foot
    total = row_height * len(strip) + 0.06
    figure = empty_figure(total)
    letters = int(cell / 0.062)  # inches of a letter at 6.8 points, a wide one
    for r, row in enumerate(strip):
        top = total - r * row_height
        figure.text(0.1 / WIDTH, (top - 0.18) / total, fit_text(row.title, 80), fontweight="bold", va="center")
        below = top - title - tall
        for i, word in enumerate(("true", "before", "after")):
            figure.text(0.1 / WIDTH, (below - (i + 0.6) * line) / total, word, fontsize=6.8, va="center")
        for column in range(min(columns, len(row.images))):
            left = gutter + column * cell
            axis = figure.add_axes((left / WIDTH, below / total, cell * 0.92 / WIDTH, tall / total))
            show_image(axis, row.images[column])
            truth = row.labels[column]
            for i, label in enumerate((truth, row.before[column], row.after[column])):
                mark = "" if i == 0 else ("✓ " if label == truth else "✗ ")
                figure.text(
                    (left + cell * 0.46) / WIDTH,
                    (below - (i + 0.6) * line) / total,
                    mark + fit_text(label.split(",")[0], letters - len(mark)),
                    fontsize=6.8,
                    ha="center",
                    va="center",
                    color=INK if label == truth else WRONG,
                )
    return figure


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style, whatever the person's own matplotlib settings are, and leave those as they were."""
    from matplotlib import font_manager, style

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with style.context(["default", {**STYLE, "font.family": fonts}]), warnings.catch_warnings():
        # a letter of a label that no font has is drawn as a box; that is no news for the person at the terminal
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def empty_figure(height: float, layout: str | None = None) -> Figure:
    """Return a figure `WIDTH` wide and `height` high, in inches, without axes."""
    # not pyplot: its figures are global, need a display's backend and stay in memory
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout=layout)


def _figure(height: float, rows: int = 1, columns: int = 1, *, sharex: bool = True) -> tuple[Figure, Any]:
    figure = empty_figure(height, "constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex)


def show_image(axes: Axes, image: np.ndarray[Any, Any]) -> None:
    """Fill the axes with an image (uint8, H×W×3); small ones are enlarged pixel by pixel."""
    axes.imshow(image, interpolation="nearest" if len(image) < 96 else "antialiased", aspect="equal")
    axes.set_axis_off()


def fit_text(text: str, letters: int) -> str:
    """Return `text` on one line, at most `letters` long, with dollars that start no formula."""
    text = one_line(text)
    text = text if len(text) <= letters else text[: max(1, letters - 1)].rstrip() + "…"
    return text.replace("$", r"\$")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _bar(axes: Axes, y: float, rate: Rate, color: str) -> None:
    low, high = (100 * end for end in rate.interval)
    value = 100 * rate.value
    axes.barh([y], [value], height=0.38, color=color)
    # rounding in a hand-written report may put the value a hair outside its interval; a negative length is an error
    axes.errorbar(
        [value], [y], xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], color=INK, capsize=2, linewidth=0.9
    )
    axes.text(max(value, high) + 1.2, y, f"{value:.1f} %", va="center", fontsize=7.5)


def _mark_epsilon(axes: Axes, report: Report) -> None:
    """Mark the loss below which D3 no longer pushes back, where the defense has such a bound."""
    # one that the run found itself is in its history
    found = [row["epsilon"] for row in report.history if "epsilon" in row]
    epsilon = _number(found[0] if found else report.defense.parameters.get("epsilon"))
    if np.isfinite(epsilon):
        axes.axhline(epsilon, color=BEFORE, linewidth=1, linestyle="--")
        axes.annotate(
            f"ε = {epsilon:g}",
            (0, epsilon),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=7.5,
            color=BEFORE,
        )
