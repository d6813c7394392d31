"""The steps of the story that are not a subject of their own: opening a run, its images, report and exhibits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from hfdetox._version import __version__
from hfdetox.config import DEFAULT_SAMPLES, DetoxOptions, ImageOptions
from hfdetox.data.load import Images, default_dataset, load_images
from hfdetox.defenses import DefenseConfig
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions, ratings
from hfdetox.hub.download import read_text_file
from hfdetox.models.classifier import Classifier
from hfdetox.progress import progress_bar, updates
from hfdetox.reporting.environment import describe_environment
from hfdetox.reporting.report import DefenseInfo, OutputInfo, Report
from hfdetox.runs.folder import PUBLISHING, RunFolder, check_output, command_of, same_model
from hfdetox.runs.result import CHECKED_IMAGES, Artifacts, DetoxResult
from hfdetox.training.batches import ImageSource
from hfdetox.training.devices import describe_devices
from hfdetox.training.engine import Engine, TrainingRecord

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=ImageOptions)


class RunWarnings:
    """What the run has to say besides its numbers: shown at once on the main process, and kept for report and card."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.texts: list[str] = []
        self._shown = accelerator.is_main_process

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.texts:
            self.texts.append(text)
            if self._shown:
                logger.warning(text)


def open_run(options: DetoxOptions) -> tuple[DetoxOptions, RunFolder | None]:
    """Return the options that count and the run folder, None without output.

    A resumed run's options are the recorded ones; how it is published may be added to them, or all of it said anew.

    Raises:
        UsageError: the output holds something, a run is there already, `resume` is not a run folder or one of another
            model, or it is said how to publish and not where.
    """
    run = RunFolder(Path(options.resume)) if options.resume is not None else None
    if run is not None:
        recorded = run.recorded()
        of_it = None if recorded.model is None else str(recorded.model)
        if options.model is not None and not same_model(str(options.model), of_it):
            of = recorded.model or "a loaded model"
            raise UsageError(f"{run.path} is a run of {of}, not of {options.model}: leave the model out, or start anew")
        if options.push_to is not None:
            anew: dict[str, Any] = {**options.publishing(), "push_to": options.push_to}
        else:
            anew = {name: getattr(recorded, name) or getattr(options, name) for name in PUBLISHING}
        options = replace(recorded, **anew, log_with=options.log_with, keep_run=options.keep_run)
        options.check_publishing()
    if options.output is not None:
        check_output(Path(options.output), overwrite=options.overwrite)
        if run is None:
            run = RunFolder.beside(options.output)
            run.refuse_existing()
    return options, run


def pull_images(
    options: ImageOptions, dataset: Any, classifier: Classifier, notes: RunWarnings, *, progress: bool = False
) -> Images:
    """Return the clean and evaluation images; `dataset` is an object, or the id or folder that `options` has too."""
    for text in classifier.warnings:
        notes.warn(text)
    chosen = options.dataset if dataset is None or isinstance(dataset, str | Path) else dataset
    if chosen is None:
        chosen = default_dataset(classifier.card_source())
        notes.warn(f"the clean images are from {chosen}, which the model's own card names: its author chose them")
    # every image is decoded once, which takes minutes for large sets
    with progress_bar("read images", None, "image", shown=progress) as bar:
        return load_images(
            chosen, labels=classifier.labels,
            # what is only measured sets the same images aside
            clean_samples=getattr(options, "clean_samples", DEFAULT_SAMPLES), eval_samples=options.eval_samples,
            dataset_config=options.dataset_config, split=options.split, eval_split=options.eval_split,
            image_column=options.image_column, label_column=options.label_column, revision=options.dataset_revision,
            label_map=Path(options.label_map) if options.label_map else None, seed=options.seed,
            channels=classifier.preprocessing.input_size[0], allow_missing_classes=options.allow_missing_classes,
            warn=notes.warn, progress=updates(bar),
            # a resumed run's dataset with a commit was one of the Hub, whatever folder has its name here
            hub_only=dataset is None and (options.dataset is None or options.dataset_revision is not None),
        )  # fmt: skip


