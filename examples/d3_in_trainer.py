"""D3 inside `transformers.Trainer`, with gradient accumulation and mixed precision as Trainer offers them.

    python examples/d3_in_trainer.py
    python examples/d3_in_trainer.py --model google/vit-base-patch16-224 --dataset ILSVRC/imagenet-1k \\
        --samples 5000 --epochs 100 --lr 0.01 --batch-size 256 --output vit-detoxed

Without --model the toy of toy.py is used (written to ./toy). The model must be one of transformers.

What Trainer would do to D3 if it were let, and what is done here instead:
- It takes a loss of an overridden `compute_loss` as summed over the accumulated batches wherever the model's forward
  takes keyword arguments, and does not divide it by their number: `loss_is_scaled_for_ga = False`.
- It clips gradients to a norm of 1: `max_grad_norm=0`. Label smoothing stays off: the loss below does not know it.
- It would train with AdamW and a linear schedule: SGD and the cosine schedule of the engine are passed to it.
- Its callbacks are called after a step that fp16 skipped, too: the callback asks the optimiser.
- A batch whose accumulated parts differ in size (the last of an epoch) weighs the images of the smaller part more;
  the engine does not. Choose numbers that divide, or pass `dataloader_drop_last=True`.
- Resuming works where Trainer's own does: of ViT, transformers 5.23 writes checkpoints under older parameter names and
  then goes on with a warning about missing keys and the old weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
import toy
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfdetox import D3, D3Config, evaluate, load_classifier, load_images


class D3Callback(TrainerCallback):
    """Moves the selected weights away at the start, and back onto their sphere after every real optimiser step."""

    def __init__(self, d3: D3) -> None:
        self.d3 = d3

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Initialise, unless a checkpoint is resumed; all processes draw alike."""
        if state.global_step == 0:
            torch.manual_seed(args.seed)
            self.d3.initialize()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        """Project; Trainer calls this (and `on_step_end`) after a skipped step as well."""
        if not optimizer.step_was_skipped:
            self.d3.project()


class D3Trainer(Trainer):
    """A Trainer that minimises the loss of D3."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, d3: D3, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # what loss_is_scaled_for_ga is to the first releases of transformers 5
        self.d3 = d3
        self.add_callback(D3Callback(d3))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one accumulated batch; `num_items_in_batch`, the images of all of them, is not needed."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.d3.loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def make_trainer(
    model: nn.Module, images: Dataset, config: D3Config, output: str, *, seed: int = 0, **arguments: Any
) -> D3Trainer:
    """Return a Trainer that does what hfdetox's engine does with `config` (but for augmentation) in one process.

    `images` gives {"pixel_values", "labels"}; `arguments` are more TrainingArguments. D3 remembers the weights that
    `model` has now: load the backdoored ones first, also before resuming.
    """
    d3 = D3(model, config)
    for scale in d3.frozen_scales:  # see `freeze_norm` of D3Config
        scale.requires_grad_(False)
    optimizer = config.sgd([p for p in model.parameters() if p.requires_grad])
    steps = math.ceil(len(images) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step // steps) / config.epochs))
    )
    training = TrainingArguments(
        output,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // config.gradient_accumulation_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm or 0,
        seed=seed,
        **arguments,
    )
    return D3Trainer(model, training, d3=d3, train_dataset=images, optimizers=(optimizer, schedule))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, run D3, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a transformers image classifier; default: the toy")
    parser.add_argument("--dataset", help="Hub id or folder of clean images; needed with --model")
    parser.add_argument("--trigger", action="append", default=[], help="a known trigger to measure; repeatable")
    parser.add_argument("--samples", type=int, default=600, help="clean images to train on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=2, help="parts a batch is split into to save memory")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.03, help="0.01 is the paper's, for larger sets")
    parser.add_argument("--output", default="toy/detoxed-in-trainer")
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model, options.dataset, trigger = toy.write("toy")
        options.trigger.append(trigger)

    classifier = load_classifier(options.model)
    clean = load_images(options.dataset, labels=classifier.labels, clean_samples=options.samples).clean
    pixels = torch.stack([classifier.preprocessing.prepare(clean.image(i)) for i in range(len(clean))])
    images = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(classifier.preprocessing.normalize(pixels), clean.labels, strict=True)
    ]
    config = D3Config(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        gradient_accumulation_steps=options.accumulation,
    )
    make_trainer(
        classifier.model,
        images,
        config,
        options.output,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ).train()
    classifier.save(options.output)
    for title, model in (("before", options.model), ("after", options.output)):
        measured = evaluate(model, dataset=options.dataset, triggers=options.trigger)
        print(f"{title}: accuracy {measured.accuracy.value:.1%}")
        for name, result in measured.triggers.items():
            print(f"{title}: attack success of {name} {result.attack_success_rate.value:.1%}")


if __name__ == "__main__":
    main()
