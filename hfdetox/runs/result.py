"""The result of a run, and how it becomes a folder and a repository: whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.hub.upload import PushResult
from hfdetox.models.classifier import Classifier
from hfdetox.reporting.card import build_card
from hfdetox.reporting.leaderboard import eval_results
from hfdetox.reporting.plots import PLOT_FILES, StripRow, draw_plots
from hfdetox.reporting.report import Report
from hfdetox.runs.saving import SavedResult
from hfdetox.triggers.base import Trigger

STRIP_COLUMNS = 6
STRIP_ROWS = 4
CHECKED_IMAGES = 8


@dataclass
class Artifacts:
    """What the output folder shows besides the report: pictures, weight changes, triggers, the source's card."""

    weight_changes: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    strip: list[StripRow] = field(default_factory=list)
    triggers: Sequence[Trigger] = ()
    source_card: str | None = None
    dataset_eval_yaml: str | None = None
    whole_split: bool = True
    probe: torch.Tensor | None = None


@dataclass
class DetoxResult(SavedResult):
    """A cleaned model and what was measured.

    Attributes:
        report: every number; `report.after.accuracy.value` is a fraction in [0, 1].
        classifier: the cleaned model, rounded to the dtype it is saved in.
        output: the folder it was written to, None before `save`.
    """

    report: Report
    classifier: Classifier
    artifacts: Artifacts = field(repr=False)
    output: Path | None = None

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False
    ) -> PushResult:
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        Of several processes only the main one pushes; the others return at once, with an empty commit.

        Raises:
            UsageError: the repository exists and was not made by hfdetox.
            HubError: no token, no right to write, or the Hub cannot be reached.
        """
        return self._push(repo_id, private=private, create_pr=create_pr, overwrite=overwrite)

    def _write(self, folder: Path) -> None:
        self._write_model(folder, self.artifacts.probe, self.artifacts.triggers)
        draw_plots(
            self.report, folder / "plots", weight_changes=self.artifacts.weight_changes, strip=self.artifacts.strip
        )
        for name, text in eval_results(self.report, self.artifacts.dataset_eval_yaml,
                                       whole_split=self.artifacts.whole_split).items():  # fmt: skip
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        plots = [f"plots/{name}" for name in PLOT_FILES if (folder / "plots" / name).is_file()]
        self._write_card(folder, build_card, self.artifacts.source_card, plots)


def draw_strip(evaluation: Evaluator, before: Predictions, after: Predictions) -> list[StripRow]:
    """Return the picture strip: a few images clean and with each trigger, with predictions before and after.

    Nothing where the images are not pixels (a callable's own floats).
    """
    clean, labels = evaluation.clean, evaluation.classifier.labels
    if evaluation.classifier.preprocessing.dtype != torch.uint8:
        return []
    shared = set(clean.positions.tolist())
    for view in evaluation.views:
        shared &= set(view.source.positions.tolist())
    chosen = sorted(shared or clean.positions.tolist())
    chosen = chosen[:: max(1, len(chosen) // STRIP_COLUMNS)][:STRIP_COLUMNS]
    rows = [_row("Clean images", clean, chosen, labels, before.predicted, after.predicted)]
    for view in evaluation.views[: STRIP_ROWS - 1]:
        name = view.trigger.name
        if shared:
            rows.append(
                _row(f"Trigger {name}", view.source, chosen, labels, before.triggered[name], after.triggered[name])
            )
    return rows


def _row(title: str, pixels: Any, chosen: Sequence[int], labels: Sequence[str], before: NDArray[np.int64],
         after: NDArray[np.int64]) -> StripRow:  # fmt: skip
    items, pictures, truth = pixels.pictures(chosen)
    return StripRow(
        title,
        pictures,
        [labels[i] for i in truth],
        [labels[i] for i in before[items]],
        [labels[i] for i in after[items]],
    )
