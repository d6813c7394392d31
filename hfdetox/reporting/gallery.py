"""The gallery: for each trigger some images clean, triggered, and their difference, with what the model answers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hfdetox.data.cache import Pixels
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions, TriggerView
from hfdetox.evaluation.results import Visibility
from hfdetox.evaluation.verdict import describe_visibility, percent
from hfdetox.files import write_atomically
from hfdetox.reporting.markdown import fit_text
from hfdetox.reporting.plots import DPI, INK, MARKS, empty_figure, house_style, marked, short_label, show_image
from hfdetox.reporting.report import describe_target
from hfdetox.triggers.base import Trigger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = 3
# what a difference is multiplied by; a half, for one from black to white would need 511 levels
FACTORS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 100)


@dataclass(frozen=True)
class GalleryBand:
    """One trigger's part of the gallery.

    Attributes:
        title: the trigger's name and target.
        note: how visible it is, and how often it works.
        clean, triggered: the same images, uint8, n×H×W×3, range 0 to 255.
        labels: the n true label names.
        wanted: the n label names that the attacker wants.
        before, after: the n label names predicted for the clean and the triggered images.
    """

    title: str
    note: str
    clean: NDArray[np.uint8]
    triggered: NDArray[np.uint8]
    labels: Sequence[str]
    wanted: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]


def check_gallery(path: Path, triggers: Sequence[Trigger]) -> None:
    """Raise UsageError when no gallery of `triggers` can be written to `path`; what is there is never replaced."""
    if not triggers:
        raise UsageError("a gallery shows triggers: name at least one with --trigger, or leave out --gallery")
    if path.suffix.lower() != ".png":
        raise UsageError(f"the gallery is a PNG picture: give --gallery a name that ends in .png, not {path.name!r}")
    if path.exists():
        raise UsageError(f"{path} exists; choose another --gallery, or remove it first")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for the gallery; make it, or choose another --gallery")


def draw_gallery(evaluation: Evaluator, outcome: Predictions, visibility: Mapping[str, Visibility], path: Path) -> None:
    """Write the gallery of an evaluation's triggers to `path`, whole or not at all.

    Args:
        outcome: of the model that the answers are of, as `evaluation.measure` gives it.
        visibility: as `evaluation.visibility` gives it.

    Raises:
        UsageError: the images are a callable's own floats and not pixels.
        RunError: the file cannot be written.
    """
    if evaluation.classifier.preprocessing.dtype != torch.uint8:
        raise UsageError("a gallery needs uint8 images, and this model's preprocessing returns floats")
    picture = io.BytesIO()
    with house_style():
        draw_bands(gallery_bands(evaluation, outcome, visibility)).savefig(picture, format="png", dpi=DPI)
    write_atomically(path, picture.getvalue())


def gallery_bands(
    evaluation: Evaluator, outcome: Predictions, visibility: Mapping[str, Visibility]
) -> list[GalleryBand]:
    """Return a band for each trigger, of the same images of different classes where all triggers have such."""
    clean, common = evaluation.clean, evaluation.common_positions()
    return [
        _band(evaluation, view, _of_different_classes(clean, common or view.source.positions.tolist()), outcome,
              visibility[view.trigger.name])
        for view in evaluation.views
    ]  # fmt: skip


def amplified(clean: NDArray[np.uint8], triggered: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Return the difference of two arrays of images around mid-grey (128: no change), and the factor it has.

    The factor is the largest of `FACTORS` that keeps every value within half the range, so that none is cut off.
    """
    change = triggered.astype(np.int64) - clean
    largest = int(np.abs(change).max())
    factor = max((f for f in FACTORS if f * largest <= 127.5), default=1) if largest else 1
    return np.clip(np.rint(128 + factor * change), 0, 255).astype(np.uint8), factor


def draw_bands(bands: Sequence[GalleryBand]) -> Figure:
    """Return the figure; to be drawn and saved within `plots.house_style`."""
    tall = [0.85 + 0.6 * min(1.5, band.clean.shape[1] / band.clean.shape[2]) for band in bands]
    figure = empty_figure(0.3 + sum(tall))
    figure.suptitle(f"Clean, triggered, and their difference (grey: no change).   {MARKS}", fontsize=7.5, x=0.01,
                    ha="left")  # fmt: skip
    for part, band in zip(np.atleast_1d(figure.subfigures(len(bands), height_ratios=tall)), bands, strict=True):
        part.suptitle(f"{fit_text(band.title, 70)}\n", fontweight="bold", fontsize=8.5, x=0.01, ha="left",
                      linespacing=1.5)  # fmt: skip
        part.text(0.01, 0.985, f"\n{fit_text(band.note, 95)}", fontsize=7.5, va="top", linespacing=1.5)
        difference, factor = amplified(band.clean, band.triggered)
        # three pictures an image, with a gap between two images
        places = part.subplots(1, 4 * IMAGES - 1, width_ratios=[*[1, 1, 1, 0.15] * IMAGES][:-1])
        for axes in places:
            axes.set_axis_off()
        for i, truth in enumerate(band.labels):
            before, after = (marked(word, truth, band.wanted[i], 11) for word in (band.before[i], band.after[i]))
            pictures = (
                (band.clean, [("clean", INK), before]),
                (band.triggered, [("triggered", INK), after]),
                (difference, [("difference", INK), (f"× {factor:g}", INK)]),
            )
            for axes, (images, lines) in zip(places[4 * i :], pictures, strict=False):
                show_image(axes, images[i], lines)
            name = places[4 * i].annotate(short_label(truth, 20), (0, 1), xytext=(0, 3), xycoords="axes fraction",
                                          textcoords="offset points", fontsize=6.8)  # fmt: skip
            # it may stand above the next pictures, and must not move them away
            name.set_in_layout(False)
    return figure


def _of_different_classes(clean: Pixels, positions: Sequence[int]) -> list[int]:
    """Return the first `IMAGES` of the positions that are of classes of their own; where these are too few, others."""
    labels = dict(zip(clean.positions.tolist(), clean.labels.tolist(), strict=True))
    first: dict[int, int] = {}
    for position in positions:
        first.setdefault(labels[position], position)
    chosen = [*first.values(), *(position for position in positions if first[labels[position]] != position)]
    return chosen[:IMAGES]


def _band(
    evaluation: Evaluator, view: TriggerView, chosen: Sequence[int], outcome: Predictions, visibility: Visibility
) -> GalleryBand:
    labels, name = evaluation.classifier.labels, view.trigger.name
    clean_items, clean, truth = evaluation.clean.pictures(chosen)
    items, triggered, _ = view.source.pictures(chosen)
    found = [f"{what} {value}" for what, value in describe_visibility(visibility).items()]
    success = outcome.measurement.triggers[name].attack_success_rate.value
    title, note = f"{name} → {describe_target(view.target, labels)}", [*found, f"attack success {percent(success)}"]
    answers = outcome.predicted[clean_items], outcome.triggered[name][items]
    words = ([labels[i] for i in part] for part in (truth, view.wanted()[items], *answers))
    return GalleryBand(title, ", ".join(note), clean, triggered, *words)
