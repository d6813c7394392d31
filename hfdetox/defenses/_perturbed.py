"""What the methods that search for perturbations share: −log(1 − p), modes, Adam, tensors for checkpoints."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from hfdetox.defenses.base import Network, TuningConfig
from hfdetox.errors import UsageError

# a wrapper's network is the engine's own, whose tensors the checkpoint has already
_NETWORK = "network."


def require_pixels(network: Network, name: str) -> None:
    """Raise UsageError when the network takes images that a callable has normalised, whose range nobody knows."""
    if not network.normalizes:
        raise UsageError(f"{name}: it perturbs pixels, and the preprocessing of this model gives images in a range of "
                         "its own; pass an image processor, or take another defense")  # fmt: skip


def neg_log_complement(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log(1 − p_label) of logits (N×K) and labels (N, int64), shape (N,); finite even where p rounds to 1."""
    logits = logits.float()
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the most likely class but `labels` (N, int64) by logits (N×K)."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


def adam(config: TuningConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return Adam with the settings; `momentum` is its β₁, and weight decay is added to the gradient."""
    betas = (config.momentum, 0.999)
    return torch.optim.Adam(parameters, config.learning_rate, betas, weight_decay=config.weight_decay)


class FrozenMethod(nn.Module):
    """A method that is one module: the network, frozen and always in eval mode, and tensors of the method's own.

    Its forward gives the terms of a batch, so that a whole step is one call, as several processes need.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


class OwnState:
    """The tensors of a module that holds the engine's network as `network`, and others of its method, for checkpoints.

    Only the others are kept; they are taken over in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's tensors by name."""
        tensors = self.module.state_dict().items()
        return {name: tensor for name, tensor in tensors if not name.startswith(_NETWORK)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over those of a stopped run; raises UsageError when they are of another model or other settings."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise UsageError("the saved state of the defense is of another model or of other settings than this run's")
        self.module.load_state_dict(dict(state), strict=False)
