"""What an attack is: a trigger, the attacker's label, and a poisoner that trains the two into a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hfdetox.data.cache import Pixels
from hfdetox.errors import UsageError
from hfdetox.models.classifier import Classifier
from hfdetox.models.layers import has_batch_norm
from hfdetox.training.augment import Augmentation
from hfdetox.training.batches import Batch, ImageSource
from hfdetox.training.engine import Engine
from hfdetox.training.phases import JointOptimizer, MakeOptimizer, Phase
from hfdetox.training.sharpness import SharpnessAware
from hfdetox.triggers.base import Target, Trigger, attacked_labels
from hfdetox.values import Interval, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields

# without BatchNorm a network trained from scratch by SGD hardly moves
_LEARNING_RATE = {("sgd", True): 0.1, ("sgd", False): 0.01, ("adamw", True): 1e-3, ("adamw", False): 5e-5}
_WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}

Kind = TypeVar("Kind", bound=Trigger)
How = Literal["dirty label", "clean label", "training control"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the backdoored model is trained, whatever the attack.

    Attributes:
        epochs: passes over the training images, at least 1.
        batch_size: images of an optimiser step, over all processes.
        optimizer: `sgd`, `adamw`, or `auto`: SGD for networks with BatchNorm, AdamW for those without.
        learning_rate: before the cosine schedule; None takes 0.1 (SGD) or 0.001 (AdamW) from scratch, and 0.01 or
            0.00005 from a trained model.
        momentum: of SGD, Nesterov's.
        weight_decay: None takes 0.0005 (SGD) or 0.05 (AdamW).
        augmentation: as for defenses; see `Augmenter`.
        schedule: `cosine`, stepped once an epoch, or `constant`.
        max_grad_norm: clips the gradient's norm over all trained parameters; None does not clip.
    """

    epochs: PositiveInt = 10
    batch_size: Annotated[int, Interval("[2, inf]")] = 128
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    learning_rate: PositiveFloat | None = None
    momentum: Annotated[float, Interval("[0, 1)")] = 0.9
    weight_decay: NonNegativeFloat | None = None
    augmentation: Augmentation = "crop-flip"
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: Annotated[float, Interval("(0, inf]")] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "attack")


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """What a poisoner works with.

    Attributes:
        classifier: the model that gets the backdoor, trained in place.
        clean: its training images, cached, with true labels.
        accelerator: devices and precision.
        training: how the model is trained.
        from_scratch: whether the weights are freshly drawn.
        surrogate: a model trained on clean images, for triggers that are made on one; None where there is none.
        sharpness: of an attacker who trains into a flat minimum; None for the usual training.
        seed: determines everything random.
        progress: show progress bars.
    """

    classifier: Classifier
    clean: Pixels
    accelerator: Accelerator
    training: TrainingSettings = field(default_factory=TrainingSettings)
    from_scratch: bool = False
    surrogate: Classifier | None = None
    sharpness: SharpnessAware | None = None
    seed: int = 0
    progress: bool = False

    @property
    def classes(self) -> int:
        """How many labels the classifier has."""
        return len(self.classifier.labels)

    def engine(self, source: ImageSource | None = None) -> Engine:
        """Return an engine over `source`, by default the clean images."""
        return Engine(self.accelerator, source or self.clean, seed=self.seed, progress=self.progress)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the classifier's `parameters` that the settings ask for."""
        settings, name = self.training, self.training.optimizer
        if name == "auto":
            name = "sgd" if has_batch_norm(self.classifier.model) else "adamw"
        rate = settings.learning_rate or _LEARNING_RATE[name, self.from_scratch]
        decay = _WEIGHT_DECAY[name] if settings.weight_decay is None else settings.weight_decay
        if name == "sgd":
            momentum = settings.momentum
            return torch.optim.SGD(parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0)
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)

    def joint_optimizer(self, network: nn.Module, others: MakeOptimizer) -> MakeOptimizer:
        """Return what makes one optimiser of the classifier's parameters, the first, and of those for `others`."""
        count = len(list(network.parameters()))
        return lambda parameters: JointOptimizer(self.optimizer(parameters[:count]), others(parameters[count:]))

    def phase(self, **changes: Any) -> Phase:
        """Return the phase that trains the classifier by cross-entropy, with the fields of `changes` in place."""
        settings = self.training
        phase = Phase(
            name="train", parameters=list(self.classifier.network.parameters()), optimizer=self.optimizer,
            loss=cross_entropy_loss, epochs=settings.epochs, batch_size=settings.batch_size,
            augmentation=settings.augmentation, schedule=settings.schedule, sharpness=self.sharpness,
            max_grad_norm=settings.max_grad_norm)  # fmt: skip
        return replace(phase, **changes)


