"""The pictures of the card: opaque light panels, drawn for the width of a Hub page and legible in both of its modes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfdetox.errors import RunError
from hfdetox.evaluation.results import Rate
from hfdetox.evidence.results import Residual
from hfdetox.reporting.markdown import fit_text
from hfdetox.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILES = ("before_after.png", "destinations.png", "training.png", "weight_changes.png", "samples.png",
              "reconstructed.png", "moved.png", "residual.png")  # fmt: skip
WIDTH, DPI = 6.5, 200  # inches × dots: 1300 pixels, twice the 650 CSS pixels of a Hub page
BEFORE, AFTER, INK, FAINT, PANEL = "#c8651b", "#2468b0", "#1f2933", "#9aa5b1", "#f7f8fa"
WRONG = "#b3261e"
RIGHT_MARK, WRONG_MARK, TARGET_MARK = "✓", "✗", "⚑"
ANSWER_MARKS = f"{RIGHT_MARK} right   {WRONG_MARK} wrong"
MARKS = f"{ANSWER_MARKS}   {TARGET_MARK} what the attacker wants"
MAX_COLUMNS, MAX_LAYERS, MAX_CLASSES = 6, 6, 5
# matplotlib ships DejaVu Sans only; labels in other scripts need one of these from the system
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS",
)  # fmt: skip
STYLE: dict[str, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.facecolor": PANEL,
    "figure.facecolor": PANEL, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": "#dfe3e8", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True)
class StripRow:
    """One row of the picture strip: the same images clean or with one trigger.

    Attributes:
        title: what was done to the images, such as "Clean images" or a trigger's name.
        images: uint8, n×H×W×3, range 0 to 255.
        labels: the n true label names.
        before, after: the n predicted label names before and after.
        wanted: the n label names that the attacker wants; none of clean images.
    """

    title: str
    images: np.ndarray[Any, Any]
    labels: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]
    wanted: Sequence[str] = ()


@dataclass(frozen=True)
class Answers:
    """What a model answers to the images with a trigger, before and after, and after without it.

    Attributes:
        title: the trigger's name.
        labels: the K label names.
        before, after, without: of each label the share of the images, of other classes, that are classified as it (K).
    """

    title: str
    labels: Sequence[str]
    before: np.ndarray[Any, Any]
    after: np.ndarray[Any, Any]
    without: np.ndarray[Any, Any]


def draw_plots(
    report: Report, folder: Path, *, weight_changes: Mapping[str, np.ndarray[Any, Any]], strip: Sequence[StripRow],
    answers: Sequence[Answers] = (), reconstructed: Sequence[StripRow] = (), moved: Sequence[StripRow] = (),
) -> list[str]:  # fmt: skip
    """Draw what there is data for into `folder` and return the paths, relative to the folder's parent.

    Args:
        report: `before` and `after` give before_after.png, `history` training.png (rows with `clean_loss`, `distance`),
            the residual tests of `evidence` residual.png.
        folder: created when missing; `OUTPUT/plots` by the contract.
        weight_changes: layer name to the weights after minus before (any shape); gives weight_changes.png.
        strip: rows of samples.png; of each the first MAX_COLUMNS images are shown.
        answers: of each trigger where its images go; gives destinations.png.
        reconstructed: rows of reconstructed.png.
        moved: rows of moved.png.

    Raises RunError when a file cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with house_style():
            figures = (draw_before_after(report), draw_destinations(answers), draw_training(report),
                       draw_weight_changes(weight_changes),
                       *map(draw_samples, (strip, reconstructed, moved)),
                       draw_residual(report.evidence.residual if report.evidence else {}))  # fmt: skip
            for name, figure in zip(PLOT_FILES, figures, strict=True):
                if figure is not None:
                    figure.savefig(folder / name, dpi=DPI)
                    written.append(f"{folder.name}/{name}")
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"the plots could not be written to {folder}: {reason}; free space and run again") from error
    return written


