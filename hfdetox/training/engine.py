"""The only loop of the project over batches: phases and passes over cached images, with Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hfdetox.errors import RunError
from hfdetox.models.layers import has_batch_norm
from hfdetox.models.network import Network
from hfdetox.progress import note, progress_bar
from hfdetox.training.augment import Augmenter, resolve_augmentation
from hfdetox.training.batches import Batch, ImageSource, StepPlan, source_loader
from hfdetox.training.checkpoints import Checkpoint, CheckpointStore, load_optimizer, optimizer_tensors
from hfdetox.training.devices import equalise_buffers, saved_bytes, synchronised, whole_kernels
from hfdetox.training.phases import UNSTABLE, Part, Pass, Phase
from hfdetox.training.sharpness import frozen_statistics

# share of the images on which methods choose thresholds, and which they do not fit on
HELD_OUT = 0.2
# on CPUs: what a part of a step may keep for its backward pass, the images (pixels) that are never split for that, and
# how few BatchNorm may see at a time
PART_BYTES, SMALL_IMAGE, LEAST_NORMED = 2**27, 96 * 96, 32


@dataclass
class TrainingRecord:
    """What a training did.

    Attributes:
        seconds: of the method alone, its looks and searches included, without measuring before and after.
        precision: the dtype that the first layer really gave.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    precision: str = ""

    @property
    def epochs(self) -> int:
        """Epochs of training, of all phases together; passes that look are none."""
        return sum("learning_rate" in entry for entry in self.history)

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
        # what the run at hand trains, and what it did so far
        self._network, self._record = nn.Module(), TrainingRecord()

    def run(self, network: nn.Module, phases: Sequence[Phase | Pass]) -> TrainingRecord:
        """Take `network` through `phases` in place and leave it in eval mode, its `requires_grad` as they were.

        Raises:
            RunError: a loss that is not finite (with phase, epoch and step), or a checkpoint that cannot be written.
            UsageError: fewer images than the processes and accumulated parts need.
        """
        checkpoint = self.checkpoints.load() if self.checkpoints is not None else None
        record = TrainingRecord(**checkpoint.record["training"] if checkpoint is not None else {})
        first = int(checkpoint.record["phase"]) if checkpoint is not None else 0
        self._network, self._record = network, record
        network.to(self.accelerator.device)
        if getattr(network, "convolutional", False):
            network.to(memory_format=torch.channels_last)
        # one flag for the whole process: a foreign loop stopped amid its accumulation would make our steps do nothing
        self.accelerator.sync_gradients = True
        devices = [self.accelerator.device.index or 0] if self.accelerator.device.type == "cuda" else []
        networks = [network, *(phase.network for phase in phases if isinstance(phase, Phase) and phase.network)]
        try:
            with (torch.random.fork_rng(devices), _observed_dtype(networks, record),
                  synchronised(networks, self.accelerator)):  # fmt: skip
                for index, phase in enumerate(phases[first:], first):
                    if phase.when is not None and not phase.when(record.history):
                        continue
                    resumed = checkpoint if index == first else None
                    if isinstance(phase, Pass):
                        self._run_pass(phase, index, resumed)
                    else:
                        self._run_phase(phase, index, resumed)
        finally:
            network.eval()
        return record

    def _run_phase(self, phase: Phase, index: int, checkpoint: Checkpoint | None) -> None:
        accelerator, network, record = self.accelerator, self._network, self._record
        trained = phase.network or network
        trained.to(accelerator.device)
        places = self._places(phase.part)
        with (only_trained(network, phase.parameters), only_trained(trained, phase.parameters),
              whole_kernels(nn.ModuleList([network, trained]), accelerator)):  # fmt: skip
            if checkpoint is None:
                with _clock(record):
                    # before the seed: what a pass draws must not move what the method draws
                    self._run_probes(phase)
                    self._start(phase, index)
            optimizer = accelerator.prepare_optimizer(phase.optimizer(phase.parameters))
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
            first = self._restore(checkpoint, phase, optimizer) if checkpoint is not None else 0
            if first >= phase.epochs:
                return
            parts = max(phase.gradient_accumulation_steps, self._fitting_parts(phase, len(places)))
            prepared = accelerator.prepare_model(trained)
            plan = StepPlan(len(places), phase.batch_size, parts, accelerator, self._key(index, 0), phase.steps,
                            places)  # fmt: skip
            training = _Training(accelerator, phase, index, self.seed, prepared, optimizer, plan)
            loader = source_loader(self.source, plan, accelerator.device)
            bar = progress_bar(phase.name, phase.epochs * plan.steps, "step", shown=self.progress,
                               done=first * plan.steps, keep=True)  # fmt: skip
            try:
                for epoch in range(first, phase.epochs):
                    torch.manual_seed(self._key(index, epoch + 1) + accelerator.process_index)
                    plan.epoch = epoch
                    entry = training.epoch(loader, bar)
                    phase.check_weights(epoch + 1)
                    record.steps += plan.steps
                    record.images += plan.count
                    record.seconds += entry["seconds"]
                    equalise_buffers(trained, accelerator)
                    with _clock(record):
                        entry |= self._run_probes(phase)
                    record.history.append(entry)
                    accelerator.log({k: v for k, v in entry.items() if k != "phase"}, step=record.epochs)
                    stop = phase.stop is not None and phase.stop(entry)
                    self._save(phase, index, epoch + 1 if not stop else phase.epochs, optimizer)
                    if stop:
                        break
            finally:
                bar.close()
                _unprepare(trained, prepared, accelerator)
                trained.eval()

    def _fitting_parts(self, phase: Phase, count: int) -> int:
        """Return into how many parts a step on large images is split on a CPU, so that a part's activations fit.

        The result is that of the whole step, as with `gradient_accumulation_steps`; BatchNorm sees `LEAST_NORMED`
        images at a time at least.
        """
        network, size = self._network, min(count, phase.batch_size) // self.accelerator.num_processes
        if self.accelerator.device.type != "cpu" or not isinstance(network, Network):
            return 1
        if math.prod(network.input_size[1:]) <= SMALL_IMAGE:
            return 1
        fitting = max(LEAST_NORMED if has_batch_norm(network) else 2, PART_BYTES // saved_bytes(network))
        parts = max(1, min(math.ceil(size / fitting), size // 2))
        if parts > phase.gradient_accumulation_steps:
            note(f"{phase.name}: steps of {size} images in {parts} parts, which fit into memory", shown=self.progress)
        return parts

    @torch.no_grad()
    def _run_pass(self, phase: Pass, index: int, checkpoint: Checkpoint | None) -> None:
        """Run a pass, unless the checkpoint is of its end."""
        if checkpoint is not None:
            self._restore(checkpoint, phase)
            return
        earlier = self._record.seconds
        with _clock(self._record), only_trained(self._network, []):
            self._start(phase, index)
            found = self._look(phase, shown=self.progress)
        seconds = self._record.seconds - earlier
        self._record.history.append({"phase": phase.name, "epoch": 1, **found, "seconds": seconds})
        if phase.says is not None:
            note(phase.says(found), shown=self.progress)
        self._save(phase, index, 1)

    def _start(self, phase: Phase | Pass, index: int) -> None:
        torch.manual_seed(self._key(index, 0))
        if phase.start is not None:
            phase.start()

    @torch.no_grad()
    def _run_probes(self, phase: Phase) -> dict[str, float]:
        """Run the passes of a phase that watch the network, without gradients; returns what they found."""
        found: dict[str, float] = {}
        for look in phase.on_epoch_end() if phase.on_epoch_end is not None else ():
            found |= self._look(look, shown=False)
        return found

    def _look(self, phase: Pass, *, shown: bool) -> dict[str, float]:
        """Show the images of a pass to its `on_batch`, and return what `finish` says."""
        accelerator, network, places = self.accelerator, self._network, self._places(phase.part)
        rank, processes = accelerator.process_index, accelerator.num_processes
        rows = [part[rank::processes].tolist() for part in places.split(phase.batch_size)]
        network.train(phase.train_mode)
        loader = source_loader(self.source, [part for part in rows if part], accelerator.device)
        bar = progress_bar(phase.name, len(rows), "batch", shown=shown, keep=True)
        with bar, torch.set_grad_enabled(phase.gradients):
            for positions, images, labels in loader:
                images = images.to(accelerator.device, non_blocking=True)
                labels = labels.to(accelerator.device, non_blocking=True)
                weights = torch.full((len(labels),), processes / len(places), device=accelerator.device)
                phase.on_batch(network, Batch(images, labels, weights, positions))
                bar.update()
        network.eval()
        return dict((phase.finish(accelerator) if phase.finish is not None else None) or {})

    def _places(self, part: Part) -> torch.Tensor:
        """Return which images a part has, in their order; the held-out fifth is drawn by the run's seed."""
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(self.seed))
        held = max(1, round(HELD_OUT * len(order)))
        return {"all": order, "held-out": order[:held], "fit": order[held:]}[part].sort().values

    def _save(self, phase: Phase | Pass, index: int, epoch: int, optimizer: AcceleratedOptimizer | None = None) -> None:
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        moments, plain = optimizer_tensors(optimizer) if optimizer is not None else ({}, {})
        parts = {"network": self._network.state_dict(), "optimizer": moments,
                 "phase": phase.state.state_dict() if phase.state else {}}  # fmt: skip
        scaler = self.accelerator.scaler
        self.checkpoints.save({f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()},
                              {"phase": index, "epoch": epoch, "optimizer": plain, "training": vars(self._record),
                               "scaler": scaler.state_dict() if scaler is not None else None})  # fmt: skip

    def _restore(self, checkpoint: Checkpoint, phase: Phase | Pass,
                 optimizer: AcceleratedOptimizer | None = None) -> int:  # fmt: skip
        """Take up the state of a checkpoint; returns its epoch."""
        try:
            self._network.load_state_dict(checkpoint.part("network"))
            if optimizer is not None:
                load_optimizer(optimizer, checkpoint.part("optimizer"), checkpoint.record["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise RunError("the checkpoint is of another model than this one; start again without --resume") from error
        if phase.state is not None:
            phase.state.load_state_dict(checkpoint.part("phase"))
        scaler = self.accelerator.scaler
        if scaler is not None and checkpoint.record["scaler"] is not None:
            scaler.load_state_dict(checkpoint.record["scaler"])
        return int(checkpoint.record["epoch"])

    def _key(self, phase: int, epoch: int) -> int:
        return (self.seed * 1_000_003 + phase * 10_007 + epoch * 101) % (2**62)


@dataclass
class _Training:
    """A phase while it runs: what its epochs and steps share; `model` is prepared by the accelerator."""

    accelerator: Accelerator
    phase: Phase
    index: int
    seed: int
    model: nn.Module
    optimizer: AcceleratedOptimizer
    plan: StepPlan

    def epoch(self, loader: DataLoader[Any], bar: tqdm[Any]) -> dict[str, Any]:
        """Take the steps of the plan's epoch; returns its entry of the history."""
        phase, plan, parts = self.phase, self.plan, self.plan.accumulated
        rate = 0.5 * (1 + math.cos(math.pi * plan.epoch / phase.epochs)) if phase.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.model.train()
        begin = time.perf_counter()
        terms: list[dict[str, torch.Tensor]] = []
        held: list[Batch] = []
        for number, (positions, images, labels) in enumerate(loader):
            step, part = divmod(number, parts)
            last = part == parts - 1
            batch = self._batch(positions, images, labels, step, part)
            terms.append(self._backward(batch, last=last))
            if phase.sharpness is not None:
                held.append(batch)
            if not last:
                continue
            self._step(held)
            held = []
            # reading a value makes the device finish: only where the bar has just been drawn
            if bar.update():
                speed = (step + 1) * plan.count / plan.steps / (time.perf_counter() - begin)
                shown = {k: f"{v.item():.3f}" for k, v in terms[-1].items() if k in ("clean_loss", "loss", "distance")}
                bar.set_postfix({**shown, "images/s": f"{speed:.0f}"}, refresh=False)
        means, rate = self._means(terms), self.optimizer.param_groups[0]["lr"]
        return {"phase": phase.name, "epoch": plan.epoch + 1, **means, "learning_rate": rate,
                "seconds": time.perf_counter() - begin}  # fmt: skip

    def _backward(self, batch: Batch, *, last: bool) -> dict[str, torch.Tensor]:
        """Add the gradients of a part of a step, the last of which the processes share; returns the loss's terms."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            values = self.phase.loss(self.model, batch)
            self.accelerator.backward(values["loss"] / self.plan.accumulated)
        return {name: value.detach() for name, value in values.items()}

    def _step(self, parts: Sequence[Batch]) -> None:
        """Take a step with the gradients there are; `parts` are its batches, where it is sharpness-aware."""
        phase = self.phase
        if phase.sharpness is not None:
            # the gradients at the perturbed weights take the place of those at the weights themselves
            with phase.sharpness.perturbed(phase.parameters), frozen_statistics(self.model):
                for batch in parts:
                    self._backward(batch, last=batch is parts[-1])
        if phase.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(phase.parameters, phase.max_grad_norm)
        self.optimizer.step()
        if phase.after_step is not None and not self.optimizer.step_was_skipped:
            phase.after_step()
        self.optimizer.zero_grad()

    def _batch(self, positions: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, step: int,
               part: int) -> Batch:  # fmt: skip
        phase, plan, device = self.phase, self.plan, self.accelerator.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        augmenter = Augmenter(resolve_augmentation(phase.augmentation, images.shape[-2]), self.seed)
        size, rows = plan.size(step), plan.rows(step, part)
        if phase.poison is not None:
            images, labels = phase.poison(images, labels, rows)
        if augmenter.name != "none":
            images = augmenter(images, augmenter.draw(self.index, plan.epoch, step, size)[plan.share(part)])
        weights = torch.full((len(labels),), plan.parts / size, device=device)
        return Batch(images, labels, weights, positions, rows)

    def _means(self, terms: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        names = list(terms[0])
        table = torch.stack([torch.stack([entry[name].float() for name in names]) for entry in terms])
        table = self.accelerator.reduce(table, reduction="mean").view(-1, self.plan.accumulated, len(names))
        table = table.mean(1).cpu()
        bad = (~torch.isfinite(table[:, names.index("loss")])).nonzero()
        if len(bad):
            raise RunError(f"the loss is not finite at phase {self.phase.name}, epoch {self.plan.epoch + 1}, step "
                           f"{int(bad[0]) + 1}; {UNSTABLE}")  # fmt: skip
        return dict(zip(names, table.double().mean(0).tolist(), strict=True))


def _unprepare(network: nn.Module, prepared: nn.Module, accelerator: Accelerator) -> None:
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    # Accelerate leaves its marks on the module: with them, the next phase would silently run without autocast
    for mark in ("forward", "_is_accelerate_prepared"):
        vars(network).pop(mark, None)
    accelerator.free_memory()


@contextmanager
def only_trained(network: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have `trained` alone require gradients; on leaving, the others are as before and no parameter has a gradient."""
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
def _clock(record: TrainingRecord) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    record.seconds += time.perf_counter() - begin


@contextmanager
def _observed_dtype(networks: Sequence[nn.Module], record: TrainingRecord) -> Iterator[None]:
    """Note the precision of what is trained; that of passes, which look at the network as it is, only without that."""
    names = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() or not record.precision:
            record.precision = names.get(output.dtype, str(output.dtype))

    with ExitStack() as stack:
        for network in networks:
            layer = next((m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
            if layer is not None:
                stack.enter_context(layer.register_forward_hook(note))
        yield
