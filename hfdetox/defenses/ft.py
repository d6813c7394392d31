"""FT, plain fine-tuning on clean images, and the same after the head is drawn anew.

    min over θ of  mean_i ce(f_θ(x_i), y_i)

FT ends near θ⁰, where the backdoor's loss is low too: it fails against backdoors that clean images do not disturb. The
second arm is a baseline of hfdetox's own: it starts where D3 starts and lacks D3's push, so that the difference between
the two is the push's alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from hfdetox.defenses.base import Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.defenses.d3 import start_weight
from hfdetox.models.layers import HEAD


@dataclass(frozen=True, kw_only=True)
class FTConfig(TuningConfig):
    """Settings of FT; preset `d3-settings` has no weight decay, as D3, for a comparison at equal settings."""

    name = "ft"
    summary = "fine-tune on clean images and nothing else"
    paper = "baseline (BackdoorBench, arXiv 2206.12654)"
    cost = "1"
    card_text = "Fine-tuning (FT) trained the model's weights on {images}, and nothing else was done to them."
    presets: ClassVar = {"paper": {}, "d3-settings": {"weight_decay": 0.0}}

    weight_decay: float = 5e-4

    def phases(self, network: Network) -> list[Phase | Pass]:
        trained = trained_parameters(network)
        return [self.phase(name=self.name, parameters=trained, start=self._start(network))]

    def _start(self, network: Network) -> Callable[[], None] | None:
        """Return what happens to the network before the first step."""
        return None


@dataclass(frozen=True, kw_only=True)
class RandomHeadConfig(FTConfig):
    """Settings of the baseline: the head's weights start as D3's do (uniform, of the old norm; biases stay)."""

    name = "ft-random-head"
    summary = "baseline: draw the head's weights anew as D3 does, then fine-tune on clean images"
    paper = "none: a baseline for D3 (arXiv 2411.09585)"
    card_text = ("The weights of the model's classifier head were drawn anew, and fine-tuning trained all weights on "
                 "{images}. This is a baseline for D3, not a method of a paper.")  # fmt: skip
    treats = (HEAD,)
    presets: ClassVar = {"control": {}, "d3-settings": {"weight_decay": 0.0}}

    def _start(self, network: Network) -> Callable[[], None]:
        names = self.selected_layers(network.model)

        @torch.no_grad()
        def draw_head() -> None:
            for name in names:
                weight = network.model.get_submodule(name).get_parameter("weight")
                weight.copy_(start_weight(weight.detach().float().clone(), "random"))

        return draw_head
