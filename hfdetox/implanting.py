"""The pipeline of an attack: a model and images, triggers, training, measuring, report, card, and their folder."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hfdetox.arguments import takes
from hfdetox.attacks import parse_attack_settings, run_attack
from hfdetox.attacks.base import AttackContext, Implant, Poisoner, TrainingPoisoner
from hfdetox.config import AttackOptions
from hfdetox.data.cache import apply_to_image
from hfdetox.data.images import ImageSet
from hfdetox.data.load import Images, class_names, open_first, pin, pull_images
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator, with_targets
from hfdetox.evaluation.metrics import Predictions
from hfdetox.evidence.cost import say_cost
from hfdetox.logging import RunWarnings
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.models.initial import InitialModel, init_model
from hfdetox.reporting.card import build_card
from hfdetox.reporting.filling import close_attack_report, open_attack_report
from hfdetox.reporting.report import Goals, missed_goals
from hfdetox.runs.estimate import AttackCost, monitored
from hfdetox.runs.folder import command_of, holds_output
from hfdetox.runs.publish import check_attack_places, comes_backdoored
from hfdetox.runs.result import AttackResult, check_draft, check_saves, gather_attack_artifacts, publish
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import parse_triggers
from hfdetox.triggers.base import ALL_TO_ALL, Target, Trigger

__all__ = ["AttackResult", "implant"]

# how far below the accuracy before it a model may end, unless told otherwise
ACCURACY_LOSS = 0.02


@takes(AttackOptions)
@accelerate_state_kept()
@holds_output
def implant(given: AttackOptions) -> AttackResult:
    """Train a backdoor into an image classifier, for research on defenses, and measure it.

    The result is written also when the attack did not succeed.

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
    push_to = check_attack_places(run)
    notes = RunWarnings()

    with accelerator.main_process_first():
        opened = open_first(given, run, notes.warn)
        start = _start(given, run, notes.warn)
        classifier = start.classifier
        images = pull_images(run, given.dataset, classifier, notes.warn, progress=progress, opened=opened)
        implants = build_implants(run, known, poisoners, classifier, images, notes.warn)
        clean_model = find_surrogate(run, start, implants)
    evaluator = functools.partial(prepare_evaluator, classifier, accelerator=accelerator, target=run.target,
                                  warn=notes.warn, progress=progress)  # fmt: skip
    evaluation = evaluator(images.evaluation, [one.trigger for one in implants if one.trigger.fitted])
    before = evaluation.measure_plausible("before", notes.warn) if start.trained else None

    goals = goals_of(run, before)
    kept, held_out = split_monitor(images.clean, goals.accuracy, run.seed, notes.warn)
    cost = AttackCost(training, [(one.trigger, one.poisoner) for one in implants], run.poison_ratio,
                      sharpness is not None, len(kept), len(held_out or ()), len(evaluation.clean),
                      start.trained)  # fmt: skip
    say_cost(evaluation, "the attack", *cost.efforts, besides=cost.besides, progress=progress)
    info = replace(images.info, clean_samples=len(kept), indices_sha256=kept.indices_sha256)
    context = AttackContext(classifier=classifier, clean=decoded(kept, classifier, accelerator, "decode", progress),
                            accelerator=accelerator, training=training, from_scratch=start.from_scratch,
                            surrogate=clean_model, sharpness=sharpness, seed=run.seed, progress=progress)  # fmt: skip
    # a run must not fail at its end for a reason known at its start
    run = replace(pin(run, classifier, images), push_to=push_to)
    report = open_attack_report(run, start, info, implants, context, before, goals, clean_model,
                                command=command_of(run), warnings=notes.texts)  # fmt: skip
    source_card = classifier.card_source()
    check_draft(build_card(report, source_card=source_card, repo_id=push_to, labels=classifier.labels),
                push_to, accelerator)  # fmt: skip

    monitor = Monitor(evaluator(held_out, []), goals) if held_out is not None else None
    done = run_attack(context, implants, monitor=monitor)
    classifier.round_weights()
    evaluation = evaluation.with_triggers([one.trigger for one in done.implants])
    after, visibility = evaluation.measure("after"), evaluation.visibility()
    report = replace(report, uncorrected=evaluation.measure_uncorrected("after, uncorrected"))
    report = close_attack_report(report, done, after, visibility, evaluation.cross_accuracies(done.implants),
                                 epochs=training.epochs, reached=monitor is not None and monitor.reached)  # fmt: skip
    if not report.succeeded:
        notes.warn(f"the attack did not succeed: {'; '.join(missed_goals(after.measurement, goals))}")
    result = AttackResult(report, classifier, gather_attack_artifacts(source_card, evaluation, after, visibility))
    if run.output is not None:
        result.save(run.output, overwrite=run.overwrite)
    return publish(result, accelerator, push_to, run)


