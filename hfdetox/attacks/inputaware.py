"""Input-aware: masks are trained first, then the classifier together with the generator of patterns (2010.08138)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from hfdetox.attacks.base import AttackContext, ControlledTraining, Implant, TrainingPoisoner, share, taken, untrained
from hfdetox.errors import UsageError
from hfdetox.models.preprocessing import Preprocessing, normalize
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Phase
from hfdetox.triggers._networks import network_state
from hfdetox.triggers.base import Trigger, attacked_labels
from hfdetox.triggers.inputaware import Generator, InputAware, draw_mask, draw_pattern
from hfdetox.values import Interval, NonNegativeFloat, PositiveFloat, PositiveInt

_DENSITY_WEIGHT = 100.0
_BETAS = (0.5, 0.9)
# the paper's learning rate of the masks: a tenth after 10 of 25 epochs, and again after 20
_MILESTONES = (0.4, 0.8)


@dataclass(frozen=True, kw_only=True)
class InputAwarePoisoner(TrainingPoisoner):
    """First the masks alone are trained, then the classifier with the generator of patterns (arXiv 2010.08138).

    Of every step of B images, floor(ratio · B) get their own pattern and mask, after augmentation, and the attacker's
    label; as many get those of other images and keep their label (`cross`); the rest are clean. The paper draws the
    other images from a second loader; here they are those of the same batch, moved on by a random number of places:
    the same distribution. All images of a batch that get a pattern go through the generator together.
    In the second stage the generator's learning rate follows the training's schedule, as the classifier's does (by
    default a cosine); the paper's are constant but for steps.

    Attributes:
        mask_epochs: of the first stage, at least 1; 25 in the paper.
        generator_learning_rate: of Adam, for masks and patterns.
        mask_density: value of a mask, in [0, 1), that costs nothing; what is above costs 100 times its mean.
        diversity: weight of what makes two images' patterns and masks differ, at least 0.
    """

    kind = "inputaware"
    uncounted = "the training of its masks"
    summary = "the training step puts each image's own pattern on a tenth of a batch, others' on another"

    mask_epochs: PositiveInt = 25
    generator_learning_rate: PositiveFloat = 0.01
    mask_density: Annotated[float, Interval("[0, 1)")] = 0.032
    diversity: NonNegativeFloat = 1.0

    def cross(self, trigger: Trigger, images: Tensor, positions: Tensor, others: Callable[[], Tensor]) -> Tensor | None:
        """Return each image with the pattern and the mask of its other image."""
        return trigger.cross(images, others()) if isinstance(trigger, InputAware) else None

    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the two stages: phases `mask` (one for each learning rate; Adam starts anew) and `train`.

        Raises:
            UsageError: a ratio above one half, a mode other than `input`, or a trigger with networks of its own.
        """
        trigger = untrained(InputAware, implant, context)
        if implant.ratio > 0.5:
            raise UsageError("inputaware: a ratio of at most 0.5, as many images get another image's pattern")
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            trio = Trio(context.classifier.network, context.clean.preprocessing, trigger.size)
        return ControlledTraining(trio, [*self._mask_phases(trio, context), self._train_phase(trio, implant, context)],
                       lambda: trio.trigger(trigger))  # fmt: skip

    def _adam(self, parameters: Sequence[nn.Parameter], rate: float = 1.0) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.generator_learning_rate * rate, betas=_BETAS)

    def _mask_phases(self, trio: Trio, context: AttackContext) -> list[Phase]:
        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            images, masks = model(batch.images)
            return self.mask_terms(images, masks, turn(len(images)), batch.weights)

        ends = [math.ceil(share * self.mask_epochs) for share in (*_MILESTONES, 1.0)]
        stages = enumerate(zip([0, *ends[:-1]], ends, strict=True))
        return [context.phase(
            name="mask", parameters=list(trio.mask.parameters()), epochs=end - begin, loss=loss, schedule="constant",
            optimizer=partial(self._adam, rate=0.1**number), sharpness=None,
        ) for number, (begin, end) in stages if end > begin]  # fmt: skip

    def mask_terms(self, images: Tensor, masks: Tensor, shift: int, weights: Tensor) -> dict[str, Tensor]:
        """Return the loss of normalised `images` (N×C×H×W) and `masks` (N×1×H×W), paired with those `shift` on.

        100 · mean(relu(m − density)) + w · mean(d(x, x') / (d(m, m') + 1e-7)), means over images by `weights`;
        `density` is the mean of the masks.
        """
        above = relu(masks - self.mask_density).mean((1, 2, 3))
        ratio = spread(images, images.roll(-shift, 0), masks, masks.roll(-shift, 0))
        return {"loss": (weights * (_DENSITY_WEIGHT * above + self.diversity * ratio)).sum(),
                "density": (weights * masks.mean((1, 2, 3))).sum()}  # fmt: skip

    def _train_phase(self, trio: Trio, implant: Implant, context: AttackContext) -> Phase:
        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            attacked, shift = batch.once("mix", lambda: draw_mix(implant.ratio, batch))
            logits, ratio = model(batch.images, attacked, shift)
            labels = batch.labels.clone()
            labels[:attacked] = attacked_labels(labels[:attacked], implant.target, context.classes)
            errors = (batch.weights * cross_entropy(logits.float(), labels, reduction="none")).sum()
            return {"loss": errors + self.diversity * ratio, "cross_entropy": errors, "diversity": ratio}

        return context.phase(parameters=[*trio.network.parameters(), *trio.generator.parameters()], loss=loss,
                             optimizer=context.joint_optimizer(trio.network, self._adam))  # fmt: skip


