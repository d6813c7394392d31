"""Dirty-label all-to-one poisoning, as BadNets and Blended do: some images get the trigger and the attacker's label."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.augment import Augmentation
from hfdetox.batches import Batch
from hfdetox.engine import Engine, Phase, TrainingRecord
from hfdetox.errors import UsageError
from hfdetox.pixels import Pixels
from hfdetox.triggers.base import Trigger


class PoisonedPixels:
    """A training set of which a seeded share carries the trigger and the target's label.

    The poisoned images are round(ratio · N) drawn from all classes without replacement, as BackdoorBench does; one
    that is of the target class already keeps its label.

    Args:
        clean: the cached clean images; left as they are.
        ratio: share of the images that are poisoned, in (0, 1].
        target: label index.

    Raises:
        UsageError: no cache, or a ratio that rounds to no image.
    """

    def __init__(self, clean: Pixels, trigger: Trigger, *, ratio: float, target: int, seed: int = 0) -> None:
        if clean.images is None:
            raise UsageError("poisoning needs images that fit into memory; take fewer or smaller ones")
        count = round(ratio * len(clean))
        if not 0 < count <= len(clean):
            raise UsageError(f"a poison ratio of {ratio} of {len(clean)} images is {count} images; choose another")
        generator = torch.Generator().manual_seed(seed)
        self.poisoned = torch.randperm(len(clean), generator=generator)[:count].sort().values
        triggered = clean.view(trigger, positions=clean.positions[self.poisoned])
        images = clean.images.clone()
        # a native trigger is put on freshly decoded images, which are not on the cache's device
        images[self.poisoned] = torch.as_tensor(triggered.to(images.device).images)
        self.images: torch.Tensor | None = images
        self.labels = clean.labels.clone()
        self.labels[self.poisoned] = target
        self.positions = clean.positions

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.tensor(items)
        return self.positions[places], self.images[places], self.labels[places]  # type: ignore[index]


def train_on(network: nn.Module, source: PoisonedPixels | Pixels, accelerator: Accelerator, *, epochs: int,
             batch_size: int = 128, learning_rate: float = 0.1, weight_decay: float = 5e-4,
             augmentation: Augmentation = "auto", seed: int = 0, progress: bool = False) -> TrainingRecord:  # fmt: skip
    """Train `network` in place on cross-entropy: SGD with momentum 0.9, a cosine schedule stepped once an epoch."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        errors = cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
        return {"loss": (batch.weights * errors).sum()}

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=weight_decay, nesterov=True)

    phase = Phase(name="train", parameters=list(network.parameters()), optimizer=sgd, loss=loss, epochs=epochs,
                  batch_size=batch_size, augmentation=augmentation)  # fmt: skip
    return Engine(accelerator, source, seed=seed, progress=progress).run(network, [phase])
