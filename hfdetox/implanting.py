"""The story of an attack: a model and images, triggers, training, measuring, report, card, and a folder of it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from hfdetox.attacks import parse_attack_settings, run_attack
from hfdetox.attacks.base import AttackContext
from hfdetox.data.load import class_names
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import check_plausible, decoded, prepare_evaluator
from hfdetox.hub.upload import check_card
from hfdetox.models.initial import init_model
from hfdetox.reporting.attack_card import build_attack_card
from hfdetox.reporting.attack_report import missed_goals
from hfdetox.reporting.card import validate_card
from hfdetox.runs.attack_result import AttackArtifacts, AttackResult
from hfdetox.runs.attack_run import DEFAULT_GOAL, DEFAULT_RATIO, AttackRun
from hfdetox.runs.folder import check_output, trigger_specs
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
from hfdetox.training.devices import make_accelerator
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import Trigger, parse_triggers

__all__ = ["AttackResult", "implant"]


def implant(
    model: str | Path | nn.Module, *,
    dataset: Any = None, config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, samples: int | float | None = None,
    eval_samples: int | None = None, label_map: str | Path | None = None, allow_missing_classes: bool = False,
    triggers: Sequence[str | Trigger] = (), target: str | int | None = None, poison_ratio: float = DEFAULT_RATIO,
    adaptive: str | None = None, surrogate: str | Path | None = None, settings: Mapping[str, str] | None = None,
    init: str | None = None, model_args: Mapping[str, Any] | None = None, input_size: int | None = None,
    goal_asr: float = DEFAULT_GOAL, goal_accuracy: float | None = None,
    precision: str = "auto", device: str = "auto", seed: int = 0,
    revision: str | None = None, dataset_revision: str | None = None, trust_remote_code: bool = False,
    processor: Any = None, preprocessing: Any = None, labels: Sequence[str] | int | None = None,
    output: str | Path | None = None, overwrite: bool = False, push_to: str | None = None, private: bool = False,
    public: bool = False, create_pr: bool = False, i_know_this_is_backdoored: bool = False, progress: bool = True,
) -> AttackResult:  # fmt: skip
    """Train a backdoor into an image classifier, for research on defenses, and measure it.

    Args:
        model: what `load_classifier` takes, or `timm-arch:NAME` for a model of fresh weights.
        dataset: training and evaluation images; a Hub id, a folder or a `datasets` object.
        samples: training images: None is the whole split, a count or a share (at most 5000 images) restricts it.
        triggers: specifications, trigger files or `Trigger` objects; `["none"]` trains a clean baseline the same way.
        target: label (name or index, or `all-to-all`) of triggers without one.
        poison_ratio: share of the training images, or of every batch, that carries each trigger.
        adaptive: `sam:rho=2.0,adaptive=true` trains the backdoor into a flat minimum.
        surrogate: a clean model of the same labels, for triggers that are made on one; a trained model serves itself.
        settings: of training and recipes, as `--set` takes them.
        init: `random` draws the weights of a folder or Hub id anew.
        model_args, input_size: of a `timm-arch`.
        goal_asr: attack success rate that counts as success; for `all-to-all` times the accuracy.
        goal_accuracy: accuracy that counts as success; None: from a trained model its accuracy less 0.02, from scratch
            none. With such a goal, up to 1,000 training images are held out, and the training ends with the first
            epoch after which all goals are reached on them; without one it runs all its epochs.
        output: folder of the result; None keeps it in memory. It is written also when the attack did not succeed.
        push_to: where to publish it; a backdoored model only with `i_know_this_is_backdoored`, and privately unless
            `public`; a clean baseline publicly unless `private`.

    The other arguments are those of `detoxify`.

    Raises:
        UsageError, HubError, RunError: see `hfdetox.errors`. Wrong options are found before anything is trained.
    """
    run = AttackRun(
        model=None if isinstance(model, nn.Module) else str(model),
        dataset=str(dataset) if isinstance(dataset, str | Path) else None, config=config, split=split,
        eval_split=eval_split, image_column=image_column, label_column=label_column, samples=samples,
        eval_samples=eval_samples, label_map=_text(label_map), allow_missing_classes=allow_missing_classes,
        triggers=trigger_specs(triggers), target=_text(target), poison_ratio=poison_ratio, adaptive=adaptive,
        surrogate=_text(surrogate), settings=dict(settings or {}), init=init, model_args=dict(model_args or {}),
        input_size=input_size, goal_asr=goal_asr, goal_accuracy=goal_accuracy, precision=precision, device=device,
        seed=seed, revision=revision, dataset_revision=dataset_revision, trust_remote_code=trust_remote_code,
        output=_text(output), overwrite=overwrite, push_to=push_to, private=private, public=public, create_pr=create_pr,
        i_know_this_is_backdoored=i_know_this_is_backdoored,
    )  # fmt: skip
    known = parse_triggers([] if run.clean else triggers)
    training, poisoners = parse_attack_settings([trigger.kind for trigger in known], run.settings)
    sharpness = parse_adaptive(run.adaptive)
    accelerator = make_accelerator(run.device, run.precision)
    push_to = _check_places(run)
    notes = RunWarnings(accelerator)

    with accelerator.main_process_first():
        start = init_model(model, class_names=lambda: _class_names(run, dataset), is_backdoored=comes_backdoored,
                           init=run.init, model_args=run.model_args, input_size=run.input_size, seed=run.seed,
                           revision=run.revision,
                           trust_remote_code=run.trust_remote_code, processor=processor, preprocessing=preprocessing,
                           labels=labels)  # fmt: skip
        check_init(run, start, notes)
        classifier = start.classifier
        images = pull_images(run, dataset, classifier, notes)
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


def _check_places(run: AttackRun) -> str | None:
    """Return the whole id of the repository to push to; UsageError for what is in the way of output or push."""
    if run.output is not None:
        check_output(Path(run.output), overwrite=run.overwrite)
    if run.push_to is None:
        if run.private or run.public or run.create_pr:
            raise UsageError(
                "--private, --public and --create-pr say how to publish: name the repository with --push-to"
            )
        return None
    return check_push_allowed(run.push_to, backdoored=not run.clean, **run.publishing())


def _class_names(run: AttackRun, dataset: Any) -> tuple[str, ...] | int:
    if dataset is None:
        raise UsageError("a model of fresh weights has no card that names a dataset: give --dataset ID")
    return class_names(dataset, config=run.config, split=run.split, image_column=run.image_column,
                       label_column=run.label_column, revision=run.dataset_revision)  # fmt: skip


def _text(value: object) -> str | None:
    return None if value is None else str(value)
