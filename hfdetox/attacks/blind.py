"""Blind: the attacker changes the loss alone; batches and labels stay as they are (arXiv 2005.03823)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.attacks.base import (
    AttackContext,
    Batch,
    ControlledTraining,
    Implant,
    TrainingPoisoner,
    Trigger,
    check_input_mode,
)
from hfdetox.training.phases import Loss
from hfdetox.triggers.base import attacked_labels
from hfdetox.values import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class BlindPoisoner(TrainingPoisoner):
    """Minimise clean_weight · L_clean + backdoor_weight · L_backdoor, the latter on the whole batch with the trigger.

    The second term counts from the step on at which the mean clean loss of the last `window` batches (of all so far,
    while they are fewer) is below `threshold`; so a poison ratio has no say here. The trigger is put on the augmented
    images; both halves share BatchNorm's statistics from the first step on. Bagdasaryan and Shmatikov, section 3.3,
    with fixed weights in place of multiple gradient descent.

    Attributes:
        clean_weight, backdoor_weight: of the two mean cross-entropies, above 0.
        threshold: in nats, above 0.
        window: batches, at least 1.
    """

    kind = "blind"
    summary = "a second loss on the whole batch with the trigger, once the clean loss is low"

    clean_weight: PositiveFloat = 1.0
    backdoor_weight: PositiveFloat = 0.9
    threshold: PositiveFloat = 1.0
    window: PositiveInt = 1000

    def efforts(self, trigger: Trigger, images: int, ratio: float, epochs: int) -> tuple[float, float]:
        # every batch is there twice, without the trigger and with it
        return 0.0, 2.0 * epochs * images

    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the training, one phase of the two losses.

        Raises:
            UsageError: a trigger in another mode than `input`, or a model that is given floats.
        """
        check_input_mode(implant, context)
        switch = Switch(self.threshold, self.window, context.accelerator.device)
        loss = self.loss(implant, context, switch)
        return ControlledTraining(context.classifier.network, [context.phase(loss=loss)], lambda: implant.trigger)

    def loss(self, implant: Implant, context: AttackContext, switch: Switch) -> Loss:
        """Return the loss; its terms are `clean_loss`, `backdoor_loss` and `switched` (0 or 1)."""

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            # augmentation that resizes leaves floats
            pixels = batch.images.round().clamp(0, 255).to(torch.uint8)
            labels = attacked_labels(batch.labels, implant.target, context.classes)
            # one pass for both: two would break DistributedDataParallel with BatchNorm
            logits = model(torch.cat([batch.images, implant.trigger.apply(pixels).to(batch.images.dtype)])).float()
            errors = cross_entropy(logits, torch.cat([batch.labels, labels]), reduction="none").view(2, -1)
            clean, backdoor = (batch.weights * errors).sum(1)
            # every process must switch at the same step, and a second pass over the batch does not count
            switched = batch.once("switched", lambda: switch.seen(context.accelerator.reduce(clean.detach(), "mean")))
            total = self.clean_weight * clean + self.backdoor_weight * switched * backdoor
            return {"loss": total, "clean_loss": clean, "backdoor_loss": backdoor, "switched": switched}

        return loss


class Switch:
    """Whether the mean of the last `window` losses has been below `threshold`; on the device, so no step waits."""

    def __init__(self, threshold: float, window: int, device: torch.device) -> None:
        self.threshold = threshold
        self.losses = torch.zeros(window, device=device)
        self.on = torch.zeros((), device=device)
        self.steps = 0

    def seen(self, loss: Tensor) -> Tensor:
        """Note the clean loss (0-d) of a step and return 1.0 or 0.0 (0-d)."""
        window = len(self.losses)
        self.losses[self.steps % window] = loss.float()
        self.steps += 1
        mean = self.losses.sum() / min(self.steps, window)
        self.on = torch.maximum(self.on, (mean < self.threshold).float())
        return self.on