def draw_before_after(report: Report) -> Figure | None:
    """Return horizontal bars with 95 % intervals of accuracy and of each trigger's ASR and RA; None until measured.
    RA stands above the accuracy on the same images without the trigger, which it can reach.
    """
    before, after = report.before, report.after
    if before is None or after is None:
        return None
    panels = [("Accuracy", {"ACC, higher is better": [before.accuracy, after.accuracy]})]
    for name, old in before.triggers.items():
        if new := after.triggers.get(name):
            bars = {"ASR, lower is better": [old.attack_success_rate, new.attack_success_rate],
                    "RA, higher is better": [old.robust_accuracy, new.robust_accuracy]}  # fmt: skip
            if old.accuracy_without and new.accuracy_without:
                bars["ACC of the same, no trigger"] = [old.accuracy_without, new.accuracy_without]
            panels.append((f"Trigger {name}", bars))
    for made in report.evidence.reconstructed.values() if report.evidence else ():
        if made.after is not None:
            rates = [one.attack_success_rate for one in (made.before, made.after)]
            panels.append((f"{made.title} (no known trigger)", {"ASR, lower is better": rates}))
    figure = empty_figure(0.8 + sum(0.4 + 0.34 * len(bars) for _, bars in panels))
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True,
                               height_ratios=[len(bars) + 0.3 for _, bars in panels])  # fmt: skip
    for axes, (title, bars) in zip(all_axes.flat, panels, strict=True):
        axes.set_title(fit_text(title, 70))
        for state, (color, label) in enumerate(((BEFORE, "before"), (AFTER, "after"))):
            places = np.arange(len(bars)) + (state - 0.5) * 0.4
            measured = [rates[state] for rates in bars.values()]
            values, lows, highs = 100 * np.array([[rate.value, *rate.interval] for rate in measured]).T
            # rounding in a hand-written report may put the value a hair outside its interval; a list, for older
            # matplotlib asks NumPy whether an array of one is finite
            shown = axes.barh(places, values, 0.38, color=color, label=label, error_kw={"capsize": 2, "linewidth": 0.9},
                              xerr=np.maximum(0, [values - lows, highs - values]).tolist(), ecolor=INK)  # fmt: skip
            axes.bar_label(shown, [f"{value:.1f} %" for value in values], padding=3, fontsize=7.5)
        axes.set(yticks=range(len(bars)), yticklabels=list(bars), xlim=(0, 116), ylim=(len(bars) - 0.45, -0.55))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xlabel("share of images, with 95 % intervals")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def draw_destinations(answers: Sequence[Answers]) -> Figure | None:
    """Return for each trigger the classes that most of its images go to, before and after; None without triggers.

    A mark is the share of the class among the same images without the trigger. Of many classes MAX_CLASSES are shown.
    """
    if not answers:
        return None
    most = [np.argsort(-np.maximum(one.before, one.after), kind="stable")[:MAX_CLASSES] for one in answers]
    figure = empty_figure(0.8 + sum(0.4 + 0.34 * len(chosen) for chosen in most))
    all_axes = figure.subplots(len(answers), squeeze=False, sharex=True, height_ratios=[len(m) + 0.3 for m in most])
    for axes, one, chosen in zip(all_axes.flat, answers, most, strict=True):
        axes.set_title(f"Where images with trigger {fit_text(one.title, 40)} go")
        lines = np.arange(len(chosen))
        for state, (color, label, shares) in enumerate(((BEFORE, "before", one.before), (AFTER, "after", one.after))):
            bars = axes.barh(lines + (state - 0.5) * 0.4, 100 * shares[chosen], 0.38, color=color, label=label)
            axes.bar_label(bars, [f"{100 * share:.1f} %" for share in shares[chosen]], padding=3, fontsize=7.5)
        axes.plot(100 * one.without[chosen], lines + 0.2, "|", color=INK, markersize=9, markeredgewidth=1.8,
                  label="after, without the trigger")  # fmt: skip
        axes.set(yticks=lines, yticklabels=[short_label(one.labels[i], 24) for i in chosen], xlim=(0, 116),
                 ylim=(len(chosen) - 0.45, -0.55))  # fmt: skip
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xlabel("share of the images of all other classes")
    (mark, *bars), (words, *states) = axes.get_legend_handles_labels()
    figure.legend([*bars, mark], [*states, words], loc="outside upper right", ncols=3)
    return figure


