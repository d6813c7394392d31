"""Which augmentation a model can bear; `hfdetox.defenses.auto` says why."""

from __future__ import annotations

from collections.abc import Mapping

from hfdetox.training.augment import Augmentation, resolve_augmentation

# the share of its accuracy that a model may lose under an augmentation that is used
TOLERATED = 0.01
# what the accuracy under each is called in the history
ACCURACY = "accuracy_"
STRENGTH: tuple[Augmentation, ...] = ("resized-crop-flip", "crop-flip", "crop", "flip", "none")


def candidates(wanted: Augmentation, height: int) -> list[Augmentation]:
    """Return the augmentations from `wanted` (resolved for images of this height) down to none, strongest first."""
    return list(STRENGTH[STRENGTH.index(resolve_augmentation(wanted, height)) :])


def chosen_augmentation(found: Mapping[str, float]) -> Augmentation:
    """Return the strongest augmentation that costs no more than `TOLERATED`, of a look's `accuracy_…`."""
    tried = [name for name in STRENGTH if ACCURACY + name in found]
    least = found.get(ACCURACY + "none", 0.0) - TOLERATED
    return next((name for name in tried if found[ACCURACY + name] >= least), tried[-1])
