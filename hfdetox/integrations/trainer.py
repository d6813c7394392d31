"""D3 inside `transformers.Trainer`, with gradient accumulation and mixed precision as Trainer offers them.

    d3 = D3(model, config)
    D3Trainer(model, TrainingArguments(output, max_grad_norm=0), d3=d3, train_dataset=images).train()

What Trainer would do to D3 if it were let, and what is done here instead:
- It takes a loss of an overridden `compute_loss` as summed over the accumulated batches wherever the model's forward
  takes keyword arguments, and does not divide it by their number: `loss_is_scaled_for_ga = False`.
- It would train with AdamW and a linear schedule: SGD and the engine's cosine schedule of the config are taken, unless
  `optimizers` are passed.
- Its callbacks are called after a step that fp16 skipped, too: the callback asks the optimizer.
- Its checkpoints know nothing of the weights that D3 started from: `d3.safetensors` is put beside them.
- Of some models (ViT) it writes checkpoints under older parameter names, and would resume, or end with the best model,
  with a warning about missing keys and the weights it has: checkpoints are read as `from_pretrained` reads them.

What is refused: weights that are not float32 (bf16 and fp16 are for TrainingArguments), weights that FSDP or DeepSpeed
split, a D3 of another model, label smoothing, `compute_loss_func`, and a checkpoint that D3 did not write.

What is left to its user:
- Trainer clips gradients to a norm of 1 unless it is told `max_grad_norm=0`. Of a config, Trainer reads neither epochs
  nor batch size: TrainingArguments has its own.
- A batch whose accumulated parts differ in size (the last of an epoch) weighs the images of the smaller part more; the
  engine does not. Choose numbers that divide, or pass `dataloader_drop_last=True`.
"""

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hfdetox.defenses.auto import D3Config
from hfdetox.defenses.d3 import D3
from hfdetox.errors import UsageError

STATE_FILE = "d3.safetensors"


class D3Callback(TrainerCallback):
    """Moves the selected weights away at the start, and back onto their sphere after every real optimizer step.

    Args:
        d3: the method, made of the model as it came; the scales in its `frozen_scales` are not trained.
    """

    def __init__(self, d3: D3) -> None:
        self.d3 = d3
        self._resumed = False
        for scale in d3.frozen_scales:
            scale.requires_grad_(False)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Initialise, all processes alike, or take the weights that D3 started from of the checkpoint that is resumed.

        Raises:
            UsageError: these are not weights that D3 can move.
        """
        self._check(model)
        if state.global_step == 0:
            torch.manual_seed(args.seed)
            self.d3.initialize()
        elif not self._resumed:
            self.resume(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def resume(self, checkpoint: Path) -> None:
        """Take over the weights that D3 started from; UsageError where the checkpoint has none."""
        if not (checkpoint / STATE_FILE).is_file():
            raise UsageError(f"{checkpoint} has no {STATE_FILE}, so it is not known from where D3 started: resume a "
                             "checkpoint that D3Callback or D3Trainer wrote")  # fmt: skip
        self.d3.load_state_dict(load_file(str(checkpoint / STATE_FILE)))
        self._resumed = True

    def _check(self, model: nn.Module) -> None:
        trained = {id(parameter) for parameter in model.parameters()}
        for name, weight in self.d3.weights.items():
            if id(weight) not in trained or weight.shape != self.d3.initial[name].shape:
                raise UsageError(f"the weights of {name} are not what this Trainer trains: make D3(model, config) of "
                                 "the model that it gets, without model_init, and without FSDP or DeepSpeed, which "
                                 "split them")  # fmt: skip
            if weight.dtype != torch.float32:
                raise UsageError(f"the weights of {name} are {str(weight.dtype).removeprefix('torch.')}, too coarse "
                                 "for D3's sphere: load the model with dtype=torch.float32, and say "
                                 "TrainingArguments(bf16=True) or fp16=True")  # fmt: skip

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        """Project; Trainer calls this (and `on_step_end`) after a skipped step as well."""
        if not optimizer.step_was_skipped:
            self.d3.project()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Put the weights that D3 started from into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.d3.state_dict().items()}
            save_file(tensors, str(folder / STATE_FILE))


class D3Trainer(Trainer):
    """A Trainer that minimises the loss of D3.

    Args:
        d3: the method, made of the model as it came; the scales in its `frozen_scales` are not trained.
        args, options: what Trainer takes.

    Raises:
        UsageError: an option that D3's loss does not know, or a model that takes no `pixel_values`.
    """

    loss_is_scaled_for_ga = False
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, d3: D3, **options: Any) -> None:
        super().__init__(*args, **options)
        # what `loss_is_scaled_for_ga` is to the first releases of transformers 5
        self.model_accepts_loss_kwargs = False
        self.d3 = d3
        self._check()
        self._callback = D3Callback(d3)
        self.add_callback(self._callback)

    def _check(self) -> None:
        known: Any = self
        if self.args.label_smoothing_factor or known.compute_loss_func is not None:
            raise UsageError(
                "D3Trainer minimises D3's own loss: leave label_smoothing_factor and compute_loss_func out"
            )
        taken = inspect.signature(known.model.forward).parameters.values()
        if not any(one.name == "pixel_values" or one.kind == one.VAR_KEYWORD for one in taken):
            raise UsageError(f"D3Trainer gives a model pixel_values, which {type(self.model).__name__} does not take: "
                             "load a timm model with transformers, or use D3Callback with a Trainer of your "
                             "own")  # fmt: skip

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one accumulated batch; `num_items_in_batch`, the images of all of them, is not needed.

        Raises:
            UsageError: the batch has no images or no labels.
        """
        labels = next(iter(self.label_names), "labels")
        if missing := [name for name in ("pixel_values", labels) if name not in inputs]:
            raise UsageError(f"a batch has no {' and no '.join(missing)} (it has {', '.join(inputs) or 'nothing'}; "
                             "Trainer drops the columns that the model does not take): rename the columns, or name "
                             "that of the labels with TrainingArguments(label_names=[…])")  # fmt: skip
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.d3.loss(outputs.logits, inputs[labels])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """Return the SGD of D3's configuration over what is trained; Trainer's own where it has none."""
        config = self.d3.config
        if self.optimizer is None and isinstance(config, D3Config):
            self.optimizer = config.sgd([p for p in self.model.parameters() if p.requires_grad])
        return super().create_optimizer(*args, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the engine's cosine schedule, stepped once an epoch."""
        if self.lr_scheduler is None:
            epochs = math.ceil(self.args.num_train_epochs)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: 0.5 * (1 + math.cos(math.pi * (step * epochs // num_training_steps) / epochs)),
            )
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **options: Any) -> None:
        self._callback.resume(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **options)
        if isinstance(self.model, PreTrainedModel):
            self._read(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel):
            self._read(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _read(self, checkpoint: str) -> None:
        model: Any = self.model
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())
