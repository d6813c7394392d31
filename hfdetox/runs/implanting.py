"""The steps of an attack's story that are not a subject of their own: its images, implants, goals and report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from hfdetox._version import __version__
from hfdetox.attacks import Implanted
from hfdetox.attacks.base import AttackContext, Implant, Poisoner, TrainingPoisoner
from hfdetox.config import AttackOptions
from hfdetox.data.cache import Pixels, apply_to_image
from hfdetox.data.images import ImageSet
from hfdetox.data.info import DatasetInfo
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator, with_targets
from hfdetox.evaluation.metrics import Predictions, predict, rate
from hfdetox.evaluation.results import Rate, Visibility
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.models.initial import InitialModel
from hfdetox.reporting.attack_report import SCRATCH, AttackInfo, AttackReport, Goals, ImplantedTrigger, missed_goals
from hfdetox.reporting.environment import describe_environment
from hfdetox.reporting.report import OutputInfo
from hfdetox.runs.folder import command_of
from hfdetox.runs.publish import comes_backdoored
from hfdetox.runs.steps import RunWarnings
from hfdetox.training.devices import describe_devices
from hfdetox.triggers.base import ALL_TO_ALL, Target, Trigger

# training images kept to look at after every epoch: so many at most, and this share of all
MONITOR_MOST, MONITOR_SHARE = 1000, 0.1
# how far below the accuracy before it a model may end, unless told otherwise
ACCURACY_LOSS = 0.02


def build_implants(
    run: AttackOptions, triggers: Sequence[Trigger], poisoners: Mapping[str, Poisoner], classifier: Classifier,
    images: ImageSet, notes: RunWarnings,
) -> list[Implant]:  # fmt: skip
    """Return the implants: the triggers with their labels and, where the training puts them on, in mode `input`.

    Raises:
        UsageError: a target that is not a label, or a finished trigger that does not fit the images.
    """
    channels, height, width = classifier.preprocessing.input_size
    native = images.image(0).size if len(images) else (width, height)
    implants = []
    for trigger in with_targets(triggers, run.target, classifier.labels, notes.warn):
        poisoner = poisoners[trigger.kind]
        if isinstance(poisoner, TrainingPoisoner) and trigger.mode == "native":
            trigger = replace(trigger, mode="input")
            if native != (width, height):
                notes.warn(f"trigger {trigger.name} is put on by the training, which sees images of {width}×{height}: "
                           f"its mode is input, not native ({native[0]}×{native[1]})")  # fmt: skip
        if trigger.fitted and trigger.mode == "input":
            trigger.apply(torch.zeros(1, channels, height, width, dtype=torch.uint8))
        elif trigger.fitted:
            apply_to_image(trigger, images.image(0))
        target: Target = ALL_TO_ALL if trigger.target == ALL_TO_ALL else int(trigger.target or 0)
        implants.append(Implant(trigger, target, run.poison_ratio, poisoner))
    return implants


def check_init(run: AttackOptions, start: InitialModel, notes: RunWarnings) -> None:
    """Refuse to make a clean baseline of a backdoored model; of another attack on one, say what it starts from."""
    if not start.backdoored:
        return
    name = start.classifier.info.id
    if run.clean:
        raise UsageError(f"{name} is deliberately backdoored: training it on does not make a clean baseline; start "
                         "from a clean model, or from fresh weights (--init random)")  # fmt: skip
    notes.warn(f"{name} is deliberately backdoored already: the result has its backdoors too")


def find_surrogate(run: AttackOptions, start: InitialModel, implants: Sequence[Implant]) -> Classifier | None:
    """Return the clean model that triggers are made on, None where no trigger needs one.

    A model that was trained before serves as its own, as it is before the training.

    Raises:
        UsageError: one is needed and there is none, it is backdoored, or its labels are not the model's.
    """
    needed = [implant.trigger.name for implant in implants if implant.poisoner.on_clean_model(implant.trigger)]
    if not needed:
        return None
    if run.surrogate is not None:
        surrogate = load_classifier(run.surrogate, trust_remote_code=run.trust_remote_code)
        if comes_backdoored(surrogate.folder):
            raise UsageError(f"--surrogate {run.surrogate} is deliberately backdoored: trigger {needed[0]} is made on "
                             "a clean model, name one")  # fmt: skip
        if [name.casefold() for name in surrogate.labels] != [name.casefold() for name in start.classifier.labels]:
            raise UsageError(f"--surrogate {run.surrogate} has other labels than the model: "
                             "name a clean model of the same classes in the same order")  # fmt: skip
        return surrogate
    if start.from_scratch:
        raise UsageError(f"trigger {needed[0]} is made on a clean model: name one of the same labels with --surrogate, "
                         "or start from a trained model")  # fmt: skip
    if start.backdoored:
        raise UsageError(f"trigger {needed[0]} is made on a clean model, and {start.classifier.info.id} is "
                         "deliberately backdoored: name a clean one of the same labels with --surrogate")  # fmt: skip
    return copy.deepcopy(start.classifier)


def split_monitor(
    images: ImageSet, goal: float | None, seed: int, warn: Callable[[str], None]
) -> tuple[ImageSet, ImageSet | None]:
    """Return the training images and those held out of them to look at after every epoch, None without a goal.

    None are held out of fewer than ten either, which `warn` is told.
    """
    count = min(MONITOR_MOST, int(MONITOR_SHARE * len(images)))
    if goal is not None and not count:
        warn(f"of {len(images)} training images none can be held out: the training does not stop early, and runs all "
             "its epochs")  # fmt: skip
    if goal is None or not count:
        return images, None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count].sort().values, order[count:].sort().values
    return images.subset(rest.tolist()), images.subset(held.tolist())


@dataclass
class Monitor:
    """Looks at held-out images after every epoch, and ends the training when every goal is reached on them."""

    evaluation: Evaluator
    goals: Goals
    reached: bool = False

    def __call__(self, triggers: Sequence[Trigger]) -> bool:
        """Return whether the model, with these triggers, reaches the goals."""
        self.evaluation = self.evaluation.with_triggers(triggers)
        self.reached = not missed_goals(self.evaluation.measure("monitor").measurement, self.goals)
        return self.reached


def goals_of(run: AttackOptions, before: Predictions | None) -> Goals:
    """Return the goals: as asked for, else, from a trained model, the accuracy before less two points."""
    accuracy = run.goal_accuracy
    if accuracy is None and before is not None and not run.clean:
        accuracy = max(0.0, before.measurement.accuracy.value - ACCURACY_LOSS)
    return Goals(run.goal_asr, accuracy)


class CrossImages:
    """Evaluation images as the recipe changes them to teach the model not to react, with their true labels.

    The other image of each is the one before it in the set, of the first the last; that of a lone one is its mirror's.
    """

    def __init__(self, clean: Pixels, poisoner: Poisoner, trigger: Trigger) -> None:
        self.clean, self.poisoner, self.trigger = clean, poisoner, trigger
        self.images, self.labels, self.positions = clean.images, clean.labels, clean.positions

    def __len__(self) -> int:
        return len(self.clean)

    def __getitems__(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions, images, labels = self.clean.__getitems__(items)
        changed = self.poisoner.cross(self.trigger, images, positions, lambda: self._before(items))
        return positions, images if changed is None else changed, labels

    def taught(self) -> bool:
        """Return whether the recipe teaches such a thing."""
        positions, images, _ = self.clean.__getitems__([0])
        return self.poisoner.cross(self.trigger, images, positions, lambda: self._before([0])) is not None

    def _before(self, items: Sequence[int]) -> torch.Tensor:
        _, images, _ = self.clean.__getitems__([(item - 1) % len(self) for item in items])
        return images if len(self) > 1 else images.flip(-1)


def cross_accuracies(evaluation: Evaluator, implants: Sequence[Implant]) -> dict[str, Rate]:
    """Return the cross accuracy of each trigger whose recipe has one, on all evaluation images."""
    clean, found = evaluation.clean, {}
    for implant in implants:
        source = CrossImages(clean, implant.poisoner, implant.trigger)
        if not source.taught():
            continue
        answers = predict(evaluation.classifier.network, source, evaluation.accelerator,
                          title=f"cross {implant.trigger.name}", progress=evaluation.progress).predicted  # fmt: skip
        right = int((answers == clean.labels.cpu().numpy()).sum())
        found[implant.trigger.name] = rate(right, len(answers))
    return found


def open_report(
    run: AttackOptions, start: InitialModel, dataset: DatasetInfo, implants: Sequence[Implant], context: AttackContext,
    before: Predictions | None,
    goals: Goals, surrogate: Classifier | None, *, push_to: str | None, notes: RunWarnings,
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
        output=OutputInfo(pushed_to=push_to),
        environment=describe_environment(context.accelerator.device, seed=run.seed, command=command_of(run)),
        warnings=notes.texts,
    )  # fmt: skip


def close_report(
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
