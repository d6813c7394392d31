"""D3 inside `transformers.Trainer`, with gradient accumulation and mixed precision as Trainer offers them.

    python examples/d3_in_trainer.py
    python examples/d3_in_trainer.py --model google/vit-base-patch16-224 --dataset ILSVRC/imagenet-1k \\
        --samples 5000 --epochs 100 --lr 0.01 --batch-size 256 --output vit-detoxed

Without --model the toy of toy.py is used (written to ./toy). The model must be one of transformers.

What Trainer does otherwise than hfdetox's engine, and what is left to you: see `hfdetox.integrations.trainer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import toy
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hfdetox import D3, D3Config, evaluate, load_classifier, load_images
from hfdetox.integrations import D3Trainer


def make_trainer(
    model: nn.Module, images: Dataset, config: D3Config, output: str, *, seed: int = 0, **arguments: Any
) -> D3Trainer:
    """Return a Trainer that does what hfdetox's engine does with `config` (but for augmentation) in one process.

    `images` gives {"pixel_values", "labels"}; `arguments` are more TrainingArguments. D3 remembers the weights that
    `model` has now: load the backdoored ones first.
    """
    training = TrainingArguments(
        output,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // config.gradient_accumulation_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm or 0,
        seed=seed,
        **arguments,
    )
    return D3Trainer(model, training, d3=D3(model, config), train_dataset=images)


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
