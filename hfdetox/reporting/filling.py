"""Fills the reports: before the training as far as it is known, and after it with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace

from accelerate import Accelerator

from hfdetox._version import __version__
from hfdetox.attacks import Implanted
from hfdetox.attacks.base import AttackContext, Implant
from hfdetox.config import AttackOptions, DetoxOptions
from hfdetox.data.info import DatasetInfo
from hfdetox.data.load import Images
from hfdetox.defenses import DefenseConfig
from hfdetox.evaluation.metrics import Predictions, ratings
from hfdetox.evaluation.results import Measurement, Rate, Visibility
from hfdetox.models.classifier import Classifier
from hfdetox.models.initial import InitialModel
from hfdetox.reporting.attack_report import SCRATCH, AttackInfo, AttackReport, Goals, ImplantedTrigger, missed_goals
from hfdetox.reporting.environment import describe_environment
from hfdetox.reporting.report import DefenseInfo, OutputInfo, Report
from hfdetox.training.devices import describe_devices
from hfdetox.training.engine import TrainingRecord


def open_report(
    options: DetoxOptions, classifier: Classifier, images: Images, method: DefenseConfig, preset: str,
    before: Predictions,
    accelerator: Accelerator, *, command: str, warnings: list[str],
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
            description=method.describe(images.info.described()), trigger_given=method.trigger_given,
        ),
        before=before.measurement,
        after=None,
        defense_effectiveness_rating=None,
        history=[],
        output=OutputInfo(pushed_to=options.push_to),
        environment=describe_environment(accelerator.device, seed=options.seed, command=command),
        warnings=warnings,
    )  # fmt: skip


def close_report(
    report: Report, method: DefenseConfig, record: TrainingRecord, before: Predictions, after: Predictions,
    uncorrected: Measurement | None, memory: int | None,
) -> Report:  # fmt: skip
    """Return the report with what the training was and what the measurement after it found."""
    done = replace(
        report.defense, epochs=record.epochs, steps=record.steps, seconds=record.seconds,
        images_per_second=record.images_per_second, precision=record.precision, peak_memory=memory,
        choices=method.choices(record.history),
    )  # fmt: skip
    rating = ratings(before, after, seed=report.environment.seed) or None
    return replace(report, defense=done, after=after.measurement, uncorrected=uncorrected, history=record.history,
                   defense_effectiveness_rating=rating)  # fmt: skip


def open_attack_report(
    run: AttackOptions, start: InitialModel, dataset: DatasetInfo, implants: Sequence[Implant], context: AttackContext,
    before: Predictions | None,
    goals: Goals, surrogate: Classifier | None, *, command: str, warnings: list[str],
) -> AttackReport:  # fmt: skip
    """Return the report as far as it is known before the training."""
    info = start.classifier.info
    return AttackReport(
        hfdetox_version=__version__,
        model=info,
        dataset=dataset,
        attack=AttackInfo(
            triggers={implant.trigger.name: _describe(implant, None) for implant in implants},
            start=SCRATCH if start.from_scratch else info.id,
            adaptive=context.sharpness.spec() if context.sharpness else None,
            surrogate=surrogate.info.id if surrogate is not None else None, training=asdict(context.training), epochs=0,
            steps=0, seconds=0.0, images_per_second=0.0, precision=context.accelerator.mixed_precision,
            devices=describe_devices(context.accelerator), stopped_early=False, start_backdoored=start.backdoored,
        ),
        before=before.measurement if before is not None else None,
        after=None,
        goals=goals,
        succeeded=False,
        history=[],
        output=OutputInfo(pushed_to=run.push_to),
        environment=describe_environment(context.accelerator.device, seed=run.seed, command=command),
        warnings=warnings,
    )  # fmt: skip


def close_attack_report(
    report: AttackReport, done: Implanted, after: Predictions, visibility: Mapping[str, Visibility],
    cross: Mapping[str, Rate], *, epochs: int, reached: bool,
) -> AttackReport:  # fmt: skip
    """Return the report with what the training was, and what was measured after it."""
    record, measured = done.record, after.measurement
    triggers = {}
    for implant in done.implants:
        name = implant.trigger.name
        seen = visibility.get(name)
        triggers[name] = replace(
            _describe(implant, done.poisoned.get(name)), spec=measured.triggers[name].spec,
            file_sha256=measured.triggers[name].file_sha256 or "", psnr=seen.psnr if seen else None,
            max_change=seen.max_change if seen else None, changed=seen.changed if seen else None,
            cross_accuracy=cross.get(name),
        )  # fmt: skip
    attack = replace(
        report.attack, triggers=triggers, epochs=record.epochs, steps=record.steps, seconds=record.seconds,
        images_per_second=record.images_per_second, precision=record.precision,
        stopped_early=reached and record.history[-1]["epoch"] < epochs,
    )  # fmt: skip
    return replace(
        report,
        attack=attack,
        after=measured,
        succeeded=not missed_goals(measured, report.goals),
        history=record.history,
    )


def _describe(implant: Implant, poisoned: int | None) -> ImplantedTrigger:
    trigger, poisoner = implant.trigger, implant.poisoner
    return ImplantedTrigger(
        kind=trigger.kind, spec=trigger.recorded(), mode=trigger.mode, target=implant.target, file_sha256="",
        poison_ratio=implant.ratio, poisoned_images=poisoned, recipe=poisoner.how.replace(" ", "-"),
        settings={f.name: getattr(poisoner, f.name) for f in fields(poisoner)},
    )  # fmt: skip
