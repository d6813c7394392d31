"""The result of a run, and how it becomes a folder and a repository: whole or not at all."""

import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants
from numpy.typing import NDArray

from hfdetox.config import DetoxOptions, PublishOptions
from hfdetox.data.load import Images
from hfdetox.defenses import DefenseConfig
from hfdetox.errors import RunError, UsageError, on_disk, one_line
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.evaluation.results import Visibility
from hfdetox.files import locked
from hfdetox.hub.cards import check_card
from hfdetox.hub.download import read_text_file
from hfdetox.hub.upload import PushResult
from hfdetox.logging import is_main_process
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.reporting.card import CARD_NAME, build_card, validate_card
from hfdetox.reporting.card_data import EVAL_RESULTS_FOLDER, eval_results
from hfdetox.reporting.gallery import draw_gallery
from hfdetox.reporting.plots import PLOT_FILES, Answers, StripRow, draw_plots
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.runs.folder import RunFolder, check_output, fresh_name, publish_folder, settle
from hfdetox.runs.manifest import write_manifest
from hfdetox.runs.publish import push_output
from hfdetox.triggers.base import Trigger

Result = TypeVar("Result", bound="DetoxResult | AttackResult")
Written = TypeVar("Written", Report, AttackReport)

CHECKED_IMAGES = 8
GALLERY: Final = "plots/gallery.png"


class LoadsDifferentlyError(RunError):
    """The saved model is not the one in memory."""


@dataclass
class Artifacts:
    """What the output folder shows besides the report: pictures, weight changes, triggers, the source's card.

    The saved model is checked on `probe`; `gallery` draws the pictures of an attack.
    """

    weight_changes: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    strip: list[StripRow] = field(default_factory=list)
    reconstructed: list[StripRow] = field(default_factory=list)
    moved: list[StripRow] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    triggers: Sequence[Trigger] = ()
    source_card: str | None = None
    dataset_eval_yaml: str | None = None
    whole_split: bool = True
    probe: torch.Tensor | None = None
    gallery: Callable[[Path], None] | None = None


@dataclass
class SavedResult(ABC, Generic[Written]):
    """What a run gives: a model and what was measured, and how they become a folder and a repository.

    Attributes:
        report: every number, rates as fractions in [0, 1].
        classifier: the model, rounded to the dtype it is saved in.
        output: the folder it was written to, None before `save`.
    """

    report: Written
    classifier: Classifier
    artifacts: Artifacts = field(repr=False)
    output: Path | None = None

    @abstractmethod
    def _draw(self, folder: Path) -> list[str]:
        """Write what there is besides model, triggers, report and card; return the paths of the pictures."""

    def _write(self, folder: Path) -> None:
        """Write everything into an empty folder: the model checked, the card if it is valid."""
        weights, shown = self.classifier.save(folder), self.artifacts
        check_loads(self.classifier, folder, shown.probe)
        self.report = replace(self.report, output=replace(self.report.output, weights_sha256=weights))
        for trigger in shown.triggers:
            (folder / "triggers").mkdir(exist_ok=True)
            trigger.save(folder / "triggers" / f"{trigger.name}.safetensors")
        plots = self._draw(folder)
        card = build_card(
            self.report, source_card=shown.source_card, repo_id=self.report.output.pushed_to, plots=plots,
            labels=self.classifier.labels, on_leaderboard=(folder / EVAL_RESULTS_FOLDER).is_dir(),
        )  # fmt: skip
        validate_card(card)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        self.report.save(folder)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write model, card, report, pictures and triggers to `folder`, which appears complete or not at all.

        Of several processes only the main one writes; the others return at once, with the same path.

        Args:
            overwrite: replace an earlier result of hfdetox; anything else is never replaced.

        Raises:
            UsageError: the folder holds something else.
            RunError: it cannot be written (disk full), or what was written does not give the same logits again.
        """
        return self._save(Path(folder), overwrite=overwrite)

    def _save(self, folder: Path, *, overwrite: bool, run: RunFolder | None = None) -> Path:
        """Do what `save` says; `run` records that it came to this result."""
        if not is_main_process():
            self.output = folder
            return folder
        with locked(RunFolder.beside(folder.absolute()).path, f"the output {folder}"):
            settle(folder)
            check_output(folder, overwrite=overwrite)
            self._place(folder, run)
        self.output = folder
        return folder

    def _place(self, folder: Path, run: RunFolder | None) -> None:
        fresh = folder.absolute().with_name(fresh_name(folder) + secrets.token_hex(4))
        with on_disk(f"write beside {folder}", "choose another --output"):
            # not mkdtemp, whose folders only their owner can read, whatever the umask
            fresh.mkdir(parents=True)
        try:
            with on_disk(f"write {folder}", "free some space"):
                self._write(fresh)
                # safetensors writes files that only their owner can read, whatever the umask
                for file in fresh.glob("*.safetensors"):
                    file.chmod((fresh / CARD_NAME).stat().st_mode)
                write_manifest(fresh)
                if run is not None:
                    run.record_result(fresh)
                publish_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _push(self, repo_id: str, **push_options: Any) -> PushResult:
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        Of several processes only the main one pushes; the others return at once, with an empty commit.
        """
        if not is_main_process():
            return PushResult(repo_id, "", f"{constants.ENDPOINT}/{repo_id}", None)
        saved = self.output
        # what is pushed from memory stays on the disk until it has arrived: the message of a failed push names it
        folder = saved or self.save(Path(tempfile.mkdtemp(prefix="hfdetox-")) / repo_id.rpartition("/")[2])
        pushed = push_output(folder, repo_id, **push_options)
        output = replace(self.report.output, pushed_to=pushed.repo_id, commit=pushed.commit)
        self.report = replace(self.report, output=output)
        if saved is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
            self.output = None
        return pushed