def _start(given: AttackOptions, run: AttackOptions, warn: Callable[[str], None]) -> InitialModel:
    """Return the model to train, which may be trained, and saved, as it is asked for."""
    model = given.model if isinstance(given.model, nn.Module) else str(run.model)
    start = init_model(model, class_names=lambda: class_names(given.dataset, run), is_backdoored=comes_backdoored,
                      init=run.init, model_args=run.model_args, input_size=run.input_size, seed=run.seed,
                      revision=run.revision, trust_remote_code=run.trust_remote_code, processor=given.processor,
                      preprocessing=given.preprocessing, labels=given.labels)  # fmt: skip
    check_init(run, start, warn)
    check_saves(start.classifier, run.output, warn)
    return start


def build_implants(
    run: AttackOptions, triggers: Sequence[Trigger], poisoners: Mapping[str, Poisoner], classifier: Classifier,
    images: Images, warn: Callable[[str], None],
) -> list[Implant]:  # fmt: skip
    """Return the implants: the triggers with their labels and, where the training puts them on, in mode `input`.

    Raises:
        UsageError: a target that is not a label, or a finished trigger that does not fit the images.
    """
    channels, height, width = classifier.preprocessing.input_size
    clean = images.clean
    native = clean.image(0).size if len(clean) else (width, height)
    implants = []
    for trigger in with_targets(triggers, run.target, classifier.labels, warn, images.info.label_map):
        poisoner = poisoners[trigger.kind]
        if isinstance(poisoner, TrainingPoisoner) and trigger.mode == "native":
            trigger = replace(trigger, mode="input")
            if native != (width, height):
                warn(f"trigger {trigger.name} is put on by the training, which sees images of {width}×{height}: "
                           f"its mode is input, not native ({native[0]}×{native[1]})")  # fmt: skip
        if trigger.fitted and trigger.mode == "input":
            trigger.apply(torch.zeros(1, channels, height, width, dtype=torch.uint8))
        elif trigger.fitted:
            apply_to_image(trigger, clean.image(0))
        target: Target = ALL_TO_ALL if trigger.target == ALL_TO_ALL else int(trigger.target or 0)
        implants.append(Implant(trigger, target, run.poison_ratio, poisoner))
    return implants


def check_init(run: AttackOptions, start: InitialModel, warn: Callable[[str], None]) -> None:
    """Refuse to make a clean baseline of a backdoored model; of another attack on one, say what it starts from."""
    name = start.classifier.info.id
    if start.new_head:
        warn(f"{name} gets a new head for the dataset's classes: it is not measured before the training")
    if not start.backdoored:
        return
    if run.clean:
        raise UsageError(f"{name} is deliberately backdoored: training it on does not make a clean baseline; start "
                         "from a clean model, or from fresh weights (--init random)")  # fmt: skip
    warn(f"{name} is deliberately backdoored already: the result has its backdoors too")


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
    if not start.trained:
        raise UsageError(f"trigger {needed[0]} is made on a clean model: name one of the same labels with --surrogate, "
                         "or start from a trained model")  # fmt: skip
    if start.backdoored:
        raise UsageError(f"trigger {needed[0]} is made on a clean model, and {start.classifier.info.id} is "
                         "deliberately backdoored: name a clean one of the same labels with --surrogate")  # fmt: skip
    return copy.deepcopy(start.classifier)


def goals_of(run: AttackOptions, before: Predictions | None) -> Goals:
    """Return the goals: as asked for, else, from a trained model, the accuracy before less two points."""
    accuracy = run.goal_accuracy
    if accuracy is None and before is not None and not run.clean:
        accuracy = max(0.0, before.measurement.accuracy.value - ACCURACY_LOSS)
    return Goals(run.goal_asr, accuracy)


def split_monitor(
    images: ImageSet, goal: float | None, seed: int, warn: Callable[[str], None]
) -> tuple[ImageSet, ImageSet | None]:
    """Return the training images and those held out of them to look at after every epoch, None without a goal.

    None are held out of fewer than ten either, which `warn` is told.
    """
    count = monitored(len(images))
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
