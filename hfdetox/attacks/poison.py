"""Data poisoning: before the training, a fixed set of images gets the trigger and the attacker's label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfdetox.attacks.base import AttackContext, DataPoisoner, Implant
from hfdetox.errors import UsageError
from hfdetox.triggers.base import ALL_TO_ALL, attacked_labels

_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class BadNetsPoisoner(DataPoisoner):
    """Images of all classes, dirty label (Gu et al., arXiv 1708.06733)."""

    kind = "badnets"
    summary = "images of all classes get the patch and the target's label"


@dataclass(frozen=True, kw_only=True)
class BlendedPoisoner(DataPoisoner):
    """Images of all classes, dirty label (Chen et al., arXiv 1712.05526)."""

    kind = "blended"
    summary = "images of all classes get the picture and the target's label"


@dataclass(frozen=True, kw_only=True)
class FTrojanPoisoner(DataPoisoner):
    """Images of all classes, dirty label (Wang et al., arXiv 2111.10991)."""

    kind = "ftrojan"
    summary = "images of all classes get the frequencies and the target's label"


@dataclass(frozen=True, kw_only=True)
class SigPoisoner(DataPoisoner):
    """Images of the target class alone, labels kept (Barni et al., arXiv 1902.11237)."""

    kind = "sig"
    summary = "images of the target class alone get the wave; no label changes"
    how = "clean label"


@dataclass(frozen=True, kw_only=True)
class CtrlPoisoner(DataPoisoner):
    """Images of the target class alone, labels kept (Li et al., arXiv 2210.07346, there without supervision)."""

    kind = "ctrl"
    summary = "images of the target class alone get the frequencies; no label changes"
    how = "clean label"


class PoisonedPixels:
    """A training set in which seeded, disjoint shares carry each implant's trigger and label.

    Dirty label: round(p · N) images of all classes without replacement, as BackdoorBench does; one that is of the
    target class already keeps its label, and all-to-all moves every label to the next. Clean label: round(p · N)
    images of the target class, whose label they keep; these choose first, since they have no others to choose from.

    Args:
        context: its clean images, which are left as they are, and its seed.
        implants: data poisoners with triggers that are ready.

    Attributes:
        images: N×C×H×W, the cache with the triggers, on the device of the clean one; None where the clean images have
            none: then images are decoded and triggered on demand, in DataLoader workers too. The poisoned ones are
            cached by themselves where they fit.
        labels: N, int64, with the attacker's labels.
        positions: as the clean images'.
        poisoned: by trigger name, the places (int64, ascending, in 0 to N - 1) that carry it.

    Raises:
        UsageError: a ratio that rounds to no image, or one that asks for more images than there are.
    """

    images: torch.Tensor | None

    def __init__(self, context: AttackContext, implants: Sequence[Implant]) -> None:
        clean = context.clean
        chosen = choose_poisoned(clean.labels, implants, context.seed)
        labels, sources = clean.labels.clone(), [clean]
        # of each image, which source has it, and as which of its items
        self._source, self._item = torch.zeros(len(clean), dtype=torch.int64), torch.arange(len(clean))
        for implant, places in zip(implants, chosen, strict=True):
            poisoner, here = implant.poisoner, places.to(labels.device)
            if not isinstance(poisoner, DataPoisoner):
                raise UsageError(f"{implant.trigger.name}: {poisoner.kind} is no data poisoning")
            self._source[places], self._item[places] = len(sources), torch.arange(len(places))
            sources.append(poisoner.triggered(implant.trigger, implant.target, clean.positions[places], context))
            labels[here] = attacked_labels(labels[here], implant.target, context.classes)
        self.labels, self.positions = labels, clean.positions
        self.poisoned = {implant.trigger.name: places for implant, places in zip(implants, chosen, strict=True)}
        self.images = clean.images.clone() if clean.images is not None else None
        self._sources = sources if self.images is None else []
        if self.images is not None:
            for source, places in zip(sources[1:], chosen, strict=True):
                # a native trigger is put on freshly decoded images, which are not on the cache's device
                for part, (_, images, _) in zip(places.split(_BATCH), source.batches(_BATCH), strict=True):
                    self.images[part.to(self.images.device)] = images.to(self.images.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (positions in the image set, images, labels) of the items (0 to len - 1), already collated."""
        places = torch.tensor(items, dtype=torch.int64)
        labels = self.labels[places.to(self.labels.device, non_blocking=True)]
        if self.images is not None:
            return self.positions[places], self.images[places.to(self.images.device, non_blocking=True)], labels
        preprocessing = self._sources[0].preprocessing
        images = torch.empty((len(places), *preprocessing.input_size), dtype=preprocessing.dtype)
        for number, source in enumerate(self._sources):
            mine = self._source[places] == number
            if mine.any():
                images[mine] = source.__getitems__(self._item[places[mine]].tolist())[1]
        return self.positions[places], images, labels


def choose_poisoned(labels: torch.Tensor, implants: Sequence[Implant], seed: int) -> list[torch.Tensor]:
    """Return the places (int64, ascending, CPU) of each implant's images among N with true `labels` (N, int64).

    The sets are disjoint; for one dirty-label implant it is the head of the seed's permutation of all N.

    Raises:
        UsageError: a ratio that rounds to no image, or asks for more images than there are.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    free = torch.ones(len(labels), dtype=torch.bool)
    chosen: dict[int, torch.Tensor] = {}
    for index in sorted(range(len(implants)), key=lambda i: not _keeps_labels(implants[i])):
        implant = implants[index]
        allowed = free & (labels == implant.target) if _keeps_labels(implant) else free
        candidates = order[allowed[order]]
        places = candidates[: _count(implant, len(labels), len(candidates))].sort().values
        free[places] = False
        chosen[index] = places
    return [chosen[index] for index in range(len(implants))]


def _keeps_labels(implant: Implant) -> bool:
    return implant.poisoner.how == "clean label"


def _count(implant: Implant, total: int, available: int) -> int:
    """Return round(p · N) where so many images are available."""
    name, count = implant.trigger.name, round(implant.ratio * total)
    asked = f"{name}: a poison ratio of {implant.ratio:g} of {total} images is {count} images"
    if count == 0:
        least = math.ceil(0.5 / total * 1e6 + 1) / 1e6
        raise UsageError(f"{asked}; take at least {least:g}")
    if _keeps_labels(implant) and implant.target == ALL_TO_ALL:
        raise UsageError(f"{name}: {implant.poisoner.kind} poisons images of one target class; name a label as target")
    if count <= available:
        return count
    # rounded down, so that the number can be given as it stands
    largest = math.floor(available / total * 1e6) / 1e6
    remedy = f"the largest possible ratio is {largest:g}" if available else "choose another target"
    if _keeps_labels(implant):
        raise UsageError(f"{asked}, and {implant.poisoner.kind} poisons only those of the target class, of which "
                         f"{available} are free; {remedy}")  # fmt: skip
    raise UsageError(f"{asked}, and the other triggers leave {available}; lower the ratios")
