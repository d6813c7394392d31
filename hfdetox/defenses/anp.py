"""ANP, adversarial neuron pruning (Wu and Wang, NeurIPS 2021, arXiv 2110.14430).

Channels that carry a backdoor give way first when their scales are perturbed. Masks m on the scales γ are trained to be
good with and without the worst small perturbation of scales and shifts:

    min over m in [0,1]^n of  α · L(m γ, β)  +  (1 − α) · max over |δ|,|ξ| ≤ ε of L((m + δ) γ, (1 + ξ) β)

and the channels with m_c ≤ τ are pruned from the network as it came (γ_c = 0, β_c stays).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from hfdetox.defenses._perturbed import OwnState
from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig
from hfdetox.training.masks import ChannelMasks, MaskedNetwork, Noise, ThresholdSearch
from hfdetox.values import Interval, PositiveFloat, PositiveInt

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(19))


@dataclass(frozen=True, kw_only=True)
class ANPConfig(TuningConfig):
    """Settings of ANP; the defaults are the paper's but for how τ is chosen.

    The paper takes 2,000 steps: 125 epochs of the 2,000 images that are left of 2,500 for fitting. The learning rate is
    that of the masks and constant; masks have no weight decay.

    Attributes:
        epsilon: bound ε of the perturbations, relative to scales and shifts, positive.
        alpha: weight α of the loss without perturbation, in [0, 1].
        steps: signed gradient steps of size ε / steps towards the worst perturbation, from a random one.
        budget: accuracy on the held-out fifth of the images that pruning may cost; τ is the highest of 0, 0.05, …, 0.9
            up to which it costs no more. (The paper fixes τ = 0.2; the benchmarks choose τ by the attack's success.)
    """

    name = "anp"
    summary = "prune the channels whose small perturbations do most harm"
    paper = "arXiv 2110.14430 (NeurIPS 2021)"
    cost = "3"
    times = 2.5
    card_text = ("ANP, adversarial neuron pruning (arXiv 2110.14430), trained masks on the model's channels with "
                 "{images} and set the channels to zero that are most sensitive to small perturbations.")  # fmt: skip
    unweighted = "reweight is for a fine-tuning, and ANP trains masks alone"
    presets: ClassVar = {"paper": {}, "benchmark": {"learning_rate": 0.01, "batch_size": 256, "epochs": 250}}

    epochs: int = 125
    batch_size: int = 128
    learning_rate: float = 0.2
    epsilon: PositiveFloat = 0.4
    alpha: Annotated[float, Interval("[0, 1]")] = 0.2
    steps: PositiveInt = 1
    budget: Annotated[float, Interval("[0, 1)")] = 0.02

    def phases(self, network: Network) -> list[Phase | Pass]:
        anp = ANP(network, self)
        state = OwnState(anp.masked)
        search = ThresholdSearch(network, anp.masks, lambda: anp.masked.mask, THRESHOLDS, self.budget)
        train = self.phase(name="anp", network=anp.masked, parameters=[anp.masked.mask], loss=anp.loss,
                           after_step=anp.masked.project, schedule="constant", part="fit", state=state)  # fmt: skip
        return [train, search.as_pass("anp-prune", state)]


class ANP:
    """Masks on a network's channels and the loss that trains them.

    BatchNorm normalises by the batch, and its running statistics stand still. Where the network has no BatchNorm, masks
    are on hidden units and heads, whose readers have no shift a unit: ξ has no effect there.

    Args:
        network: is not changed.
        config: the settings.
    """

    def __init__(self, network: nn.Module, config: ANPConfig) -> None:
        self.config = config
        self.masks = ChannelMasks(network, config.name)
        self.masked = MaskedNetwork(network, self.masks)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` with its parts `clean_loss` and `perturbed_loss`, 0-d."""
        clean, perturbed = model(batch.images, None, self.perturbation(batch))
        natural, robust = (batch.cross_entropy(logits) for logits in (clean, perturbed))
        loss = self.config.alpha * natural + (1 - self.config.alpha) * robust
        return {"loss": loss, "clean_loss": natural, "perturbed_loss": robust}

    def perturbation(self, batch: Batch) -> Noise:
        """Return (δ, ξ), each flat in [−ε, ε], that raise the loss on the batch.

        The authors' code adds the step to the uniform start without going back into [−ε, ε]; here the bound of the
        paper's problem is kept. With several processes, each perturbs for its own images.
        """
        epsilon = self.config.epsilon
        noise = [torch.empty_like(self.masked.mask).detach().uniform_(-epsilon, epsilon) for _ in range(2)]
        for _ in range(self.config.steps):
            delta, xi = (tensor.requires_grad_() for tensor in noise)
            (logits,) = self.masked(batch.images, (delta, xi))
            loss = batch.cross_entropy(logits)
            slopes = torch.autograd.grad(loss, [delta, xi], materialize_grads=True)
            noise = [ascend(old, slope, epsilon, self.config.steps) for old, slope in zip(noise, slopes, strict=True)]
        return noise[0], noise[1]


def ascend(noise: Tensor, slope: Tensor, epsilon: float, steps: int) -> Tensor:
    """Return the noise after a signed step of size ε / steps, back in [−ε, ε]."""
    return (noise.detach() + slope.sign() * (epsilon / steps)).clamp(-epsilon, epsilon)
