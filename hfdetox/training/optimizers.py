"""Several optimisers as one, for a phase whose parameters are not all trained alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


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