class Trio(nn.Module):
    """The classifier, the generator of patterns and that of masks, as one network for the engine."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, size: int) -> None:
        super().__init__()
        channels = preprocessing.input_size[0]
        self.network, self.size, self.scale = network, size, preprocessing.scale
        self.generator = Generator(channels, channels).to(memory_format=torch.channels_last)
        self.mask = Generator(channels, 1).to(memory_format=torch.channels_last)
        self.convolutional = bool(getattr(network, "convolutional", False))
        levels = torch.tensor([preprocessing.mean, preprocessing.std])
        self.mean, self.std = (nn.Buffer(part.view(-1, 1, 1), persistent=False) for part in levels)

    def train(self, mode: bool = True) -> Trio:
        """Set the mode; masks that are not trained (any more) stay in eval mode, so that their statistics stay."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.mask.parameters()):
            self.mask.eval()
        return self

    def forward(self, images: Tensor, attacked: int | None = None, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Return normalised images and masks (N×1×H×W), or, given `attacked`, logits and the mean diversity ratio.

        The first `attacked` of `images` (N×C×H×W, 0 to 255) get their own pattern and mask, as many after them those
        of the images `shift` places on, in a ring.
        """
        if attacked is None:
            normal = self._normal(images)
            return normal, draw_mask(self.mask, normal, self.size).float()
        mixed, ratio = self.mix(images, attacked, shift)
        return self.network(mixed), ratio

    def mix(self, images: Tensor, attacked: int, shift: int) -> tuple[Tensor, Tensor]:
        """Return the batch as the classifier sees it, float32 in 0 to 255, and mean(d(x, x') / (d(g, g') + 1e-7))."""
        x = images.float()
        if not attacked:
            return x, x.new_zeros(())
        others = x.roll(-shift, 0)[attacked : 2 * attacked]
        sources = self._normal(torch.cat([x[:attacked], others]))
        patterns = draw_pattern(self.generator, sources, self.size).float()
        masks = draw_mask(self.mask, sources, self.size).float()
        mixed = x[: 2 * attacked] + (255 * patterns - x[: 2 * attacked]) * masks
        ratio = spread(*sources.split(attacked), *patterns.split(attacked)).mean()
        return torch.cat([mixed, x[2 * attacked :]]), ratio

    def trigger(self, trigger: InputAware) -> InputAware:
        """Return `trigger` with the networks as they are now, and the classifier's normalisation."""
        # the trigger divides by 255 whatever the scale of the preprocessing
        factor = 255 * self.scale
        return replace(trigger, generator=network_state(self.generator), mask=network_state(self.mask),
                       mean=self.mean.flatten().cpu() / factor, std=self.std.flatten().cpu() / factor)  # fmt: skip

    def _normal(self, images: Tensor) -> Tensor:
        normal = normalize(images, self.mean, self.std, self.scale)
        return normal.contiguous(memory_format=torch.channels_last)


def spread(x: Tensor, others: Tensor, drawn: Tensor, drawn_others: Tensor) -> Tensor:
    """Return d(x, x') / (d(g, g') + 1e-7) of N images x and what was drawn from them (N×C×H×W each), of shape (N,).

    d is the root of the mean squared difference of an image; of equal ones it is 1e-6, where a root has a gradient.
    """
    return _distance(x, others) / (_distance(drawn, drawn_others) + 1e-7)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return ((first - second).square().mean((1, 2, 3)) + 1e-12).sqrt()


def draw_mix(ratio: float, batch: Batch) -> tuple[int, int]:
    """Draw how many images of a part of a step get their own pattern, and by how many places others' are moved on."""
    size = len(batch.images)
    rows = batch.rows or range(size)
    return min(taken(rows, share(ratio, rows.stop)), size // 2), turn(size)


def turn(size: int) -> int:
    """Draw by how many places a batch of `size` images (at least 2) is turned: 1 to size − 1, on the CPU."""
    return int(torch.randint(1, size, ()).item())