@dataclass(frozen=True)
class Implant:
    """One backdoor of a model: its trigger, the attacker's label, the share of images, and how it gets in.

    `ratio` is a share of all training images (data poisoning) or of every batch (training control), in (0, 1].
    """

    trigger: Trigger
    target: Target
    ratio: float
    poisoner: Poisoner

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UsageError(f"a poison ratio is above 0 and at most 1, got {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class Poisoner(ABC):
    """How one kind of trigger gets into a model; its fields are its own settings, as `--set` takes them.

    `uncounted` names what it does that `efforts` does not count, as in "the search of its pattern".
    """

    kind: ClassVar[str]
    summary: ClassVar[str] = "no summary"
    how: ClassVar[How]
    uncounted: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self, self.kind)

    def on_clean_model(self, trigger: Trigger) -> bool:
        """Return whether `make` or the poisoning of `trigger` needs the surrogate, a model without a backdoor."""
        return False

    def efforts(self, trigger: Trigger, images: int, ratio: float, epochs: int) -> tuple[float, float]:
        """Return about how many images go through the classifier and back, before its training and in it.

        Args:
            trigger: what is implanted.
            images: how many training images there are.
            ratio: the share of them, or of every batch, that is poisoned.
            epochs: those that were asked for.
        """
        return 0.0, float(epochs * images)

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger ready for use: as it is, or made on the context's images or surrogate first.

        Raises:
            UsageError: it is made on a clean model and the context has none.
        """
        return trigger

    def cross(self, trigger: Trigger, images: Tensor, positions: Tensor, others: Callable[[], Tensor]) -> Tensor | None:
        """Return what the poisoner teaches the model not to react to, uint8 like `images` (N×C×H×W); None for none.

        The share of these that is still classified correctly is the cross accuracy. An image's result depends on
        nothing but the image, its position and its other image, so that no split into batches changes the measure.

        Args:
            positions: the images' places in their set (N, int64, CPU).
            others: gives another image for each (like `images`); it may have to decode them.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class DataPoisoner(Poisoner):
    """Data poisoning: once, before the training, a fixed set of images gets the trigger and the attacker's label."""

    how: ClassVar[How] = "dirty label"

    def triggered(self, trigger: Trigger, target: Target, positions: Tensor, context: AttackContext) -> Pixels:
        """Return the poisoned images of the clean images at `positions` (M, int64), made on demand if they do not fit.

        Their labels are the true ones.
        """
        return context.clean.view(trigger, positions=positions)


@dataclass(frozen=True)
class ControlledTraining:
    """A training that the attacker controls: what is trained, by which phases, and the trigger as it then is."""

    network: nn.Module
    phases: list[Phase]
    trigger: Callable[[], Trigger]


@dataclass(frozen=True, kw_only=True)
class TrainingPoisoner(Poisoner):
    """Training control: the trigger is put on a share of every batch, by the training step itself."""

    how = "training control"

    @abstractmethod
    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the training that implants `implant`; the last phase is the one that trains the classifier."""


def cross_entropy_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the mean cross-entropy of a batch as `loss`, in nats."""
    errors = cross_entropy(model(batch.images).float(), batch.labels, reduction="none")
    return {"loss": (batch.weights * errors).sum()}


