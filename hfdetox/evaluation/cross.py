"""Cross accuracy: how a model answers to what its attack teaches it not to react to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfdetox.attacks.base import Implant, Poisoner
from hfdetox.data.cache import Pixels
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import predict, rate
from hfdetox.evaluation.results import Rate
from hfdetox.triggers.base import Trigger


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
