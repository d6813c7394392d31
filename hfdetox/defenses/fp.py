"""FP, fine-pruning (Liu et al., RAID 2018, arXiv 1805.12185), as BackdoorBench applies it to the classifier's head.

    a_c = mean_i |h_c(x_i)|  over the head's input features h;  zero the columns W_{·c} of the least active features, in
    steps of 1 %, while the accuracy falls by less than 10 % of what it was;  fine-tune, the columns staying zero

Features that clean images leave silent may serve the trigger alone. The benchmark finds the share on test images and
keeps the step that fails; here it is found on a held-out fifth of the clean images, and the failing step is taken back.
The absolute value changes nothing behind a ReLU, and orders features that have a sign (a ViT's) by size. The paper
prunes channels of the last convolution instead, which are the head's input features where only pooling is between.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import linear

from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.errors import UsageError
from hfdetox.models.layers import HEAD, on_inputs
from hfdetox.training.masks import pointwise
from hfdetox.values import Interval


@dataclass(frozen=True, kw_only=True)
class FPConfig(TuningConfig):
    """Settings of FP; the defaults are those of the benchmark (preset `paper`).

    Attributes:
        step: share of the features by which the pruning goes on, in (0, 1).
        max_drop: held-out accuracy that the pruning may cost, as a share of the accuracy before, in (0, 1]; 0.02 in
            preset `budget`.
    """

    name = "fp"
    summary = "cut off the head's least active input features, then fine-tune"
    paper = "arXiv 1805.12185 (RAID 2018)"
    cost = "1, after one forward pass in all"
    card_text = ("FP, fine-pruning (arXiv 1805.12185), set to zero the classifier head's weights of the features that "
                 "are least active on {images}, and fine-tuned the rest on them.")  # fmt: skip
    treats = (HEAD,)
    presets: ClassVar = {"paper": {}, "budget": {"max_drop": 0.02}}

    weight_decay: float = 5e-4
    step: Annotated[float, Interval("(0, 1)")] = 0.01
    max_drop: Annotated[float, Interval("(0, 1]")] = 0.1

    def phases(self, network: Network) -> list[Phase | Pass]:
        fp = FinePruning(network.model, self)
        return [
            Pass(name="fp-activation", on_batch=fp.add_activations, finish=fp.average, batch_size=self.batch_size,
                 part="fit", state=fp),
            Pass(name="fp-pruning", start=fp.rank, on_batch=fp.count_correct, finish=fp.prune,
                 batch_size=self.batch_size, part="held-out", state=fp),
            self.phase(name="fp", parameters=trained_parameters(network), after_step=fp.mask, state=fp)]  # fmt: skip


class FinePruning:
    """Activities and masks of the heads (two of distilled models, whose logits are their outputs' mean).

    Attributes:
        activity: per head, a_c of its D input features (float32).
        kept: per head, 1 for features that are kept and 0 for those pruned (D, float32).

    Raises:
        UsageError: a head is neither a Linear layer nor a 1×1 convolution (of pooled features, as in timm's ResNetV2).
    """

    def __init__(self, model: nn.Module, config: FPConfig) -> None:
        self.model, self.config = model, config
        self.heads = config.selected_layers(model)
        for name in self.heads:
            if not pointwise(model.get_submodule(name)):
                kind = type(model.get_submodule(name)).__name__
                raise UsageError(f"fp: the head {name} is a {kind}, and fp prunes columns of a Linear or of a 1×1 "
                                 "convolution; use another defense")  # fmt: skip
        sizes = {name: self._weight(name).shape[1] for name in self.heads}
        self.activity = {name: torch.zeros(size) for name, size in sizes.items()}
        self.kept = {name: torch.ones(size) for name, size in sizes.items()}
        self.masks: dict[str, Tensor] = {}
        self.correct = torch.zeros(len(self.shares))
        self.seen = 0

    @property
    def shares(self) -> list[float]:
        """Shares of the features that are tried: 0, step, 2 · step, … below 1."""
        steps = range(int(1 / self.config.step) + 1)
        return [k * self.config.step for k in steps if k * self.config.step < 1 - 1e-9]

    def add_activations(self, network: nn.Module, batch: Batch) -> None:
        """Add up |h| over a batch."""
        for name, features in self._run(network, batch.images)[1].items():
            self.activity[name] = self.activity[name].to(features.device) + features.float().abs().sum(0)
        self.seen += len(batch.labels)

    def average(self, accelerator: Accelerator) -> None:
        """Turn the sums of all processes into means."""
        seen = accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device), reduction="sum")
        for name, total in self.activity.items():
            self.activity[name] = accelerator.reduce(total.to(accelerator.device), reduction="sum") / seen

    def rank(self) -> None:
        """Lay out the masks of every share (shares × D per head): the least active features go first."""
        self.seen, self.correct = 0, torch.zeros(len(self.shares))
        for name, activity in self.activity.items():
            self.masks[name] = share_masks(activity, self.shares)

    def count_correct(self, network: nn.Module, batch: Batch) -> None:
        """Count the correct answers with each share pruned; only the head differs, so one pass serves all."""
        logits, inputs = self._run(network, batch.images)
        whole = [self._logits(name, inputs[name], None) for name in self.heads if name in inputs]
        if len(whole) < len(self.heads) or not torch.allclose(_mean(whole), logits.float(), rtol=1e-3, atol=1e-3):
            raise UsageError(f"fp: the logits of {type(self.model).__name__} are not the output of "
                             f"{', '.join(self.heads)}, so that fp cannot measure what pruning its columns costs; use "
                             "another defense")  # fmt: skip
        counts = [
            (_mean([self._logits(name, inputs[name], place) for name in self.heads]).argmax(1) == batch.labels).sum()
            for place in range(len(self.shares))
        ]
        self.correct = self.correct.to(batch.labels.device) + torch.stack(counts)
        self.seen += len(batch.labels)

    def prune(self, accelerator: Accelerator) -> dict[str, float]:
        """Choose the share, keep its masks and apply them."""
        seen = accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device), reduction="sum")
        counts = accelerator.reduce(self.correct.to(accelerator.device), reduction="sum")
        accuracies = (counts / seen).tolist()
        place = last_within(accuracies, self.config.max_drop)
        self.kept = {name: masks[place] for name, masks in self.masks.items()}
        self.mask()
        return {"pruned_share": self.shares[place], "held_out_accuracy_before": accuracies[0],
                "held_out_accuracy": accuracies[place]}  # fmt: skip

    @torch.no_grad()
    def mask(self) -> None:
        """Set the pruned columns to zero, in place."""
        for name in self.heads:
            weight = self._weight(name)
            self.kept[name] = self.kept[name].to(weight.device)
            weight.mul_(self.kept[name].reshape(1, -1, *[1] * (weight.ndim - 2)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return activities and masks by head."""
        return {f"{part}.{name}": kept for part in ("activity", "kept") for name, kept in getattr(self, part).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over those of a stopped run."""
        self.activity = {name: state[f"activity.{name}"].clone() for name in self.heads}
        self.kept = {name: state[f"kept.{name}"].clone() for name in self.heads}

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).get_parameter("weight")

    def _run(self, network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits, and what the heads get (N×D each); heads that see tokens or a map get none."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str, features: Tensor) -> None:
            if features.ndim == 4 and features.shape[2:] == (1, 1):
                features = features.flatten(1)
            if features.ndim == 2:
                inputs[name] = features

        with on_inputs(self.model, self.heads, keep):
            return network(images), inputs

    def _logits(self, name: str, features: Tensor, place: int | None) -> Tensor:
        """Return a head's output for features N×D with a share's mask, or with none."""
        head = self.model.get_submodule(name)
        if place is not None:
            features = features * self.masks[name][place].to(features.device)
        bias = head.bias if isinstance(head.bias, nn.Parameter) else None
        return linear(features, self._weight(name).flatten(1), bias).float()


def share_masks(activity: Tensor, shares: list[float]) -> Tensor:
    """Return the masks of every share, shares×D: 0 for its ⌊share · D⌋ least active features, 1 for the others."""
    ranks = activity.argsort(stable=True).argsort()
    numbers = torch.tensor([int(share * len(activity) + 1e-9) for share in shares], device=activity.device)
    return (ranks >= numbers[:, None]).float()


def last_within(accuracies: list[float], max_drop: float) -> int:
    """Return the last place before the first whose relative drop from accuracies[0] reaches `max_drop`."""
    allowed = (1 - max_drop) * accuracies[0]
    failing = (place for place, accuracy in enumerate(accuracies) if place and accuracy <= allowed)
    return next(failing, len(accuracies)) - 1


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)
