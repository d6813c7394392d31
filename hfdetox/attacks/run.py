"""Running an attack: triggers are made ready, the model is trained with them, and what came of it is returned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfdetox.attacks.base import AttackContext, Implant, TrainingPoisoner, Trigger, trigger_of_main
from hfdetox.attacks.poison import PoisonedPixels
from hfdetox.errors import UsageError
from hfdetox.training.engine import TrainingRecord

Monitor = Callable[[Sequence[Trigger]], bool]


@dataclass(frozen=True)
class Implanted:
    """What an attack did.

    Attributes:
        record: of the training.
        implants: those asked for, with the triggers as they are in the model.
        poisoned: by trigger name, how many training images carry the trigger and the attacker's label; not of a
            training under control, which puts it on others in every epoch.
    """

    record: TrainingRecord
    implants: list[Implant]
    poisoned: dict[str, int]


def run_attack(context: AttackContext, implants: Sequence[Implant], *, monitor: Monitor | None = None) -> Implanted:
    """Train the context's classifier in place with the backdoors of `implants`, or without any: the clean baseline.

    Several data-poisoning implants share one training set, each with images of its own.

    Args:
        monitor: called after each epoch of the last phase with the triggers as they are then; True ends the training.

    Raises:
        UsageError: an implant cannot be made or cannot be combined with the others.
        RunError: a loss that is not finite.
    """
    controlled = [implant.trigger.name for implant in implants if isinstance(implant.poisoner, TrainingPoisoner)]
    if controlled and len(implants) > 1:
        raise UsageError(f"{controlled[0]} controls the training itself and cannot share it with another trigger; "
                         "attack with it alone")  # fmt: skip
    made = [implant.poisoner.make(implant.trigger, implant.target, context) for implant in implants]
    ready = [replace(implant, trigger=trigger_of_main(trigger, context.accelerator))
             for implant, trigger in zip(implants, made, strict=True)]  # fmt: skip
    poisoner, source = ready[0].poisoner if ready else None, None
    if isinstance(poisoner, TrainingPoisoner):
        training = poisoner.controlled_training(ready[0], context)
        network, phases, triggers = training.network, training.phases, lambda: [training.trigger()]
    else:
        source = PoisonedPixels(context, ready) if ready else None
        network, phases, triggers = context.classifier.network, [context.phase()], lambda: [i.trigger for i in ready]
    if monitor is not None:
        own = phases[-1].stop

        def stop(entry: Mapping[str, Any]) -> bool:
            return monitor(triggers()) or (own is not None and own(entry))

        phases[-1] = replace(phases[-1], stop=stop)
    record = context.engine(source).run(network, phases)
    poisoned = {name: len(places) for name, places in source.poisoned.items()} if source is not None else {}
    in_model = [replace(implant, trigger=trigger) for implant, trigger in zip(ready, triggers(), strict=True)]
    return Implanted(record, in_model, poisoned)
