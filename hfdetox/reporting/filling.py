"""Fills the reports: before the training as far as it is known, and after it with what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from accelerate import Accelerator

from hfdetox._version import __version__
from hfdetox.attacks import Implanted
from hfdetox.attacks.base import AttackContext, Implant
from hfdetox.config import AttackOptions, DetoxOptions, TrainingOptions
from hfdetox.data.info import DatasetInfo
from hfdetox.data.load import Images
from hfdetox.defenses import DefenseConfig
from hfdetox.evaluation.metrics import Predictions, paired_difference, ratings
from hfdetox.evaluation.results import Measurement, Rate, Visibility
from hfdetox.evaluation.verdict import judge_accuracy
from hfdetox.models.classifier import Classifier
from hfdetox.models.initial import InitialModel
from hfdetox.reporting import report as schema
from hfdetox.reporting.environment import describe_environment
from hfdetox.training.devices import describe_devices
from hfdetox.training.engine import TrainingRecord


def open_report(
    options: DetoxOptions, classifier: Classifier, images: Images, method: DefenseConfig, preset: str,
    before: Predictions, accelerator: Accelerator, *, command: str, warnings: list[str],
) -> schema.Report:  # fmt: skip
    """Return the report as far as it is known before the training; a preset that settings changed is none.

    Args:
        options: as they are recorded, with the commits that the run uses.
        method, preset: the defense, and the name of the preset that it was made of.
        before: what was measured of the model as it came.
        command: what repeats the run, "" where objects took part.
        warnings: the list that the run's warnings are added to, also those to come.
    """
    return schema.Report(
        **_known(classifier, images.info, before, accelerator, options, command, warnings),
        defense=schema.DefenseInfo(
            name=method.name, preset=None if options.settings else preset, parameters=method.settings(),
            layers=method.selected_layers(classifier.model), devices=describe_devices(accelerator),
            **_training(TrainingRecord(precision=accelerator.mixed_precision)),
            description=method.describe(images.info.described()), trigger_given=method.trigger_given,
        ),
        defense_effectiveness_rating=None,
    )  # fmt: skip


def close_report(
    report: schema.Report, method: DefenseConfig, record: TrainingRecord, before: Predictions, after: Predictions,
    uncorrected: Measurement | None, memory: int | None, allowed: float,
) -> schema.Report:  # fmt: skip
    """Return the report with what the training was and what the measurement after it found.

    Args:
        report: as `open_report` gave it.
        record: what the training did.
        before, after: what was measured, of the same images and triggers.
        uncorrected: of a model with a correction, what timm or transformers gives; else None.
        memory: most bytes that one process held, None where unknown.
        allowed: the most that the run may cost in accuracy, a fraction.
    """
    done = replace(report.defense, **_training(record), peak_memory=memory, choices=method.choices(record.history))
    rating = ratings(before, after, seed=report.environment.seed) or None
    loss = judge_accuracy(paired_difference(before.correct, after.correct), allowed)
    return replace(report, defense=done, after=after.measurement, uncorrected=uncorrected, history=record.history,
                   defense_effectiveness_rating=rating, accuracy_loss=loss)  # fmt: skip


def open_attack_report(
    run: AttackOptions, start: InitialModel, dataset: DatasetInfo, implants: Sequence[Implant], context: AttackContext,
    before: Predictions | None, goals: schema.Goals, surrogate: Classifier | None, *, command: str, warnings: list[str],
) -> schema.AttackReport:  # fmt: skip
    """Return the report as far as it is known before the training.

    Args:
        run: the options as they are recorded, with the commits that the run uses.
        start: the model that it starts from.
        dataset: of the images that are trained on and measured.
        implants: the triggers with their targets; those that the training makes are not ready yet.
        before: None for a model that is trained from scratch.
        surrogate: the clean model that triggers are made on, None where none is needed.
        command: what repeats the run, "" where objects took part.
        warnings: the list that the run's warnings are added to, also those to come.
    """
    return schema.AttackReport(
        **_known(start.classifier, dataset, before, context.accelerator, run, command, warnings),
        attack=schema.AttackInfo(
            triggers={implant.trigger.name: _describe(implant, None) for implant in implants},
            start=schema.SCRATCH if start.from_scratch else start.classifier.info.id,
            adaptive=context.sharpness.spec() if context.sharpness else None,
            surrogate=surrogate.info.id if surrogate is not None else None, training=asdict(context.training),
            **_training(TrainingRecord(precision=context.accelerator.mixed_precision)),
            devices=describe_devices(context.accelerator), stopped_early=False, start_backdoored=start.backdoored,
        ),
        goals=goals, succeeded=False,
    )  # fmt: skip


def close_attack_report(
    report: schema.AttackReport, done: Implanted, after: Predictions, visibility: Mapping[str, Visibility],
    cross: Mapping[str, Rate], *, epochs: int, reached: bool,
) -> schema.AttackReport:  # fmt: skip
    """Return the report with what the training was, and what was measured after it.

    Args:
        report: as `open_attack_report` gave it.
        done: what the attack gave: the finished triggers, and what the training did.
        visibility: how visible each trigger is, by its name; empty where pixels are floats.
        cross: the cross accuracies, by the trigger's name, where there are such.
        epochs: those that were asked for.
        reached: whether the goals were reached while it was trained.
    """
    record, measured = done.record, after.measurement
    triggers = {}
    for implant in done.implants:
        name = implant.trigger.name
        triggers[name] = replace(
            _describe(implant, done.poisoned.get(name)), spec=measured.triggers[name].spec,
            file_sha256=measured.triggers[name].file_sha256 or "", cross_accuracy=cross.get(name),
            **(asdict(visibility[name]) if name in visibility else {}),
        )  # fmt: skip
    attack = replace(report.attack, triggers=triggers, **_training(record),
                     stopped_early=reached and record.history[-1]["epoch"] < epochs)  # fmt: skip
    return replace(report, attack=attack, after=measured, succeeded=not schema.missed_goals(measured, report.goals),
                   history=record.history)  # fmt: skip


def _known(
    classifier: Classifier, dataset: DatasetInfo, before: Predictions | None, accelerator: Accelerator,
    options: TrainingOptions, command: str, warnings: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return what is known of every run before its training, as the fields of both reports."""
    return {
        "hfdetox_version": __version__, "model": classifier.info, "dataset": dataset,
        "before": before.measurement if before is not None else None, "after": None, "history": [],
        "output": schema.OutputInfo(pushed_to=options.push_to), "warnings": warnings,
        "environment": describe_environment(accelerator.device, seed=options.seed, command=command),
    }  # fmt: skip


def _training(record: TrainingRecord) -> dict[str, Any]:
    """Return what a training was, as the fields of `DefenseInfo` and `AttackInfo`."""
    return {name: getattr(record, name) for name in ("epochs", "steps", "seconds", "images_per_second", "precision")}


def _describe(implant: Implant, poisoned: int | None) -> schema.ImplantedTrigger:
    trigger, poisoner = implant.trigger, implant.poisoner
    return schema.ImplantedTrigger(
        kind=trigger.kind, spec=trigger.recorded(), mode=trigger.mode, target=implant.target, file_sha256="",
        poison_ratio=implant.ratio, poisoned_images=poisoned, recipe=poisoner.how.replace(" ", "-"),
        settings={f.name: getattr(poisoner, f.name) for f in fields(poisoner)},
    )  # fmt: skip