def pin(options: Options, classifier: Classifier, images: Images) -> Options:
    """Return the options with the commits that were found, so that repeating them repeats the run."""
    if classifier.info.revision is not None:
        options = replace(options, model=classifier.info.id, revision=classifier.info.revision)
    if images.info.revision is not None:
        options = replace(options, dataset=images.info.id, dataset_revision=images.info.revision)
    return options


def train(
    classifier: Classifier, method: DefenseConfig, source: ImageSource, accelerator: Accelerator, options: DetoxOptions,
    *, run: RunFolder | None, log_with: str | None, progress: bool,
) -> TrainingRecord:  # fmt: skip
    """Run the defense's phases on the classifier in place, from the run's last checkpoint if there is one."""
    if log_with is not None:
        accelerator.init_trackers("hfdetox", config={k: str(v) for k, v in method.settings().items()})
    checkpoints = run.checkpoints if run is not None else None
    engine = Engine(accelerator, source, seed=options.seed, checkpoints=checkpoints, progress=progress)
    record = engine.run(classifier.network, method.phases(classifier.network))
    # `end_training` would also end the process group, which the rest of the run needs
    for tracker in accelerator.trackers if log_with is not None else ():
        tracker.finish()
    return record


def open_report(
    options: DetoxOptions, classifier: Classifier, images: Images, method: DefenseConfig, preset: str,
    before: Predictions,
    accelerator: Accelerator, *, push_to: str | None, notes: RunWarnings,
) -> Report:  # fmt: skip
    """Return the report as far as it is known before the training; a preset that settings changed is none."""
    return Report(
        hfdetox_version=__version__,
        model=classifier.info,
        dataset=images.info,
        defense=DefenseInfo(
            name=method.name, preset=None if options.settings else preset, parameters=method.settings(),
            layers=method.selected_layers(classifier.model), epochs=0, steps=0, seconds=0.0, images_per_second=0.0,
            precision=accelerator.mixed_precision, devices=describe_devices(accelerator),
        ),
        before=before.measurement,
        after=None,
        defense_effectiveness_rating=None,
        history=[],
        output=OutputInfo(pushed_to=push_to),
        environment=describe_environment(accelerator.device, seed=options.seed, command=command_of(options)),
        warnings=notes.texts,
    )  # fmt: skip


def save_result(result: DetoxResult, options: DetoxOptions, run: RunFolder | None) -> None:
    """Write the output folder, on the main process; a RunError says how to go on with the run, which is kept."""
    try:
        result.save(options.output or "", overwrite=options.overwrite)
    except RunError as error:
        if run is None:
            raise
        raise RunError(f"{error}; the run is kept, go on with: {run.resume_command()}") from error


def close_report(
    report: Report,
    method: DefenseConfig,
    record: TrainingRecord,
    before: Predictions,
    after: Predictions,
    memory: int | None,
) -> Report:
    """Return the report with what the training was and what the measurement after it found."""
    done = replace(
        report.defense, epochs=record.epochs, steps=record.steps, seconds=record.seconds,
        images_per_second=record.images_per_second, precision=record.precision, peak_memory=memory,
        choices=method.choices(record.history),
    )  # fmt: skip
    rating = ratings(before, after, seed=report.environment.seed) or None
    return replace(
        report, defense=done, after=after.measurement, history=record.history, defense_effectiveness_rating=rating
    )


def gather_artifacts(classifier: Classifier, images: Images, evaluation: Evaluator, *, whole_split: bool) -> Artifacts:
    """Return what the output folder shows besides the report, as far as it is known before the training."""
    info, clean = images.info, evaluation.clean
    benchmark = read_text_file(info.id, "eval.yaml", info.revision, "dataset") if info.revision is not None else None
    return Artifacts(
        triggers=[view.trigger for view in evaluation.views],
        source_card=classifier.card_source(),
        dataset_eval_yaml=benchmark,
        whole_split=whole_split,
        probe=clean.__getitems__(range(min(CHECKED_IMAGES, len(clean))))[1].cpu(),
    )


def selected_weights(classifier: Classifier, method: DefenseConfig) -> dict[str, NDArray[np.float32]]:
    """Return copies of the weights that the defense treats apart, by layer name."""
    state = classifier.model.state_dict()
    names = method.selected_layers(classifier.model)
    return {name: state[f"{name}.weight"].float().cpu().numpy().copy() for name in names}
