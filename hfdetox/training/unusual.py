"""Settings of strangers' networks that a short tuning does not bear: dropout of nearly all, statistics of one batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hfdetox.training.batches import Batch
from hfdetox.training.devices import equalise_buffers
from hfdetox.training.phases import Pass, Phase

# Dropout above the first is the second while tuning: transformers' MobileNets have 0.999 and 0.8 before the head.
MOST_DROPOUT, DROPOUT = 0.5, 0.2
# Above it (torch's sense: the share of the newest batch) running statistics are those of the last batches.
MOST_MOMENTUM = 0.5


@contextmanager
def tamed(network: nn.Module, phases: Sequence[Phase | Pass],
          warn: Callable[[str], None]) -> Iterator[Sequence[Phase | Pass]]:  # fmt: skip
    """Hold the dropout of a network that `phases` tune within bounds, and give the phases to run.

    Where BatchNorm's momentum is extreme, a last pass measures its statistics anew on all images. Both are told to
    `warn`; dropout and momentum are the network's own again at the end. Nothing is done to other networks.
    """
    tunes = any(isinstance(phase, Phase) and phase.network is None for phase in phases)
    modules = list(network.modules()) if tunes else []
    # timm's heads drop features by a function, given the model's drop_rate
    shares = [(m, "p") for m in modules if isinstance(m, _DropoutNd)] + [(m, "drop_rate") for m in modules]
    dropouts = [(m, name, share) for m, name in shares
                if isinstance(share := getattr(m, name, None), float) and share > MOST_DROPOUT]  # fmt: skip
    momenta = {m: m.momentum for m in modules if isinstance(m, _BatchNorm) and (m.momentum or 0.0) > MOST_MOMENTUM}
    if dropouts:
        most = max(share for *_, share in dropouts)
        warn(f"the network's dropout of {most:g} was {DROPOUT:g} while it was tuned: more of it costs accuracy")
    if momenta:
        warn("the network's BatchNorm statistics are those of its last batches (momentum "
             f"{max(momenta.values(), key=lambda m: m or 0.0):g}); after tuning they were measured anew on all clean "
             "images")  # fmt: skip

    def start() -> None:
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches

    def see(network: nn.Module, batch: Batch) -> None:
        for norm in momenta:
            norm.train(len(batch.labels) > 1)
        network(batch.images)

    anew = Pass(name="statistics", start=start, on_batch=see, finish=partial(equalise_buffers, network))
    for module, name, _ in dropouts:
        setattr(module, name, DROPOUT)
    try:
        yield [*phases, *([anew] if momenta else [])]
    finally:
        for module, name, share in dropouts:
            setattr(module, name, share)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
