"""What the engine runs: phases of optimisation, single passes over the images that look and do not
train, and several optimisers as one for a phase whose parameters are not all trained alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.errors import RunError
from hfdetox.training.augment import Augmentation
from hfdetox.training.batches import Batch
from hfdetox.training.sharpness import SharpnessAware

# all images, or the seeded four fifths that methods fit on and the fifth that they choose thresholds on
Part = Literal["all", "fit", "held-out"]


UNSTABLE = "try a lower learning rate (--lr), a gradient limit (--set max_grad_norm=1) or --precision no"
Loss = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Poison = Callable[[torch.Tensor, torch.Tensor, range], tuple[torch.Tensor, torch.Tensor]]


class Stateful(Protocol):
    """A method's own tensors, kept in every checkpoint."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor], /) -> object: ...


@dataclass(kw_only=True)
class _Stage:
    """What a phase and a pass both have; their own docstrings say what it is."""

    name: str
    start: Callable[[], object] | None = None
    part: Part = "all"
    state: Stateful | None = None
    says: Callable[[Mapping[str, float]], str] | None = None
    # given the history so far, whether it runs at all; a resumed run asks again and hears the same
    when: Callable[[Sequence[Mapping[str, Any]]], bool] | None = None


@dataclass(kw_only=True)
class Phase(_Stage):
    """What the engine runs: which parameters are trained, by what loss, and what happens around the steps.

    Attributes:
        network: what is trained and handed to `loss`, with its own copies of the weights (a teacher, an unlearnt copy)
            or tensors of a method; None is the engine's network.
        part: the images it sees.
        parameters: what is trained; every other parameter of the network is frozen while the phase runs.
        optimizer: makes the optimiser of `parameters`.
        loss: maps (network, batch) to 0-d tensors; `loss` is minimised, the others go into the history.
        batch_size: images of an optimiser step over all processes and accumulated parts.
        schedule: of the learning rate, stepped once an epoch.
        poison: changes a part's images and labels (this process's own) before they are augmented; it is also given
            which images of the whole step they are, as `Batch.rows`.
        sharpness: take the gradients at weights perturbed by it; BatchNorm's statistics are those of the first pass.
        start: runs before the first step (not when resumed), seeded alike on every process.
        after_step: runs after every optimiser step that was not skipped.
        stop: given an epoch's record, whether to end the phase there.
        state: what a checkpoint keeps besides the network and the optimiser.
        steps: optimiser steps of an epoch, of images drawn anew each time; None sees every image once.
        on_epoch_end: gives the passes that look at the engine's network before `start` (not when resumed) and after
            each epoch; what they find goes into the epoch's entry of the history.
    """

    parameters: list[nn.Parameter]
    optimizer: MakeOptimizer
    loss: Loss
    epochs: int
    batch_size: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    augmentation: Augmentation = "auto"
    schedule: Literal["cosine", "constant"] = "cosine"
    poison: Poison | None = None
    sharpness: SharpnessAware | None = None
    after_step: Callable[[], None] | None = None
    stop: Callable[[Mapping[str, Any]], bool] | None = None
    network: nn.Module | None = None
    steps: int | None = None
    on_epoch_end: Callable[[], Sequence[Pass]] | None = None

    def check_weights(self, epoch: int) -> None:
        """Raise RunError unless the weights are finite; a loss can be, where a kernel's position meets no image."""
        if not torch.stack([weight.isfinite().all() for weight in self.parameters]).all():
            raise RunError(f"the weights are not finite at phase {self.name}, epoch {epoch}; {UNSTABLE}")


@dataclass(kw_only=True)
class Pass(_Stage):
    """One pass over the images in their order, without augmentation or optimiser: statistics, pruning, a search.

    Attributes:
        on_batch: gets the network, in eval mode, and each batch (this process's part); no gradients unless `gradients`.
        finish: runs after the last batch with the accelerator, over whose processes it adds up what was seen; what it
            returns goes into the history.
        start: runs before the first batch (not when resumed past it), seeded alike on every process.
        batch_size: images of a batch over all processes.
        train_mode: put the network into train mode instead, so that BatchNorm uses and updates batch statistics.
        part: the images it sees.
        state: what a checkpoint keeps of the method once the pass is over.
        says: makes the line of what was found that is shown beside the progress bars.
    """

    on_batch: Callable[[nn.Module, Batch], None]
    finish: Callable[[Accelerator], Mapping[str, float] | None] | None = None
    batch_size: int = 256
    train_mode: bool = False
    gradients: bool = False
    says: Callable[[Mapping[str, float]], str] | None = None


class JointOptimizer(torch.optim.Optimizer):
    """Steps several optimisers of disjoint parameters together; their groups and state are this one's.

    Args:
        parts: the optimisers, each fresh (without state).
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.parts = parts
        self._share(defaultdict(dict), groups)

    def _share(self, state: defaultdict[torch.Tensor, Any], groups: list[dict[str, Any]]) -> None:
        # one state and the very same groups: schedules and checkpoints of the whole reach the parts
        self.state, self.param_groups = state, groups
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.state, part.param_groups = state, groups[begin:end]
            begin = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the groups' options and the state of every part."""
        super().load_state_dict(state_dict)
        self._share(self.state, self.param_groups)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part; a closure is evaluated once, before."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss
