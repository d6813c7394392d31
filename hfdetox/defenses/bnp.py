"""BNP, BatchNorm statistics-based pruning (Zheng et al., NeurIPS 2022, "Pre-activation Distributions Expose Backdoor
Neurons").

The running statistics (μ_r, v_r) of BatchNorm come from a training that saw triggers, those of clean images (μ_b, v_b)
do not. Channel c is judged by the divergence of the two normal distributions of its input,

    KL_c = ½ ln(v_r / v_b) + (v_b + (μ_b − μ_r)²) / (2 v_r) − ½

and the channels with KL_c > mean + u · std over their layer are set to zero (γ_c = β_c = 0).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfdetox.defenses.clp import OutlierConfig, Outliers, running_norms
from hfdetox.errors import UsageError
from hfdetox.models.layers import on_inputs
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase


@dataclass(frozen=True, kw_only=True)
class BNPConfig(OutlierConfig):
    """Settings of BNP; the default is the paper's.

    Attributes:
        u: how many standard deviations above its layer's mean a channel's divergence may lie, at least 0; 3 for
            CIFAR-10, 4 for Tiny ImageNet. A layer of n channels has none beyond (n − 1) / √n deviations.
    """

    name = "bnp"
    summary = "prune the channels whose BatchNorm statistics differ from those of clean images"
    paper = "NeurIPS 2022 (Pre-activation Distributions Expose Backdoor Neurons)"
    data = "clean images, labels unused"
    cost = "one forward pass in all"
    card_text = ("BNP, BatchNorm statistics-based pruning (Zheng et al., NeurIPS 2022), set the channels to zero whose "
                 "stored BatchNorm statistics differ most from those of {images}.")  # fmt: skip
    presets: ClassVar = {"paper": {}, "tiny-imagenet": {"u": 4.0}}

    def phases(self, network: Network) -> list[Phase | Pass]:
        bnp = BNP(network, self.u)
        return [Pass(name="bnp", start=bnp.start, on_batch=bnp.on_batch, finish=bnp.prune)]


class BNP:
    """Statistics of clean images at the input of every BatchNorm, and the pruning by them.

    The network runs in eval mode, so that each layer reads what it reads in use; the statistics are exact over all
    images and processes. It means nothing for a model whose running statistics were re-estimated on clean images.

    Args:
        network: what is pruned, in place.
        u: the outlier threshold.

    Raises:
        UsageError: the network has no affine BatchNorm with running statistics.
    """

    def __init__(self, network: nn.Module, u: float) -> None:
        self.network, self.u = network, u
        self.names = list(running_norms(network))
        if not self.names:
            kind = type(getattr(network, "model", network)).__name__
            raise UsageError(f"bnp: {kind} has no BatchNorm whose running statistics, kept from the training, could be "
                             "compared with those of clean images; use another defense")  # fmt: skip
        # rows: number of values, Σ d, Σ d² of d = input − running mean, which float32 holds better than Σ x²
        self.sums: dict[str, Tensor] = {}

    def start(self) -> None:
        """Begin with no image seen."""
        means = {name: self.network.get_buffer(f"{name}.running_mean") for name in self.names}
        self.sums = {name: mean.new_zeros(3, len(mean), dtype=torch.float32) for name, mean in means.items()}

    def on_batch(self, network: nn.Module, batch: Batch) -> None:
        """Add up the statistics of a batch."""
        with on_inputs(network, self.names, self._note):
            network(batch.images)

    def _note(self, name: str, inputs: Tensor) -> None:
        values = inputs.float().transpose(0, 1).flatten(1)
        apart = values - self.network.get_buffer(f"{name}.running_mean").float().unsqueeze(1)
        count = apart.new_full((len(apart),), apart.shape[1])
        self.sums[name] += torch.stack([count, apart.sum(1), apart.square().sum(1)])

    @torch.no_grad()
    def prune(self, accelerator: Accelerator) -> dict[str, float]:
        """Set the channels that stand out to zero, in place; return how many of how many, for the history."""
        outliers = Outliers(self.u)
        for name in self.names:
            count, first, second = accelerator.reduce(self.sums[name], reduction="sum")
            module = self.network.get_submodule(name)
            # a layer that no image reaches has no statistics: not a number is above no threshold
            shift = first / count
            variance = (second / count - shift.square()).clamp_min(0)
            epsilon = float(module.eps)  # type: ignore[arg-type]
            divergences = divergence(shift, variance + epsilon, module.get_buffer("running_var").float() + epsilon)
            outliers.cut(divergences, *module.parameters(recurse=False))
        return outliers.found()


def divergence(shift: Tensor, variance: Tensor, running: Tensor) -> Tensor:
    """Return KL(N(μ_b, v_b) ‖ N(μ_r, v_r)) for `shift` = μ_b − μ_r, `variance` = v_b and `running` = v_r.

    The authors' code leaves out the ½ before the logarithm; the divergence of two normal distributions has it. Both
    variances come with BatchNorm's ϵ, or a dead channel would make the mean of its layer infinite.
    """
    return 0.5 * (running / variance).log() + (variance + shift.square()) / (2 * running) - 0.5
