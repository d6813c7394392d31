"""The pipeline: pull a model and clean images, measure, defend, measure again, report, save and publish."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hfdetox.arguments import takes
from hfdetox.config import DetoxOptions, EvaluateOptions
from hfdetox.data.load import Images, pin
from hfdetox.defenses import DefenseConfig, choose_defense, describe_defense
from hfdetox.evaluation.evaluator import decoded, prepare_evaluator, settle_order
from hfdetox.evaluation.results import EvalResult
from hfdetox.evaluation.verdict import describe_loss
from hfdetox.evidence.cost import measure_cost, measuring_effort, say_cost
from hfdetox.evidence.inquiry import Inquiry, planned_passes
from hfdetox.logging import RunWarnings
from hfdetox.models.classifier import Classifier
from hfdetox.planning import plan
from hfdetox.progress import draws, note
from hfdetox.reporting.card import build_card
from hfdetox.reporting.filling import close_report, open_report
from hfdetox.reporting.gallery import check_gallery, draw_gallery
from hfdetox.reporting.report import Report
from hfdetox.runs.folder import RunFolder, command_of, fingerprint, holds_output, log_folder, open_run
from hfdetox.runs.pictures import draw_strip, find_answers, show_evidence
from hfdetox.runs.publish import check_push_allowed
from hfdetox.runs.pulling import pull
from hfdetox.runs.result import (
    DetoxResult,
    check_draft,
    finished_result,
    gather_artifacts,
    publish,
    save_result,
    selected_weights,
)
from hfdetox.runs.tracking import close_trackers
from hfdetox.training.batches import ImageSource
from hfdetox.training.devices import (
    accelerate_state_kept,
    forget_peak_memory,
    make_accelerator,
    peak_memory,
)
from hfdetox.training.engine import Engine, TrainingRecord
from hfdetox.training.unusual import tamed
from hfdetox.triggers import parse_triggers, reload_triggers

__all__ = ["DetoxResult", "detoxify", "evaluate", "plan"]


@takes(DetoxOptions)
@accelerate_state_kept()
@holds_output
def detoxify(given: DetoxOptions) -> DetoxResult:
    """Make an image classifier forget any backdoor, and measure what that did.

    Args:
        {arguments}

    Returns:
        The cleaned model and its report, the same on every process. One that lost too much accuracy is written too, and
        its report says `rejected`; it is not pushed unless `accept_accuracy_loss`.

    Raises:
        UsageError: it cannot be run as asked. HubError: the Hub or the network. RunError: it ran and failed.
    """
    options, run = open_run(_without_objects(given))
    resumed, progress = given.resume is not None, given.progress
    method, preset = choose_defense(given.defense, str(options.defense), options.settings or {}, resumed=resumed)
    # objects hold more than their text form, which is all that the options of a new run have of them
    # a run that was killed while its folder was removed has its result, and maybe no trigger files
    done = run is not None and resumed and run.finished(options.output)
    recorded = [] if done else options.triggers
    known = reload_triggers(recorded, given.triggers) if resumed else parse_triggers(given.triggers)
    accelerator, options = _prepared(given, options)
    push_to = options.push_to and check_push_allowed(options.push_to, **options.publishing())
    notes = RunWarnings()
    if resumed and run is not None and (result := finished_result(options, run, accelerator)) is not None:
        push_to, result.report = _judged(result.report, options, push_to, notes.warn)
        return publish(result, accelerator, push_to, options)

    classifier, images = _pulled(given, options, accelerator, notes.warn)
    inputs = fingerprint(classifier, images)
    if run is not None:
        run.check_fingerprint(inputs)
    evaluation = prepare_evaluator(classifier, images.evaluation, known, accelerator, target=options.target,
                                    warn=notes.warn, progress=progress, also=images.info.label_map)  # fmt: skip
    if not resumed and (draws(progress) or options.max_minutes is not None or accelerator.num_processes > 1):
        cost = measure_cost(evaluation, method, len(images.clean), scan=options.scan, residual=options.residual)
        cost.check(options.max_minutes)
        cost.say(progress=progress)
    before = evaluation.measure_plausible("before", notes.warn)

    # a run must not fail at its end for a reason known at its start
    options = replace(pin(options, classifier, images), push_to=push_to)
    report = open_report(options, classifier, images, method, preset, before, accelerator,
                         command=command_of(options), warnings=notes.texts)  # fmt: skip
    pixels = decoded(images.clean, classifier, accelerator, "decode", progress)
    limit = planned_passes(method, len(pixels)) // 2
    inquiry = Inquiry(evaluation, pixels, options.seed, limit, wanted=options.scan, tested=options.residual)
    report = replace(report, evidence=inquiry.begin(before))
    if report.evidence is not None and report.evidence.images is not None:
        note(report.evidence.images.described, shown=progress)
    artifacts = gather_artifacts(classifier, images, evaluation)
    check_draft(build_card(report, source_card=artifacts.source_card, repo_id=push_to, labels=classifier.labels),
                push_to, accelerator)  # fmt: skip
    if run is not None and accelerator.is_main_process:
        run.begin(options, known, inputs)

    start = selected_weights(classifier, method)
    record, memory = train(classifier, method, pixels, accelerator, options, run=run, progress=progress,
                           warn=notes.warn)  # fmt: skip
    classifier.round_weights()
    after, uncorrected = evaluation.measure("after"), evaluation.measure_uncorrected("after, uncorrected")

    artifacts.weight_changes = {name: now - start[name] for name, now in selected_weights(classifier, method).items()}
    artifacts.strip, artifacts.answers = draw_strip(evaluation, before, after), find_answers(evaluation, before, after)
    report = close_report(report, method, record, before, after, uncorrected, memory, options.max_accuracy_loss / 100)
    report = replace(report, evidence=inquiry.end(after, before))
    show_evidence(artifacts, inquiry, before, after)
    push_to, report = _judged(report, options, push_to, notes.warn)
    result = DetoxResult(report, classifier, artifacts)
    if options.output is not None:
        save_result(result, options, run)
    close_trackers(accelerator, options)
    return publish(result, accelerator, push_to, options)


@takes(EvaluateOptions)
@accelerate_state_kept()
def evaluate(given: EvaluateOptions) -> EvalResult:
    """Measure a classifier: accuracy, loss, what each known trigger does, and how visible it is.

    The images are those of the evaluation split, or of the one split there is: none are set aside for a defense. A
    module that is passed is turned to float32 and eval mode. Nothing is written but the gallery, a PNG file.

    Args:
        {arguments}

    Raises:
        UsageError, HubError, RunError: as `detoxify` does.
    """
    options, known = given.plain(), parse_triggers(given.triggers)
    if options.gallery is not None:
        check_gallery(Path(options.gallery), known)
    own = given.accelerator
    accelerator = make_accelerator(options.device, "no" if own is None else "auto", given=own)
    notes = RunWarnings()
    classifier, images = _pulled(given, options, accelerator, notes.warn)
    evaluation = prepare_evaluator(classifier, images.evaluation, known, accelerator, target=options.target,
                                    warn=notes.warn, progress=given.progress,
                                    also=images.info.label_map)  # fmt: skip
    say_cost(evaluation, "measuring", measuring_effort(evaluation), progress=given.progress)
    outcome = evaluation.measure_plausible("measure", notes.warn, trains=False)
    measured = outcome.measurement
    visibility = evaluation.visibility()
    if options.gallery is not None and accelerator.is_main_process:
        draw_gallery(evaluation, outcome, visibility, Path(options.gallery))
    return EvalResult(measured.accuracy, measured.loss, measured.triggers, measured.classes, visibility)


def _prepared(given: DetoxOptions, options: DetoxOptions) -> tuple[Accelerator, DetoxOptions]:
    """Return the accelerator of a run, the caller's own where there is one, and the options with what it decides."""
    accelerator = make_accelerator(options.device, options.precision, options.log_with,
                                   str(log_folder(options.output)), given=given.accelerator)  # fmt: skip
    if given.accelerator is not None:
        # a resumed run may be given none
        options = replace(options, device=accelerator.device.type, precision=accelerator.mixed_precision)
    return accelerator, options


