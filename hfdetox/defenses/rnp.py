"""RNP, reconstructive neuron pruning (Li et al., ICML 2023, arXiv 2305.14876).

A copy of the network unlearns the clean images by gradient ascent on their loss; then only masks on its channels are
trained to recover them:

    unlearn:  max over θ of L(θ);        recover:  min over m in [0,1]^n of  α · L(m γ', β'; θ')

Channels that the clean images do not call back belong to the backdoor: those with m_c ≤ τ are pruned from the network
as it came (γ_c = 0, β_c stays).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.training.masks import ChannelMasks, MaskedNetwork, ThresholdSearch
from hfdetox.values import Interval, PositiveFloat

THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(50))


@dataclass(frozen=True, kw_only=True)
class RNPConfig(TuningConfig):
    """Settings of RNP; the defaults are the paper's but for how τ is chosen.

    `epochs` bounds the unlearning and is the length of the recovery; `learning_rate` is that of the masks, which have
    no weight decay and no gradient limit (`weight_decay` and `max_grad_norm` are the unlearning's). Both rates are
    constant: the reference divides the unlearning's by 10 after 10 epochs, if it has not stopped by then. Its gradient
    limit comes before the backward pass and limits nothing; here it does.

    Attributes:
        epoch_images: images of an epoch, drawn anew each time; the paper has 500 in all. In an epoch of more the ascent
            goes on past `stop_accuracy`, and a copy that has unlearnt too far leaves nothing to prune in the budget.
        unlearning_rate: learning rate of the ascent, positive; 0.01 in the paper, and found too large by others
            (preset `gentle`: 0.001).
        stop_accuracy: the ascent ends after the first epoch whose training accuracy is at most this. The paper's 0.2 is
            twice chance with ten classes; with five or fewer it is no more than chance, and the ascent may never stop.
        alpha: weight α of the loss in the recovery, positive.
        budget: accuracy on the held-out fifth of the images that pruning may cost; τ is the highest of 0, 0.02, …, 0.98
            up to which it costs no more. (The paper's tables choose τ with the attack's success in view.)
    """

    name = "rnp"
    summary = "unlearn clean images, then prune the channels that recovering them does not need"
    paper = "arXiv 2305.14876 (ICML 2023)"
    cost = "0.1 with 2,500 images: 40 epochs of 500"
    card_text = ("RNP, reconstructive neuron pruning (arXiv 2305.14876), made a copy of the model unlearn {images}, "
                 "trained masks on its channels to recover them, and set the channels of the model to zero that the "
                 "recovery did not need.")  # fmt: skip
    unweighted = "reweight is for a fine-tuning, and RNP trains masks and a copy"
    presets: ClassVar = {"paper": {}, "gentle": {"unlearning_rate": 0.001}}

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    max_grad_norm: float | None = 20.0
    epoch_images: int = 500
    unlearning_rate: PositiveFloat = 0.01
    stop_accuracy: Annotated[float, Interval("[0, 1)")] = 0.2
    alpha: PositiveFloat = 0.2
    budget: Annotated[float, Interval("[0, 1)")] = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch_images < self.batch_size:
            raise UsageError(f"rnp: epoch_images must be at least batch_size, got {self.epoch_images}")

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        # the unlearning and the recovery; the former can stop after an epoch
        recovery = float(self.epochs * min(self.epoch_images, images))
        return recovery, 2 * recovery

    def phases(self, network: Network) -> list[Phase | Pass]:
        rnp = RNP(network, self)
        ascent, descent = replace(self, learning_rate=self.unlearning_rate), replace(self, weight_decay=0.0)
        steps = round(self.epoch_images / self.batch_size)
        unlearn = ascent.phase(name="rnp-unlearn", network=rnp.unlearnt, parameters=trained_parameters(rnp.unlearnt),
                               loss=rnp.unlearning_loss, stop=rnp.has_unlearnt, schedule="constant", part="fit",
                               steps=steps, state=rnp.masked)  # fmt: skip
        recover = descent.phase(name="rnp-recover", network=rnp.masked, parameters=[rnp.masked.mask],
                                loss=rnp.recovery_loss, after_step=rnp.masked.project, max_grad_norm=None,
                                schedule="constant", part="fit", steps=steps, state=rnp.masked)  # fmt: skip
        search = ThresholdSearch(network, rnp.masks, lambda: rnp.masked.mask, THRESHOLDS, self.budget)
        return [unlearn, recover, search.as_pass("rnp-prune", rnp.masked)]


class RNP:
    """A copy of a network that unlearns, and masks on the copy's channels.

    Args:
        network: is not changed.
        config: the settings.
    """

    def __init__(self, network: nn.Module, config: RNPConfig) -> None:
        self.config = config
        self.masks = ChannelMasks(network, config.name)
        self.unlearnt = copy.deepcopy(network)
        self.masked = MaskedNetwork(self.unlearnt, self.masks)

    def unlearning_loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` = −ce, with `clean_loss` = ce and the batch's `accuracy`."""
        logits = model(batch.images)
        clean = batch.cross_entropy(logits)
        right = batch.mean(logits.argmax(1) == batch.labels)
        return {"loss": -clean, "clean_loss": clean, "accuracy": right}

    def has_unlearnt(self, entry: Mapping[str, Any]) -> bool:
        """Tell whether the copy has lost enough accuracy, given an epoch's record."""
        return bool(entry["accuracy"] <= self.config.stop_accuracy)

    def recovery_loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` = α · ce of the masked copy, with `clean_loss` = ce."""
        (logits,) = model(batch.images, None)
        clean = batch.cross_entropy(logits)
        return {"loss": self.config.alpha * clean, "clean_loss": clean}
