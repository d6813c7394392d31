"""What a defense is: a frozen configuration that turns a model into phases for the engine."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hfdetox.errors import UsageError
from hfdetox.models.layers import match_layers
from hfdetox.models.network import Network
from hfdetox.training.augment import Augmentation
from hfdetox.training.batches import Batch
from hfdetox.training.phases import Pass, Phase
from hfdetox.training.reweighting import Reweight, reweighted
from hfdetox.values import Interval, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields

# with what its methods take and give, so that a defense imports the one module
__all__ = ["FORWARD", "Batch", "DefenseConfig", "Network", "Pass", "Phase", "TuningConfig", "clean_terms",
           "trained_parameters", "tuned_images"]  # fmt: skip

# what an image forward alone takes of one there and back
FORWARD = 1 / 3


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(ABC):
    """What a defense is to the rest of the program: named settings that turn a network into phases.

    A defense is a subclass with a `name`. It may also have a one-line `summary`, its `paper`, its `presets` (the first
    is the default), `data` (what it needs besides the model), `cost` (relative to plain fine-tuning with as many
    epochs) and `times` (the same as a number, for the estimate before a run), and `card_text`: what a model card says
    was done, Markdown with `{images}` for the number of clean images ("2,500 trusted images"); an arXiv number in it,
    as in "arXiv 2411.09585", becomes a link.
    `treats` has the patterns of the layers that it treats apart from the rest.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = "no summary"
    paper: ClassVar[str] = "no paper"
    data: ClassVar[str] = "clean images with labels"
    cost: ClassVar[str] = "unknown"
    times: ClassVar[float] = 1.0
    card_text: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    treats: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check words and ranges; raises UsageError that names the setting and what it may be."""
        check_fields(self, self.name)

    def selected_layers(self, model: nn.Module) -> list[str]:
        """Return the names of the modules of `model` that the defense treats apart from the rest: those of `treats`."""
        return match_layers(model, self.treats) if self.treats else []

    def choices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what the method chose itself from the model and the images and why, a sentence each.

        Args:
            history: that of a run, its entries in order.
        """
        return []

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        """Return about how many images go through the network and back, one number for each way that a run may take.

        An image that goes forward alone counts `FORWARD`.

        Args:
            images: how many clean images there are.
            classes: how many the model tells apart.
        """
        return (max(FORWARD * images, self.times * tuned_images(self, images)),)

    def settled(self, *, batch_norm: bool) -> Self:
        """Return the settings with what depends on whether the network has BatchNorm decided, for `efforts`."""
        return self

    @property
    def trigger_given(self) -> bool:
        """Whether the settings hand a known trigger to the method, which its card must say."""
        return False

    def describe(self, images: str) -> str:
        """Return what a card says was done, Markdown; `images` names the clean images, "2,500 trusted images"."""
        linked = re.sub(r"(?<!\[)arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", self.text_of_card)
        return linked.replace("{images}", images)

    @property
    def text_of_card(self) -> str:
        """What a card says of the method with these settings: `card_text`, unless settings make it another method."""
        return self.card_text

    @abstractmethod
    def phases(self, network: Network) -> list[Phase | Pass]:
        """Return what the engine runs, in order; the network is not changed yet.

        Raises:
            UsageError: the method cannot be used on this network (no BatchNorm, no Linear head, …).
        """

    def settings(self) -> dict[str, Any]:
        """Return every setting by the name `--set` knows it under, as plain JSON types."""
        values = {f.name.rstrip("_"): getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class TuningConfig(DefenseConfig):
    """The settings that every defense with a training shares.

    Attributes:
        epochs: passes over the clean images, at least 1.
        batch_size: images an optimiser step sees, over all processes and accumulation steps together.
        learning_rate: of SGD, before the cosine schedule that is stepped once an epoch.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, at least 0.
        gradient_accumulation_steps: parts a batch is split into to save memory; the result is that of the whole batch
            (but for BatchNorm, whose statistics are those of a part).
        max_grad_norm: clips the gradient's norm over all trained parameters; None does not clip.
        augmentation: `auto` (`crop-flip` up to 96 pixels of height, else `resized-crop-flip`), `crop`, `crop-flip`,
            `flip`, `resized-crop-flip` or `none`. Leave flips out where a mirrored image has another label (digits,
            signs).
        reweight: weights of the images in the loss: `none`, by the accuracy their `class` lost on a held-out fifth of
            the images (which are then not trained on), or within classes too, by `wasserstein` distance; see
            `hfdetox.training.reweighting`.
        unweighted: why a method cannot have `reweight`, where it cannot.
    """

    unweighted: ClassVar[str] = ""

    epochs: PositiveInt = 100
    batch_size: Annotated[int, Interval("[2, inf]")] = 256
    learning_rate: PositiveFloat = 0.01
    momentum: Annotated[float, Interval("[0, 1)")] = 0.9
    weight_decay: NonNegativeFloat = 0.0
    gradient_accumulation_steps: PositiveInt = 1
    max_grad_norm: Annotated[float, Interval("(0, inf]")] | None = None
    augmentation: Augmentation = "auto"
    reweight: Reweight = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reweight != "none" and self.unweighted:
            raise UsageError(f"{self.name}: {self.unweighted}; leave reweight out")

    def describe(self, images: str) -> str:
        held = f" A fifth of them was held out, and weighted the others (`reweight: {self.reweight}`)."
        return super().describe(images) + (held if self.reweight != "none" else "")

    def sgd(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser the settings name: SGD with momentum."""
        return torch.optim.SGD(parameters, self.learning_rate, self.momentum, weight_decay=self.weight_decay)

    def phase(self, **parts: Any) -> Phase:
        """Return a phase with these settings; `parts` are the fields of `Phase` that are the method's own.

        Its loss is the cross-entropy of a batch, unless `parts` has another one.

        With `reweight`, the batches that its loss gets carry the weights, and its state holds them too.
        """
        shared: dict[str, Any] = {
            "epochs": self.epochs, "batch_size": self.batch_size, "max_grad_norm": self.max_grad_norm,
            "augmentation": self.augmentation, "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "optimizer": self.sgd, "loss": clean_terms}  # fmt: skip
        return reweighted(Phase(**{**shared, **parts}), self.reweight)


def tuned_images(settings: Any, images: int) -> int:
    """Return how many images the training of a defense takes in all; none where it trains no epochs.

    Args:
        settings: the defense's configuration.
        images: how many clean images there are.
    """
    steps = math.ceil(images / max(1, getattr(settings, "batch_size", images)))
    least = math.ceil(getattr(settings, "min_steps", 0) / max(1, steps))
    return max(getattr(settings, "epochs", 0), least) * images


def trained_parameters(network: nn.Module, but: Sequence[Tensor] = ()) -> list[nn.Parameter]:
    """Return what a fine-tuning trains: the parameters that require gradients as the model came, `but` some."""
    frozen = {id(tensor) for tensor in but}
    return [parameter for parameter in network.parameters() if parameter.requires_grad and id(parameter) not in frozen]


def clean_terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the loss of FT, the cross-entropy of a batch, as `loss` and `clean_loss`."""
    loss = batch.cross_entropy(model(batch.images))
    return {"loss": loss, "clean_loss": loss.detach()}