def _pulled(
    given: DetoxOptions | EvaluateOptions, options: Any, accelerator: Accelerator, warn: Callable[[str], None]
) -> tuple[Classifier, Images]:
    """Return the classifier and its images, whose labels are in an order that fits it."""
    with accelerator.main_process_first():
        classifier, images = pull(given, options, warn)
    return classifier, settle_order(images, classifier, accelerator, warn, given.progress)


def train(
    classifier: Classifier, method: DefenseConfig, source: ImageSource, accelerator: Accelerator, options: DetoxOptions,
    *, run: RunFolder | None, progress: bool, warn: Callable[[str], None],
) -> tuple[TrainingRecord, int | None]:  # fmt: skip
    """Run the defense's phases on the classifier in place, from the run's last checkpoint if there is one.

    Returns:
        What the training was, and the most bytes that a process held, None where unknown.
    """
    forget_peak_memory(accelerator)
    if options.log_with is not None:
        accelerator.init_trackers("hfdetox", config={k: str(v) for k, v in method.settings().items()})
    checkpoints = run.checkpoints if run is not None else None
    engine = Engine(accelerator, source, seed=options.seed, checkpoints=checkpoints, progress=progress)
    with tamed(classifier.network, method.phases(classifier.network), warn) as phases:
        record = engine.run(classifier.network, phases)
    if any(entry.get("unchanged") == 1 for entry in record.history):
        warn(f"{method.name} found nothing that it would change, and returns the model as it came")
    return record, peak_memory(accelerator)


def _judged(
    report: Report, options: DetoxOptions, push_to: str | None, warn: Callable[[str], None]
) -> tuple[str | None, Report]:
    """Return where the result may be pushed, and the report that says so: a rejected one only if that was asked for."""
    if report.rejected:
        warn(f"the model is rejected: {describe_loss(report.rejected)}")
        if not options.accept_accuracy_loss:
            return None, replace(report, output=replace(report.output, pushed_to=None))
    return push_to, report


def _without_objects(given: DetoxOptions) -> DetoxOptions:
    """Return the options as a run records them: a defense by its name and what was changed of its settings."""
    options = given.plain()
    if isinstance(given.defense, DefenseConfig):
        spec, texts = describe_defense(given.defense)
        options = replace(options, defense=spec, settings=texts)
    return options
