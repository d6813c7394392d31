"""Is a backdoor gone, or asleep? Three tests of a cleaned model for triggers that are known or were reconstructed.

- **re-tuning**, after the recovery attack of Zhu et al. (arXiv 2410.09838): five triggered images with the attacker's
  label lie among at most 1,000 clean ones, SGD 0.01 with momentum 0.9, 5 epochs; the attack success rate after each,
  and beside it that of the same tuning without triggered images. What was only put to sleep wakes up sooner than
  something new is learnt; how soon that is, a model that never had the backdoor tells;
- **path**: the attack success rate and the accuracy of (1 − t)·θ_suspect + t·θ_cleaned, every tensor with its own, for
  t from 0 to 1 (linear mode connectivity);
- **drift**: the accuracy on triggered images of *all* classes, the target's own too.

All of them work on copies; the classifier stays as it is.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks.base import AttackContext, Implant
from hfdetox.attacks.poison import BadNetsPoisoner, PoisonedPixels
from hfdetox.data.cache import Pixels
from hfdetox.defenses.base import FORWARD, clean_terms
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import TriggerView, predict, rate
from hfdetox.evaluation.results import Rate
from hfdetox.evidence.results import Residual
from hfdetox.models.network import Network
from hfdetox.training.batches import ImageSource
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from hfdetox.triggers.base import attacked_labels

TRIGGERED, CLEAN, EPOCHS, LEARNING_RATE, MOMENTUM, BATCH_SIZE = 5, 1000, 5, 0.01, 0.9, 64
STEPS_OF_PATH = 10
# images that each point of a curve is measured on
MEASURED = 2000


@dataclass
class _First:
    """The first images of a source."""

    images: torch.Tensor | None
    labels: torch.Tensor
    positions: torch.Tensor
    source: ImageSource

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.source.__getitems__(items)


def residual(
    evaluation: Evaluator, clean: Pixels, suspect: Mapping[str, torch.Tensor], views: Sequence[TriggerView], *,
    seed: int = 0,
) -> dict[str, Residual]:  # fmt: skip
    """Test a cleaned model for each of the views' triggers, by the trigger's name.

    Args:
        evaluation: holds the cleaned classifier, and what is measured on.
        clean: the images of the re-tuning; at most 1,000 of them are used, and five get the trigger.
        suspect: the state dict of the classifier's network as it came.
        views: triggers on evaluation images, with label indices (or all-to-all) as targets.
        seed: determines order, augmentation and the five images.

    Returns:
        By name of the trigger; nothing without triggers.
    """
    if not views:
        return {}
    accelerator, cleaned = evaluation.accelerator, evaluation.classifier.network
    part = clean.view(clean.trigger, positions=clean.positions[:CLEAN])
    plain = _retune(cleaned, part, views, accelerator, seed)
    rates, accuracies = _path(evaluation, suspect, views)
    found = {}
    for view in views:
        name = view.trigger.name
        count = min(TRIGGERED, len(part) // 2)
        context = AttackContext(classifier=evaluation.classifier, clean=part, accelerator=accelerator, seed=seed)
        poisoned = PoisonedPixels(context, [Implant(view.trigger, view.target, count / len(part), BadNetsPoisoner())])
        retuned = _retune(cleaned, poisoned, [view], accelerator, seed)
        everywhere = evaluation.clean.view(view.trigger, positions=evaluation.clean.positions[:MEASURED])
        drift = [_accuracy(one, everywhere, accelerator) for one in (_with(cleaned, suspect), cleaned)]
        found[name] = Residual(retuned[name], plain[name], rates[name], accuracies, drift, count, len(part) - count)
    return found


def residual_effort(images: int, triggers: int) -> float:
    """Return how many images `residual` takes there and back, with so many clean images, for so many triggers."""
    looks = triggers * 2 * (EPOCHS + 2) + (STEPS_OF_PATH + 1) * (triggers + 1)
    return (1 + triggers) * EPOCHS * min(CLEAN, images) + FORWARD * MEASURED * looks if triggers else 0.0


def _retune(network: Network, source: ImageSource, views: Sequence[TriggerView], accelerator: Accelerator,
            seed: int) -> dict[str, list[Rate]]:  # fmt: skip
    """Return the attack success rate of each trigger before, and after each epoch of, a tuning of a copy."""
    tuned = copy.deepcopy(network)
    found = {view.trigger.name: [_success(tuned, view, accelerator)] for view in views}

    def note(_: Mapping[str, object]) -> bool:
        for view in views:
            found[view.trigger.name].append(_success(tuned, view, accelerator))
        return False

    phase = Phase(
        name="re-tuning", parameters=[p for p in tuned.parameters() if p.requires_grad], loss=clean_terms,
        optimizer=lambda parameters: torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM), epochs=EPOCHS,
        batch_size=min(BATCH_SIZE, len(source)), schedule="constant", augmentation="none", stop=note,
    )  # fmt: skip
    Engine(accelerator, source, seed=seed).run(tuned, [phase])
    return found


def _path(evaluation: Evaluator, suspect: Mapping[str, torch.Tensor],
          views: Sequence[TriggerView]) -> tuple[dict[str, list[Rate]], list[Rate]]:  # fmt: skip
    """Return the attack success rates by trigger, and the accuracies, on the straight path."""
    accelerator, cleaned = evaluation.accelerator, evaluation.classifier.network
    end = {name: tensor.detach().clone() for name, tensor in cleaned.state_dict().items()}
    moving = copy.deepcopy(cleaned)
    rates: dict[str, list[Rate]] = {view.trigger.name: [] for view in views}
    accuracies = []
    for step in range(STEPS_OF_PATH + 1):
        t = step / STEPS_OF_PATH
        moving.load_state_dict({
            name: torch.lerp(suspect[name].to(tensor.device, tensor.dtype), tensor, t)
            if tensor.is_floating_point() else tensor for name, tensor in end.items()})  # fmt: skip
        accuracies.append(_accuracy(moving, evaluation.clean, accelerator))
        for view in views:
            rates[view.trigger.name].append(_success(moving, view, accelerator))
    return rates, accuracies


def _with(network: Network, state: Mapping[str, torch.Tensor]) -> Network:
    other = copy.deepcopy(network)
    other.load_state_dict(state)
    return other


def _first(source: ImageSource) -> ImageSource:
    images = None if source.images is None else source.images[:MEASURED]
    return _First(images, source.labels[:MEASURED], source.positions[:MEASURED], source)


def _success(network: nn.Module, view: TriggerView, accelerator: Accelerator) -> Rate:
    source = _first(view.source)
    wanted = attacked_labels(source.labels.cpu(), view.target, view.classes).numpy()
    hits = predict(network, source, accelerator).predicted == wanted
    return rate(int(hits.sum()), len(hits))


def _accuracy(network: nn.Module, source: ImageSource, accelerator: Accelerator) -> Rate:
    part = _first(source)
    right = predict(network, part, accelerator).predicted == part.labels.cpu().numpy()
    return rate(int(right.sum()), len(right))
