"""The only training loop of the project: phases of optimisation over cached images, in an Accelerate loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hfdetox.augment import Augmentation, Augmenter, resolve_augmentation
from hfdetox.batches import Batch, ImageSource, StepPlan, source_loader
from hfdetox.checkpoints import Checkpoint, CheckpointStore, load_optimizer, optimizer_tensors
from hfdetox.errors import RunError
from hfdetox.progress import progress_bar
from hfdetox.sharpness import SharpnessAware, frozen_statistics

REFRESH_SECONDS = 1.0

Poison = Callable[[torch.Tensor, torch.Tensor, range], tuple[torch.Tensor, torch.Tensor]]


class Stateful(Protocol):
    """A method's own tensors, kept in every checkpoint."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...


@dataclass(kw_only=True)
class Phase:
    """What the engine runs: which parameters are trained, by what loss, and what happens around the steps.

    Attributes:
        parameters: what is trained; every other parameter of the network is frozen while the phase runs.
        optimizer: makes the optimiser of `parameters`.
        loss: maps (network, batch) to 0-d tensors; `loss` is minimised, the others go into the history.
        batch_size: images of an optimiser step over all processes and accumulated parts.
        schedule: of the learning rate, stepped once an epoch.
        poison: changes a part's images and labels (this process's own) before they are augmented; it is also given
            which images of the whole step they are, as `Batch.rows`.
        sharpness: take the gradients at weights perturbed by it; BatchNorm's statistics are those of the first pass.
        start: runs before the first step (not when resumed), seeded alike on every process.
        after_step: runs after every optimiser step that was not skipped.
        stop: given an epoch's record, whether to end the phase there.
        state: what a checkpoint keeps besides the network and the optimiser.
    """

    name: str
    parameters: list[nn.Parameter]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Batch], dict[str, torch.Tensor]]
    epochs: int
    batch_size: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    augmentation: Augmentation = "auto"
    schedule: Literal["cosine", "constant"] = "cosine"
    poison: Poison | None = None
    sharpness: SharpnessAware | None = None
    start: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None
    stop: Callable[[Mapping[str, Any]], bool] | None = None
    state: Stateful | None = None


@dataclass
class TrainingRecord:
    """What a training did; `seconds` covers the steps alone, `precision` is the dtype the first layer really gave."""

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    precision: str = ""

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return len(self.history)

    @property
    def images_per_second(self) -> float:
        """Training images a second over all processes, augmentation included; 0.0 before the first epoch."""
        return self.images / self.seconds if self.seconds else 0.0


