"""The pictures of a run: a few evaluation images with the answers before and after, and where triggered images go."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hfdetox.data.cache import Pixels
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions, shares_of_others
from hfdetox.evidence.inquiry import Inquiry
from hfdetox.reporting.plots import Answers, StripRow
from hfdetox.runs.result import Artifacts

STRIP_COLUMNS = 6
STRIP_ROWS = 4


def draw_strip(evaluation: Evaluator, before: Predictions, after: Predictions) -> list[StripRow]:
    """Return the picture strip: a few images clean and with each trigger, with predictions before and after.

    Nothing where the images are not pixels (a callable's own floats).
    """
    clean, labels = evaluation.clean, evaluation.classifier.labels
    if evaluation.classifier.preprocessing.dtype != torch.uint8:
        return []
    shared = evaluation.common_positions()
    chosen = shared or clean.positions.tolist()
    chosen = chosen[:: max(1, len(chosen) // STRIP_COLUMNS)][:STRIP_COLUMNS]
    rows = [_row("Clean images", clean, chosen, labels, clean.labels.cpu().numpy(), before.predicted, after.predicted)]
    for view in evaluation.views[: STRIP_ROWS - 1] if shared else []:
        old, new = (state.triggered[view.trigger.name] for state in (before, after))
        rows.append(_row(f"Trigger {view.trigger.name}", view.source, chosen, labels, view.wanted(), old, new))
    return rows


def show_evidence(artifacts: Artifacts, inquiry: Inquiry, before: Predictions, after: Predictions) -> None:
    """Add the pictures of what was reconstructed, of images that are answered otherwise now, and the triggers."""
    views = inquiry.views
    if views is None or inquiry.before is None or inquiry.after is None:
        return
    artifacts.triggers = [*artifacts.triggers, *inquiry.triggers]
    if views.views:
        rows, made = draw_strip(views, inquiry.before, inquiry.after)[1:], inquiry.found.reconstructed
        titles = [made[trigger.name].title for trigger in inquiry.triggers]
        artifacts.reconstructed = [replace(row, title=title) for row, title in zip(rows, titles, strict=False)]
    artifacts.moved = draw_moved(inquiry.evaluation, before, after)


def draw_moved(evaluation: Evaluator, before: Predictions, after: Predictions) -> list[StripRow]:
    """Return pictures of images that the cleaned model answers otherwise, those that moved most.

    How far is the change of the probability of an image's own class. Of each class comes the one that moved most,
    then all others.
    """
    clean, labels = evaluation.clean, evaluation.classifier.labels
    truth, changed = clean.labels.cpu().numpy(), np.flatnonzero(before.predicted != after.predicted)
    if evaluation.classifier.preprocessing.dtype != torch.uint8 or not len(changed):
        return []
    far = np.abs(np.exp(-after.losses) - np.exp(-before.losses))
    changed = changed[np.argsort(-far[changed], kind="stable")]
    _, first = np.unique(truth[changed], return_index=True)
    chosen = list(dict.fromkeys([*changed[np.sort(first)].tolist(), *changed.tolist()]))[:STRIP_COLUMNS]
    return [_row("Images that are answered otherwise now, the most moved first", clean,
                 clean.positions[chosen].tolist(), labels, truth, before.predicted, after.predicted)]  # fmt: skip


def _row(title: str, pixels: Pixels, chosen: Sequence[int], labels: Sequence[str],
         *answers: NDArray[np.int64]) -> StripRow:  # fmt: skip
    items, pictures, truth = pixels.pictures(chosen)
    wanted, before, after = ([labels[i] for i in found[items]] for found in answers)
    return StripRow(title, pictures, [labels[i] for i in truth], before, after, wanted)


def find_answers(evaluation: Evaluator, before: Predictions, after: Predictions) -> list[Answers]:
    """Return where the images with each trigger go, before and after, and after without the trigger."""
    found = []
    for view in evaluation.views:
        name, truth = view.trigger.name, view.source.labels.cpu().numpy()
        clean = after.predicted[after.hits[name][0]]
        shares = (shares_of_others(truth, answers, view.classes)
                  for answers in (before.triggered[name], after.triggered[name], clean))  # fmt: skip
        found.append(Answers(name, evaluation.classifier.labels, *shares))
    return found