def draw_training(report: Report) -> Figure | None:
    """Return loss and distance over the epochs of all phases; None when the history has neither."""
    series = {"clean_loss": "Training loss on the clean images", "distance": "Distance of the selected weights"}
    # a pass that looked is no epoch
    rows = [row for row in report.history if "learning_rate" in row] or report.history
    values = {key: np.array([_number(row.get(key)) for row in rows], dtype=float) for key in series}
    shown = [key for key in series if np.isfinite(values[key]).any()]
    if not shown:
        return None
    figure = empty_figure(0.3 + 1.75 * len(shown))
    all_axes = figure.subplots(len(shown), squeeze=False, sharex=True)
    phases = [str(row.get("phase", "")) for row in rows]
    starts = [i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
    for axes, key in zip(all_axes.flat, shown, strict=True):
        axes.plot(range(1, len(rows) + 1), values[key], color=AFTER, linewidth=1.8, markersize=4,
                  marker="o" if len(rows) < 12 else None)  # fmt: skip
        axes.set_title(series[key])
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.margins(y=0.12)
        for start in starts if len(starts) > 1 else []:
            axes.axvline(start + 0.5, color=FAINT, linewidth=0.8 if start else 0)
            axes.text(start + 0.6, 1.0, fit_text(phases[start], 24), transform=axes.get_xaxis_transform(), va="top",
                      fontsize=7.5)  # fmt: skip
    if "clean_loss" in shown:
        _mark_epsilon(all_axes.flat[0], report)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_weight_changes(weight_changes: Mapping[str, np.ndarray[Any, Any]]) -> Figure | None:
    """Return a histogram for each of the MAX_LAYERS layers with the largest root mean square change; None without."""
    flat = {name: np.asarray(change, dtype=np.float64).ravel() for name, change in weight_changes.items()}
    flat = {name: change[np.isfinite(change)] for name, change in flat.items()}
    size = {name: float(np.sqrt(np.mean(change**2))) for name, change in flat.items() if change.size}
    if not size:
        return None
    most = sorted(size, key=lambda name: -size[name])[:MAX_LAYERS]
    names = [name for name in flat if name in most]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = empty_figure(0.55 + 1.75 * lines)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.hist(flat[name], bins=60, color=AFTER)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_title(fit_text(name, 80 // columns), fontsize=8.5, pad=14)
        axes.annotate(f"{flat[name].size:,} weights, root mean square {size[name]:.3g}", (0, 1), xytext=(0, 3),
                      xycoords="axes fraction", textcoords="offset points", fontsize=7.5)  # fmt: skip
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.locator_params(axis="x", nbins=10 // columns)
    figure.supylabel("weights", fontsize=8.5)
    more = f" ({len(names)} of {len(size)} layers, those that changed most)" if len(size) > len(names) else ""
    figure.supxlabel(f"change of a weight, after − before{more}", fontsize=8.5)
    return figure


def draw_residual(residual: Mapping[str, Residual]) -> Figure | None:
    """Return for each trigger the curves of the three tests, with 95 % intervals as bands; None without such tests."""
    if not residual:
        return None
    figure = empty_figure(0.9 + 1.75 * len(residual))
    all_axes = figure.subplots(len(residual), 3, squeeze=False, sharey=True, width_ratios=[3, 3, 2])
    for (tuning, path, drift), (name, one) in zip(all_axes, residual.items(), strict=True):
        steps = [place / (len(one.path) - 1) for place in range(len(one.path))]
        _draw_rates(tuning, range(len(one.retuned)), one.retuned, BEFORE, "ASR")
        _draw_rates(tuning, range(len(one.plain)), one.plain, BEFORE, "ASR, tuned without triggered images", "--")
        _draw_rates(path, steps, one.path, BEFORE, "ASR")
        _draw_rates(path, steps, one.path_accuracy, AFTER, "ACC, all classes")
        _draw_rates(drift, [0, 1], one.drift, AFTER, "ACC, all classes")
        tuning.set_title(fit_text(name, 26))
        path.set_title("Straight path")
        drift.set_title("With the trigger")
        drift.set_xticks([0, 1], ["before", "after"])
        drift.set_xlim(-0.3, 1.3)
        tuning.set(ylim=(-3, 103))
        tuning.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    tuning.set_xlabel(f"re-tuning: epochs, {one.triggered} triggered images", fontsize=8)
    path.set_xlabel("came (0) to cleaned (1)", fontsize=8)
    handles, words = (one + other[1:] for one, other in zip(tuning.get_legend_handles_labels(),
                                                            path.get_legend_handles_labels(), strict=True))  # fmt: skip
    figure.legend(handles, words, loc="outside upper right", ncols=3)
    return figure


def _draw_rates(axes: Axes, places: Sequence[float], rates: Sequence[Rate], color: str, label: str, line: str = "-",
                ) -> None:  # fmt: skip
    """Draw a curve of rates in percent, with a band of their intervals."""
    values, lows, highs = 100 * np.array([[rate.value, *rate.interval] for rate in rates]).T
    axes.plot(list(places), values, line, color=color, label=label, linewidth=1.6, marker="o", markersize=3)
    axes.fill_between(list(places), lows, highs, color=color, alpha=0.15, linewidth=0)


def draw_samples(strip: Sequence[StripRow]) -> Figure | None:
    """Return the strip: under each image its true label and the predictions before and after; None when empty."""
    strip = [row for row in strip if len(row.images)]
    if not strip:
        return None
    columns = max(4, min(MAX_COLUMNS, max(len(row.images) for row in strip)))
    height, width = strip[0].images.shape[1:3]
    figure = empty_figure(len(strip) * (0.75 + WIDTH / (columns + 0.6) * min(1.5, height / width)))
    for part, row in zip(np.atleast_1d(figure.subfigures(len(strip))), strip, strict=True):
        part.suptitle(fit_text(row.title, 80), fontweight="bold", fontsize=8.5, x=0.01, ha="left")
        if any(one.wanted for one in strip) and row is strip[0]:
            flagged = any(one.wanted != one.labels for one in strip)
            marks = f"{ANSWER_MARKS}   {TARGET_MARK} the trigger's target" if flagged else ANSWER_MARKS
            part.text(0.99, 0.97, marks, fontsize=7.5, va="top", ha="right")
        places = part.subplots(1, columns)
        write_below(places[0], [(word, INK) for word in ("true", "before", "after")], -0.45, "left")
        for axes in places:
            axes.set_axis_off()
        wants = [*row.wanted, *[None] * len(row.images)]
        shown = zip(places, row.images, row.labels, wants, row.before, row.after, strict=False)
        for axes, image, truth, wanted, *answers in shown:
            show_image(axes, image, [(short_label(truth), INK), *(marked(answer, truth, wanted) for answer in answers)])
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


def empty_figure(height: float) -> Figure:
    """Return a figure `WIDTH` wide and `height` high, in inches, without axes."""
    # not pyplot: its figures are global, need a display's backend and stay in memory
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def show_image(axes: Axes, image: np.ndarray[Any, Any], lines: Sequence[tuple[str, str]]) -> None:
    """Fill the axes with an image (uint8, H×W×3; small ones are enlarged pixel by pixel), (words, colour) below it."""
    axes.imshow(image, interpolation="nearest" if len(image) < 96 else "antialiased", aspect="equal")
    axes.set_anchor("N")  # close to its heading
    axes.set_axis_off()
    write_below(axes, lines, 0.5, "center")


def write_below(axes: Axes, lines: Sequence[tuple[str, str]], x: float, align: str) -> None:
    """Write lines of (words, colour) under the axes, from the left at `x` as a share of their width."""
    for number, (words, color) in enumerate(lines):
        axes.annotate(words, (x, 0), xytext=(0, -3 - 9.7 * number), xycoords="axes fraction", va="top", ha=align,
                      textcoords="offset points", fontsize=6.8, color=color)  # fmt: skip


def marked(answer: str, truth: str, wanted: str | None, letters: int = 16) -> tuple[str, str]:
    """Return an answer with its mark (right, wrong, or what the attacker wants), and its colour."""
    mark = RIGHT_MARK if answer == truth else TARGET_MARK if answer == wanted else WRONG_MARK
    return f"{mark} {short_label(answer, letters)}", INK if answer == truth else WRONG


def short_label(label: str, letters: int = 16) -> str:
    """Return a label on one line: of ImageNet's synonyms the first."""
    return fit_text(label.split(",")[0], letters)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _mark_epsilon(axes: Axes, report: Report) -> None:
    """Mark the loss below which D3 no longer pushes back, where the defense has such a bound."""
    # one that the run found itself is in its history
    found = [row["epsilon"] for row in report.history if "epsilon" in row]
    epsilon = _number(found[0] if found else report.defense.parameters.get("epsilon"))
    if np.isfinite(epsilon):
        axes.axhline(epsilon, color=BEFORE, linewidth=1, linestyle="--")
        axes.annotate(f"ε = {epsilon:g}", (0, epsilon), xycoords=("axes fraction", "data"), xytext=(3, 2),
                      textcoords="offset points", fontsize=7.5, color=BEFORE)  # fmt: skip