class Engine:
    """Runs phases over one set of images; see the README for what it guarantees.

    Args:
        accelerator: its device, processes and mixed precision are used; its gradient accumulation is not.
        source: the training images.
        seed: with the epoch, determines order, augmentation and dropout.
        checkpoints: where the end of every epoch is kept, and where a run continues from; None keeps nothing.
        progress: show a progress bar on standard error.
    """

    def __init__(self, accelerator: Accelerator, source: ImageSource, *, seed: int = 0,
                 checkpoints: CheckpointStore | None = None, progress: bool = False) -> None:  # fmt: skip
        self.accelerator = accelerator
        self.source = source
        self.seed = seed
        self.checkpoints = checkpoints
        self.progress = progress

    def run(self, network: nn.Module, phases: Sequence[Phase]) -> TrainingRecord:
        """Train `network` in place through `phases` and leave it in eval mode, its `requires_grad` as they were.

        Raises:
            RunError: a loss that is not finite (with phase, epoch and step), or a checkpoint that cannot be written.
            UsageError: fewer images than the processes and accumulated parts need.
        """
        checkpoint = self.checkpoints.load() if self.checkpoints is not None else None
        record, first = TrainingRecord(), 0
        if checkpoint is not None:
            record = TrainingRecord(**checkpoint.record["training"])
            first = int(checkpoint.record["phase"])
        network.to(self.accelerator.device)
        if getattr(network, "convolutional", False):
            network.to(memory_format=torch.channels_last)
        # one flag for the whole process: a foreign loop stopped amid its accumulation would make our steps do nothing
        self.accelerator.sync_gradients = True
        devices = [self.accelerator.device.index or 0] if self.accelerator.device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices),
                _observed_dtype(network, record),
                _sync_batchnorm(network, self.accelerator),
            ):
                for index in range(first, len(phases)):
                    self._run_phase(network, index, phases[index], record, checkpoint if index == first else None)
        finally:
            network.eval()
        return record

    def _run_phase(self, network: nn.Module, index: int, phase: Phase, record: TrainingRecord,
                   checkpoint: Checkpoint | None) -> None:  # fmt: skip
        accelerator = self.accelerator
        with _only_trained(network, phase.parameters):
            if checkpoint is None:
                torch.manual_seed(self._key(index, 0))
                if phase.start is not None:
                    phase.start()
            optimizer = accelerator.prepare_optimizer(phase.optimizer(phase.parameters))
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
            first = _restore(checkpoint, network, optimizer, phase, accelerator) if checkpoint is not None else 0
            if first >= phase.epochs:
                return
            prepared = accelerator.prepare_model(network)
            plan = StepPlan(
                len(self.source), phase.batch_size, phase.gradient_accumulation_steps, accelerator, self._key(index, 0)
            )
            loader = source_loader(self.source, plan, self.accelerator.device)
            bar = progress_bar(phase.name, phase.epochs * plan.steps, "step", accelerator, shown=self.progress,
                               done=first * plan.steps, keep=True)  # fmt: skip
            try:
                for epoch in range(first, phase.epochs):
                    torch.manual_seed(self._key(index, epoch + 1) + accelerator.process_index)
                    plan.epoch = epoch
                    entry = self._run_epoch(prepared, optimizer, phase, plan, loader, bar, record, index)
                    record.history.append(entry)
                    _equalise_buffers(network, accelerator)
                    accelerator.log({k: v for k, v in entry.items() if k != "phase"}, step=record.epochs)
                    stop = phase.stop is not None and phase.stop(entry)
                    self._save(network, optimizer, phase, index, epoch + 1 if not stop else phase.epochs, record)
                    if stop:
                        break
            finally:
                bar.close()
                _unprepare(network, prepared, accelerator)

    def _run_epoch(
        self, model: nn.Module, optimizer: AcceleratedOptimizer, phase: Phase, plan: StepPlan, loader: DataLoader[Any],
        bar: tqdm[Any], record: TrainingRecord, index: int,
    ) -> dict[str, Any]:  # fmt: skip
        accelerator, parts = self.accelerator, phase.gradient_accumulation_steps
        rate = 0.5 * (1 + math.cos(math.pi * plan.epoch / phase.epochs)) if phase.schedule == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        height = self.source.images.shape[-2] if self.source.images is not None else None
        augmenter = None
        model.train()
        begin = refreshed = time.perf_counter()
        terms: list[dict[str, torch.Tensor]] = []
        held: list[Batch] = []
        for number, (_, images, labels) in enumerate(loader):
            step, part = divmod(number, parts)
            if augmenter is None:
                name = resolve_augmentation(phase.augmentation, height or images.shape[-2])
                augmenter = Augmenter(name, self.seed)
            batch = self._batch(images, labels, phase, augmenter, plan, index, step, part)
            last = part == parts - 1
            with nullcontext() if last else accelerator.no_sync(model):
                values = phase.loss(model, batch)
                accelerator.backward(values["loss"] / parts)
            terms.append({name: value.detach() for name, value in values.items()})
            if phase.sharpness is not None:
                held.append(batch)
            if not last:
                continue
            if phase.sharpness is not None:
                self._sharpen(model, phase, phase.sharpness, held)
                held = []
            if phase.max_grad_norm is not None:
                accelerator.clip_grad_norm_(phase.parameters, phase.max_grad_norm)
            optimizer.step()
            if phase.after_step is not None and not optimizer.step_was_skipped:
                phase.after_step()
            optimizer.zero_grad()
            bar.update()
            now = time.perf_counter()
            if not bar.disable and now - refreshed > REFRESH_SECONDS:
                speed = (step + 1) * len(self.source) / plan.steps / (now - begin)
                # reading a value makes the device finish; once a second costs nothing
                shown = {k: f"{v.item():.3f}" for k, v in terms[-1].items() if k in ("clean_loss", "loss", "distance")}
                bar.set_postfix({**shown, "images/s": f"{speed:.0f}"}, refresh=False)
                refreshed = now
        means = self._means(terms, phase, plan.epoch, parts)
        seconds = time.perf_counter() - begin
        record.steps += plan.steps
        record.images += len(self.source)
        record.seconds += seconds
        return {"phase": phase.name, "epoch": plan.epoch + 1, **means, "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": seconds}  # fmt: skip

    def _sharpen(self, model: nn.Module, phase: Phase, sharpness: SharpnessAware, batches: Sequence[Batch]) -> None:
        """Put the gradients of a step at the perturbed weights in place of those at the weights themselves."""
        with sharpness.perturbed(phase.parameters), frozen_statistics(model):
            for batch in batches[:-1]:
                with self.accelerator.no_sync(model):
                    self.accelerator.backward(phase.loss(model, batch)["loss"] / len(batches))
            self.accelerator.backward(phase.loss(model, batches[-1])["loss"] / len(batches))

    def _batch(self, images: torch.Tensor, labels: torch.Tensor, phase: Phase, augmenter: Augmenter, plan: StepPlan,
               index: int, step: int, part: int) -> Batch:  # fmt: skip
        device = self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        rows = plan.rows(step, part)
        if phase.poison is not None:
            images, labels = phase.poison(images, labels, rows)
        if augmenter.name != "none":
            numbers = augmenter.draw(index, plan.epoch, step, plan.size(step))
            images = augmenter(images, plan.mine(numbers, part))
        weight = plan.parts / plan.size(step)
        return Batch(images, labels, torch.full((len(labels),), weight, device=device), rows)

    def _means(self, terms: list[dict[str, torch.Tensor]], phase: Phase, epoch: int, parts: int) -> dict[str, float]:
        names = list(terms[0])
        table = torch.stack([torch.stack([entry[name].float() for name in names]) for entry in terms])
        table = self.accelerator.reduce(table, reduction="mean").view(-1, parts, len(names)).mean(1).cpu()
        bad = (~torch.isfinite(table[:, names.index("loss")])).nonzero()
        if len(bad):
            raise RunError(
                f"the loss is not finite at phase {phase.name}, epoch {epoch + 1}, step {int(bad[0]) + 1}; "
                "try a lower learning rate (--lr), a gradient limit (--set max_grad_norm=1) or --precision no"
            )
        return dict(zip(names, table.double().mean(0).tolist(), strict=True))

    def _save(self, network: nn.Module, optimizer: AcceleratedOptimizer, phase: Phase, index: int, epoch: int,
              record: TrainingRecord) -> None:  # fmt: skip
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        moments, plain = optimizer_tensors(optimizer)
        tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in moments.items()}
        tensors |= {f"phase.{k}": v for k, v in (phase.state.state_dict() if phase.state else {}).items()}
        scaler = self.accelerator.scaler
        self.checkpoints.save(tensors, {"phase": index, "epoch": epoch, "optimizer": plain, "training": vars(record),
                                        "scaler": scaler.state_dict() if scaler is not None else None})  # fmt: skip

    def _key(self, phase: int, epoch: int) -> int:
        return (self.seed * 1_000_003 + phase * 10_007 + epoch * 101) % (2**62)


