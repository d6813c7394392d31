"""The result of a run, and how it becomes a folder and a repository: whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from hfdetox.config import DetoxOptions, PublishOptions
from hfdetox.data.load import Images
from hfdetox.defenses import DefenseConfig
from hfdetox.errors import RunError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.evaluation.results import Visibility
from hfdetox.hub.download import read_text_file
from hfdetox.hub.upload import PushResult, check_card
from hfdetox.logging import is_main_process
from hfdetox.models.classifier import Classifier
from hfdetox.reporting.attack_card import build_attack_card
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.card_data import eval_results
from hfdetox.reporting.gallery import draw_gallery
from hfdetox.reporting.plots import PLOT_FILES, StripRow, draw_plots
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.runs.folder import RunFolder
from hfdetox.runs.saving import SavedResult
from hfdetox.triggers.base import Trigger

Result = TypeVar("Result", bound="DetoxResult | AttackResult")

STRIP_COLUMNS = 6
STRIP_ROWS = 4
CHECKED_IMAGES = 8
GALLERY: Final = "plots/gallery.png"


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


def gather_artifacts(classifier: Classifier, images: Images, evaluation: Evaluator) -> Artifacts:
    """Return what the output folder shows besides the report, as far as it is known before the training."""
    info, clean = images.info, evaluation.clean
    benchmark = read_text_file(info.id, "eval.yaml", info.revision, "dataset") if info.revision is not None else None
    return Artifacts(
        triggers=[view.trigger for view in evaluation.views],
        source_card=classifier.card_source(),
        dataset_eval_yaml=benchmark,
        whole_split=images.whole_split,
        probe=clean.__getitems__(range(min(CHECKED_IMAGES, len(clean))))[1].cpu(),
    )


def selected_weights(classifier: Classifier, method: DefenseConfig) -> dict[str, NDArray[np.float32]]:
    """Return copies of the weights that the defense treats apart, by layer name."""
    state = classifier.model.state_dict()
    names = method.selected_layers(classifier.model)
    return {name: state[f"{name}.weight"].float().cpu().numpy().copy() for name in names}


def check_draft(card: str, push_to: str | None, accelerator: Accelerator) -> None:
    """Check the card that a run will write, before its work; what the Hub says only if it is to be pushed there."""
    validate_card(card)
    if push_to is not None and accelerator.is_main_process:
        check_card(card)


def save_result(result: DetoxResult, options: DetoxOptions, run: RunFolder | None) -> None:
    """Write the output folder, on the main process, and remove the run folder, unless it is to be kept.

    Raises:
        RunError: it cannot be written; the line says how to go on with the run, which is kept.
    """
    try:
        result.save(options.output or "", overwrite=options.overwrite)
    except RunError as error:
        if run is None:
            raise
        raise RunError(f"{error}; the run is kept, go on with: {run.resume_command()}") from error
    if run is not None and not options.keep_run and is_main_process():
        run.remove()


def publish(result: Result, accelerator: Accelerator, push_to: str | None, options: PublishOptions) -> Result:
    """Push the result, if `push_to` is given, and return it with the same report on every process."""
    if push_to is not None and accelerator.is_main_process:
        result.push_to_hub(push_to, **options.publishing())
    accelerator.wait_for_everyone()
    # the main process knows the hash of what it wrote, and the commit
    result.report = broadcast_object_list([result.report])[0]
    return result


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
