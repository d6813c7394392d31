"""The mean of the weights over the later steps of a training, in place of those of its last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class WeightAverage:
    """Adds up weights after each step, and puts their mean in their place (SWA, arXiv 1803.05407).

    BatchNorm's statistics do not belong to the mean: measure them anew (`hfdetox.training.statistics`).

    Args:
        parameters: what is trained; they stay where they are until `take`.

    Attributes:
        first: the step (0 is the first) from which on the weights count.
        step: steps made.
        means: of each parameter, float32; empty before the first that counts.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.first = self.step = 0
        self.means: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now; call it after every optimiser step."""
        self.step += 1
        counted = self.step - self.first
        if counted == 1:
            self.means = [parameter.detach().clone() for parameter in self.parameters]
        elif counted > 1:
            for mean, parameter in zip(self.means, self.parameters, strict=True):
                mean.lerp_(parameter, 1 / counted)

    @torch.no_grad()
    def take(self) -> None:
        """Put the means in the place of the weights, where there are any."""
        for mean, parameter in zip(self.means, self.parameters if self.means else [], strict=True):
            parameter.copy_(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """Return steps and means."""
        return {"steps": torch.tensor([self.first, self.step]),
                **{f"mean_{place}": mean for place, mean in enumerate(self.means)}}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a run was stopped."""
        self.first, self.step = state["steps"].tolist()
        means = [state[f"mean_{place}"] for place in range(len(state) - 1)]
        self.means = [mean.to(parameter.device) for mean, parameter in zip(means, self.parameters, strict=bool(means))]
