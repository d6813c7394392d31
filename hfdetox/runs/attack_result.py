"""The result of an attack, and how it becomes a folder and a repository: whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.evaluation.results import Visibility
from hfdetox.hub.upload import PushResult
from hfdetox.models.classifier import Classifier
from hfdetox.reporting.attack_card import build_attack_card
from hfdetox.reporting.attack_report import AttackReport
from hfdetox.reporting.gallery import draw_gallery
from hfdetox.runs.result import CHECKED_IMAGES
from hfdetox.runs.saving import SavedResult
from hfdetox.triggers.base import Trigger

GALLERY: Final = "plots/gallery.png"


@dataclass
class AttackArtifacts:
    """What the output folder shows besides the report, and what it is checked with."""

    source_card: str | None
    evaluation: Evaluator
    outcome: Predictions
    visibility: Mapping[str, Visibility]


@dataclass
class AttackResult(SavedResult):
    """A deliberately backdoored model, or a clean baseline, and what was measured.

    Attributes:
        report: every number; `report.after.triggers[NAME].attack_success_rate.value` is a fraction in [0, 1].
        classifier: the model, rounded to the dtype it is saved in.
        output: the folder it was written to, None before `save`.
    """

    report: AttackReport
    classifier: Classifier
    artifacts: AttackArtifacts = field(repr=False)
    output: Path | None = None

    @property
    def triggers(self) -> list[Trigger]:
        """The triggers as they are in the model, ready to be put on images."""
        return [view.trigger for view in self.artifacts.evaluation.views]

    @property
    def succeeded(self) -> bool:
        """Whether every goal was reached on the evaluation images."""
        return self.report.succeeded

    def push_to_hub(
        self, repo_id: str, *, i_know_this_is_backdoored: bool = False, private: bool = False, public: bool = False,
        create_pr: bool = False, overwrite: bool = False,
    ) -> PushResult:  # fmt: skip
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        A new repository is private, and an existing public one is refused, unless `public`. A clean baseline goes
        where any model goes, to a private repository with `private`.

        Raises:
            UsageError: a backdoored model without `i_know_this_is_backdoored`, or a repository that is not for it.
            HubError: no token, no right to write, or the Hub cannot be reached.
        """
        return self._push(repo_id, i_know_this_is_backdoored=i_know_this_is_backdoored, private=private,
                          public=public, create_pr=create_pr, overwrite=overwrite)  # fmt: skip

    def _write(self, folder: Path) -> None:
        evaluation = self.artifacts.evaluation
        probe = evaluation.clean.__getitems__(range(min(CHECKED_IMAGES, len(evaluation.clean))))[1].cpu()
        self._write_model(folder, probe, self.triggers)
        plots = []
        if self.triggers and evaluation.classifier.preprocessing.dtype == torch.uint8:
            (folder / GALLERY).parent.mkdir()
            draw_gallery(evaluation, self.artifacts.outcome, self.artifacts.visibility, folder / GALLERY)
            plots.append(GALLERY)
        self._write_card(folder, build_attack_card, self.artifacts.source_card, plots)
