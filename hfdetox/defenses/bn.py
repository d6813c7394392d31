"""BN re-estimation: BatchNorm's statistics are measured anew on clean images; nothing is trained.

A baseline of hfdetox's own. Every method that trains in train mode on the clean images moves the statistics too,
and that alone lowers the success of some attacks; this shows by how much.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from accelerate import Accelerator

from hfdetox.defenses.base import DefenseConfig, Network, Pass, Phase
from hfdetox.errors import UsageError
from hfdetox.training.statistics import Statistics, measured_layers
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True)
class BNConfig(DefenseConfig):
    """Settings of the re-estimation.

    Attributes:
        batch_size: images whose statistics are taken together, over all processes, at least 2. The new mean and
            variance are the averages of the batches' (the variance within batches), weighted by their images.
    """

    name = "bn"
    summary = "baseline: measure BatchNorm's statistics anew on clean images, train nothing"
    paper = "none: a baseline"
    data = "clean images"
    cost = "one forward pass in all"
    card_text = ("The statistics of the model's BatchNorm layers were measured anew on {images}; no weight was "
                 "trained. This is a baseline, not a method of a paper.")  # fmt: skip
    presets: ClassVar = {"control": {}}

    batch_size: Annotated[int, Interval("[2, inf]")] = 256

    def phases(self, network: Network) -> list[Phase | Pass]:
        if not measured_layers(network):
            raise UsageError(f"bn: {type(network.model).__name__} has no BatchNorm with running statistics, so there "
                             "is nothing to measure anew; use another defense, such as ft")  # fmt: skip
        statistics = Statistics(network)

        def finish(accelerator: Accelerator) -> dict[str, float]:
            images = statistics.finish(accelerator)
            if not images:
                raise UsageError("bn: a batch has less than two images; use more --samples or fewer processes")
            return {"images": float(images)}

        return [Pass(name="bn", on_batch=statistics.on_batch, finish=finish, batch_size=self.batch_size)]