@dataclass(frozen=True, kw_only=True)
class MixedPoisoner(TrainingPoisoner):
    """Training control by the images alone: the classifier's own training, on batches that `mixed` changes."""

    def controlled_training(self, implant: Implant, context: AttackContext) -> ControlledTraining:
        """Return the training, one phase that changes every batch before it is augmented.

        Raises:
            UsageError: a trigger in another mode than `input`, or a model that is given floats.
        """
        check_input_mode(implant, context)

        def poison(images: Tensor, labels: Tensor, rows: range) -> tuple[Tensor, Tensor]:
            return self.mixed(implant, images, labels, context.classes, rows)

        return ControlledTraining(context.classifier.network, [context.phase(poison=poison)], lambda: implant.trigger)

    def mixed(
        self, implant: Implant, images: Tensor, labels: Tensor, classes: int, rows: range
    ) -> tuple[Tensor, Tensor]:
        """Return a part of a step (uint8, N×C×H×W, and int64 labels): triggered images, then decoys, then clean ones.

        `rows` are its numbers in the step, as `Batch.rows`.
        """
        attacked = share(implant.ratio, rows.stop)
        count, end = taken(rows, attacked), taken(rows, attacked + self.decoys(attacked, rows.stop))
        if not end:
            return images, labels
        parts = [implant.trigger.apply(images[:count]), self.decoyed(implant.trigger, images[count:end], images)]
        changed = attacked_labels(labels[:count], implant.target, classes)
        return torch.cat([*parts, images[end:]]), torch.cat([changed, labels[count:]])

    @abstractmethod
    def decoys(self, attacked: int, size: int) -> int:
        """Return how many images of a step of `size` are decoys, which keep their label, beside the `attacked`."""

    @abstractmethod
    def decoyed(self, trigger: Trigger, images: Tensor, batch: Tensor) -> Tensor:
        """Return the decoys of `images` (uint8, N×C×H×W, perhaps none), which are some of a `batch`."""


def check_input_mode(implant: Implant, context: AttackContext) -> None:
    """Raise UsageError for a trigger that does not act on what the model sees: uint8 images after resize and crop."""
    trigger = implant.trigger
    if trigger.mode != "input":
        raise UsageError(f"trigger {trigger.name}: {trigger.kind} is put on images within the training, after resize "
                         "and crop; give it mode=input")  # fmt: skip
    if context.clean.preprocessing.dtype != torch.uint8:
        raise UsageError(f"trigger {trigger.name}: {trigger.kind} needs uint8 images after the preprocessing, and this "
                         "callable returns floats")  # fmt: skip


def of_kind(kind: type[Kind], trigger: Trigger) -> Kind:
    """Return the trigger, which must be of the kind: UsageError for one that another attack implants."""
    if not isinstance(trigger, kind):
        raise UsageError(f"trigger {trigger.name}: the {kind.kind} attack cannot implant a {trigger.kind} trigger")
    return trigger


def untrained(kind: type[Kind], implant: Implant, context: AttackContext) -> Kind:
    """Return the implant's trigger, of the kind, of mode `input` and without networks; else raise UsageError."""
    check_input_mode(implant, context)
    found = of_kind(kind, implant.trigger)
    if found.fitted:
        raise UsageError(f"trigger {found.name}: the networks of {kind.kind} are trained with the classifier, and "
                         "this one has its own already; name the kind in place of the file")  # fmt: skip
    return found


def share(ratio: float, count: int) -> int:
    """Return how many of a step's `count` images a `ratio` takes: the floor, or one with that chance where it is 0."""
    # 0.29 · 100 is 28.999999999999996
    exact = ratio * count + 1e-9
    # drawn on the CPU: nothing waits for the device
    return math.floor(exact) if exact >= 1 else int(float(torch.rand(())) < ratio * count)


def taken(rows: range, count: int) -> int:
    """Return how many of a part's images are among the first `count` of the step; they are the part's first.

    `rows` are the part's numbers in the step, as `Batch.rows`: all parts together take `count`, however many they are.
    """
    return len(range(rows.start, min(count, rows.stop), rows.step))


def of_main(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the main process's `tensor` on every process, where they all have one of its shape and dtype.

    On the accelerator's device, where there are several processes; else the tensor itself.
    """
    if accelerator.num_processes == 1:
        return tensor
    found: Tensor = broadcast(tensor.detach().to(accelerator.device, copy=True).contiguous())
    return found


def trigger_of_main(trigger: Trigger, accelerator: Accelerator) -> Trigger:
    """Return `trigger` with the main process's arrays, on every process."""
    if accelerator.num_processes == 1:
        return trigger
    arrays = {name: of_main(array, accelerator).to(array.device) for name, array in trigger.tensors().items()}
    return replace(trigger, **trigger.grouped(arrays)[0])