class DetoxResult(SavedResult[Report]):
    """A cleaned model and what was measured, such as `report.after.accuracy.value`."""

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False,
        accept_accuracy_loss: bool = False, publish_images: bool = False, no_verify_upload: bool = False,
    ) -> PushResult:  # fmt: skip
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        Of several processes only the main one pushes; the others return at once, with an empty commit. Pictures of
        images are left out unless their dataset is public on the Hub, or `publish_images`.

        Raises:
            UsageError: the repository exists and was not made by hfdetox, or the model was rejected for its accuracy
                and `accept_accuracy_loss` does not say that it is pushed all the same.
            HubError: no token, no right to write, or the Hub cannot be reached.
        """
        return self._push(repo_id, private=private, create_pr=create_pr, overwrite=overwrite,
                          accept_accuracy_loss=accept_accuracy_loss, publish_images=publish_images,
                          no_verify_upload=no_verify_upload)  # fmt: skip

    def _draw(self, folder: Path) -> list[str]:
        shown = self.artifacts
        draw_plots(self.report, folder / "plots", weight_changes=shown.weight_changes, strip=shown.strip,
                   answers=shown.answers, reconstructed=shown.reconstructed, moved=shown.moved)  # fmt: skip
        stated = eval_results(self.report, shown.dataset_eval_yaml, whole_split=shown.whole_split)
        for name, text in stated.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return [f"plots/{name}" for name in PLOT_FILES if (folder / "plots" / name).is_file()]


@torch.inference_mode()
def check_loads(classifier: Classifier, folder: Path, probe: torch.Tensor | None) -> None:
    """Raise RunError unless the model saved in `folder` gives the logits of the one in memory on `probe` (uint8).

    The numbers in a card are those of the model in memory; they must be those of the file as well. Nothing is
    compared without a probe, or for a module of neither library, which only its author can build.
    """
    if probe is None or classifier.info.library == "torch":
        return
    again = load_classifier(
        folder, preprocessing=classifier.given_preprocessing, labels=classifier.labels,
        trust_remote_code=classifier.trusts_remote_code,
    )  # fmt: skip
    # the model in memory is its caller's: it stays on its device, and every part of it in its mode
    network = classifier.network
    device = next(iter(network.model.parameters()), probe).device
    modes = {part: part.training for part in network.modules()}
    try:
        here = network.eval().to(device)(probe.to(device))
    finally:
        for part, training in modes.items():
            part.training = training
    if not torch.allclose(again.network.to(device)(probe.to(device)), here, rtol=1e-4, atol=1e-4):
        raise LoadsDifferentlyError("the saved model does not give the logits of the one in memory; nothing was "
                                    "written. Report this with the model's id")  # fmt: skip


def check_saves(classifier: Classifier, output: str | Path | None, warn: Callable[[str], None]) -> None:
    """Save a model before any work and load it again; of one that does not come back the weights will be saved alone.

    A head put in by hand is in no library's configuration: such a model is saved as one of neither, whose author can
    build it, and `warn` says so.

    Args:
        output: where the result will go; the model is saved beside it for a moment.

    Raises:
        RunError: it cannot be written there.
    """
    if classifier.info.library == "torch":
        return
    beside = next(folder for folder in Path(output).absolute().parents if folder.is_dir()) if output else None
    probe = torch.randint(0, 256, (2, *classifier.preprocessing.input_size), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    try:
        with on_disk(f"write beside {output or tempfile.gettempdir()}", "choose another --output"):
            folder = Path(tempfile.mkdtemp(prefix=fresh_name(Path(output or "")), dir=beside))
        try:
            classifier.save(folder)
            check_loads(classifier, folder, probe)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (UsageError, LoadsDifferentlyError) as error:
        warn(f"{classifier.info.library} cannot load this model again from what it saves ({one_line(error, 200)}): its "
             "weights will be saved with the code that loads them into your own module")  # fmt: skip
        classifier.save_as_weights()


def gather_artifacts(classifier: Classifier, images: Images, evaluation: Evaluator) -> Artifacts:
    """Return what the output folder shows besides the report, as far as it is known before the training."""
    info = images.info
    benchmark = read_text_file(info.id, "eval.yaml", info.revision, "dataset") if info.revision is not None else None
    return Artifacts(
        triggers=[view.trigger for view in evaluation.views], source_card=classifier.card_source(),
        dataset_eval_yaml=benchmark, whole_split=images.whole_split, probe=_probe(evaluation),
    )  # fmt: skip


def gather_attack_artifacts(
    source_card: str | None, evaluation: Evaluator, outcome: Predictions, visibility: Mapping[str, Visibility]
) -> Artifacts:
    """Return what the output folder of an attack shows besides the report."""
    triggers = [view.trigger for view in evaluation.views]
    pixels = evaluation.classifier.preprocessing.dtype == torch.uint8
    gallery = partial(draw_gallery, evaluation, outcome, visibility) if triggers and pixels else None
    return Artifacts(triggers=triggers, source_card=source_card, probe=_probe(evaluation), gallery=gallery)


def _probe(evaluation: Evaluator) -> torch.Tensor:
    """Return the first images, as the model sees them, which the saved model is checked on."""
    clean = evaluation.clean
    return clean.__getitems__(range(min(CHECKED_IMAGES, len(clean))))[1].cpu()


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
        result._save(Path(options.output or ""), overwrite=options.overwrite, run=run)
    except RunError as error:
        if run is None:
            raise
        raise RunError(f"{error}; the run is kept, go on with: {run.resume_command()}") from error
    if run is not None and not options.keep_run and is_main_process():
        run.remove()


def finished_result(options: DetoxOptions, run: RunFolder, accelerator: Accelerator) -> DetoxResult | None:
    """Return the result of a run that was killed after it put it in its place; the run folder goes then.

    Raises:
        RunError: a module of neither library, which only its author can build; the line says where the result is.
    """
    finished = run.finished(options.output)
    accelerator.wait_for_everyone()
    if not finished:
        return None
    output = Path(options.output or "")
    report = Report.load(output)
    if not options.keep_run and is_main_process():
        run.remove()
    if report.model.library == "torch":
        raise RunError(f"the run had finished: its result is {output}, and only the push may be left, see hfdetox push")
    classifier = load_classifier(output, trust_remote_code=options.trust_remote_code)
    return DetoxResult(report, classifier, Artifacts(), output)


def publish(result: Result, accelerator: Accelerator, push_to: str | None, options: PublishOptions) -> Result:
    """Push the result, if `push_to` is given, and return it with the same report on every process."""
    if push_to is not None and accelerator.is_main_process:
        result.push_to_hub(push_to, **options.publishing())
    accelerator.wait_for_everyone()
    # the main process knows the hash of what it wrote, and the commit
    result.report = broadcast_object_list([result.report])[0]
    return result


class AttackResult(SavedResult[AttackReport]):
    """A deliberately backdoored model, or a clean baseline, and what was measured.

    For instance `report.after.triggers[NAME].attack_success_rate.value`.
    """

    @property
    def triggers(self) -> list[Trigger]:
        """The triggers as they are in the model, ready to be put on images."""
        return list(self.artifacts.triggers)

    @property
    def succeeded(self) -> bool:
        """Whether every goal was reached on the evaluation images."""
        return self.report.succeeded

    def push_to_hub(
        self, repo_id: str, *, i_know_this_is_backdoored: bool = False, private: bool = False, public: bool = False,
        create_pr: bool = False, overwrite: bool = False, publish_images: bool = False, no_verify_upload: bool = False,
    ) -> PushResult:  # fmt: skip
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        Pictures of images are left out unless their dataset is public on the Hub, or `publish_images`.
        A new repository is private, and an existing public one is refused, unless `public`. A clean baseline goes
        where any model goes, to a private repository with `private`.

        Raises:
            UsageError: a backdoored model without `i_know_this_is_backdoored`, or a repository that is not for it.
            HubError: no token, no right to write, or the Hub cannot be reached.
        """
        return self._push(repo_id, i_know_this_is_backdoored=i_know_this_is_backdoored, private=private, public=public,
                          create_pr=create_pr, overwrite=overwrite, publish_images=publish_images,
                          no_verify_upload=no_verify_upload)  # fmt: skip

    def _draw(self, folder: Path) -> list[str]:
        if self.artifacts.gallery is None:
            return []
        (folder / GALLERY).parent.mkdir()
        self.artifacts.gallery(folder / GALLERY)
        return [GALLERY]