def _restore(checkpoint: Checkpoint, network: nn.Module, optimizer: AcceleratedOptimizer, phase: Phase,
             accelerator: Accelerator) -> int:  # fmt: skip
    try:
        network.load_state_dict(checkpoint.part("network"))
        load_optimizer(optimizer, checkpoint.part("optimizer"), checkpoint.record["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise RunError("the checkpoint is of another model than this one; start again without --resume") from error
    if phase.state is not None:
        phase.state.load_state_dict(checkpoint.part("phase"))
    if accelerator.scaler is not None and checkpoint.record["scaler"] is not None:
        accelerator.scaler.load_state_dict(checkpoint.record["scaler"])
    return int(checkpoint.record["epoch"])


def _unprepare(network: nn.Module, prepared: nn.Module, accelerator: Accelerator) -> None:
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    # Accelerate leaves its marks on the module: with them, the next phase would silently run without autocast
    for mark in ("forward", "_is_accelerate_prepared"):
        vars(network).pop(mark, None)
    accelerator.free_memory()


@contextmanager
def _only_trained(network: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    chosen = {id(parameter) for parameter in trained}
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


@contextmanager
def _observed_dtype(network: nn.Module, record: TrainingRecord) -> Iterator[None]:
    names = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
    layer = next((m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        record.precision = names.get(output.dtype, str(output.dtype))

    with ExitStack() as stack:
        if layer is not None:
            stack.callback(layer.register_forward_hook(note).remove)
        yield


@contextmanager
def _sync_batchnorm(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        yield
        return
    originals = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)}
    convert_sync_batchnorm(network)
    try:
        yield
    finally:
        for name, module in originals.items():
            module.load_state_dict(network.get_submodule(name).state_dict())
            network.set_submodule(name, module)


def _equalise_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
