"""The pipeline of an attack: a model and images, triggers, training, measuring, report, card, and their folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from hfdetox.arguments import takes
from hfdetox.attacks import parse_attack_settings, run_attack
from hfdetox.attacks.base import AttackContext
from hfdetox.config import AttackOptions
from hfdetox.data.load import class_names
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import check_plausible, decoded, prepare_evaluator
from hfdetox.hub.upload import check_card
from hfdetox.models.initial import init_model
from hfdetox.reporting.attack_card import build_attack_card
from hfdetox.reporting.attack_report import missed_goals
from hfdetox.reporting.card import validate_card
from hfdetox.runs.attack_result import AttackArtifacts, AttackResult
from hfdetox.runs.folder import check_output
from hfdetox.runs.implanting import (
    Monitor,
    build_implants,
    check_init,
    close_report,
    cross_accuracies,
    find_surrogate,
    goals_of,
    open_report,
    split_monitor,
)
from hfdetox.runs.publish import check_push_allowed, comes_backdoored
from hfdetox.runs.steps import RunWarnings, pin, pull_images
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import parse_triggers

__all__ = ["AttackResult", "implant"]


@takes(AttackOptions)
@accelerate_state_kept()
def implant(given: AttackOptions) -> AttackResult:
    """Train a backdoor into an image classifier, for research on defenses, and measure it.

    Args:
        {arguments}

    Returns:
        The model and its report, the same on every process.

    Raises:
        UsageError, HubError, RunError: see `hfdetox.errors`. Wrong options are found before anything is trained.
    """
    run, progress = given.plain(), given.progress
    known = parse_triggers([] if run.clean else given.triggers)
    training, poisoners = parse_attack_settings([trigger.kind for trigger in known], run.settings or {})
    sharpness = parse_adaptive(run.adaptive)
    accelerator = make_accelerator(run.device, run.precision, given=given.accelerator)
    push_to = _check_places(run)
    notes = RunWarnings(accelerator)

    with accelerator.main_process_first():
        model = given.model if isinstance(given.model, nn.Module) else str(run.model)
        start = init_model(model, class_names=lambda: _class_names(run, given.dataset),
                           is_backdoored=comes_backdoored, init=run.init, model_args=run.model_args,
                           input_size=run.input_size, seed=run.seed, revision=run.revision,
                           trust_remote_code=run.trust_remote_code, processor=given.processor,
                           preprocessing=given.preprocessing, labels=given.labels)  # fmt: skip
        check_init(run, start, notes)
        classifier = start.classifier
        images = pull_images(run, given.dataset, classifier, notes, progress=progress)
        implants = build_implants(run, known, poisoners, classifier, images.clean, notes)
        clean_model = find_surrogate(run, start, implants)
    ready = [one.trigger for one in implants if one.trigger.fitted]
    evaluation = prepare_evaluator(classifier, images.evaluation, ready, accelerator, target=run.target,
                                    warn=notes.warn, progress=progress)  # fmt: skip
    before = None if start.from_scratch else evaluation.measure("before")
    if before is not None:
        check_plausible(before, evaluation.clean.labels, classifier.labels, notes.warn)

    goals = goals_of(run, before)
    kept, held_out = split_monitor(images.clean, goals.accuracy, run.seed, notes.warn)
    info = replace(images.info, clean_samples=len(kept), indices_sha256=kept.indices_sha256)
    clean = decoded(kept, classifier, accelerator, "decode", progress)
    context = AttackContext(classifier=classifier, clean=clean, accelerator=accelerator, training=training,
              from_scratch=start.from_scratch, surrogate=clean_model, sharpness=sharpness, seed=run.seed,
              progress=progress)  # fmt: skip
    report = open_report(pin(run, classifier, images), start, info, implants, context, before, goals, clean_model,
                         push_to=push_to, notes=notes)  # fmt: skip
    # a run must not fail at its end for a reason known at its start
    source_card = classifier.card_source()
    draft = build_attack_card(report, source_card=source_card, repo_id=push_to, labels=classifier.labels)
    validate_card(draft)
    if push_to is not None and accelerator.is_main_process:
        check_card(draft)

    monitor = None
    if held_out is not None:
        monitor = Monitor(prepare_evaluator(classifier, held_out, [], accelerator, target=None, warn=notes.warn,
                                             progress=progress), goals)  # fmt: skip
    done = run_attack(context, implants, monitor=monitor)
    classifier.round_weights()
    evaluation = evaluation.with_triggers([one.trigger for one in done.implants])
    after, visibility = evaluation.measure("after"), evaluation.visibility()
    cross = cross_accuracies(evaluation, done.implants)
    report = close_report(report, done, after, visibility, cross, epochs=training.epochs,
                          reached=monitor is not None and monitor.reached)  # fmt: skip
    if not report.succeeded:
        notes.warn(f"the attack did not succeed: {'; '.join(missed_goals(after.measurement, goals))}")
    result = AttackResult(report, classifier, AttackArtifacts(source_card, evaluation, after, visibility))
    if run.output is not None:
        result.save(run.output, overwrite=run.overwrite)
    if push_to is not None and accelerator.is_main_process:
        result.push_to_hub(push_to, **run.publishing())
    accelerator.wait_for_everyone()
    # the main process knows the hash of what it wrote, and the commit
    result.report = broadcast_object_list([result.report])[0]
    return result


def _check_places(run: AttackOptions) -> str | None:
    """Return the whole id of the repository to push to; UsageError for what is in the way of output or push."""
    if run.output is not None:
        check_output(Path(run.output), overwrite=run.overwrite)
    if run.push_to is None:
        return None
    return check_push_allowed(run.push_to, backdoored=not run.clean, **run.publishing())


def _class_names(run: AttackOptions, dataset: Any) -> tuple[str, ...] | int:
    if dataset is None:
        raise UsageError("a model of fresh weights has no card that names a dataset: give --dataset ID")
    return class_names(dataset, dataset_config=run.dataset_config, split=run.split, image_column=run.image_column,
                       label_column=run.label_column, revision=run.dataset_revision)  # fmt: skip
