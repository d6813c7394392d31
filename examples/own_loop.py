"""D3 in a plain PyTorch training loop: `detox` below is all there is to it.

    python examples/own_loop.py
    python examples/own_loop.py --model google/vit-base-patch16-224 --dataset ILSVRC/imagenet-1k \\
        --samples 5000 --epochs 100 --lr 0.01 --batch-size 256 --output vit-detoxed

Without --model the toy of toy.py is used (written to ./toy).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import toy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from hfdetox import D3, Classifier, D3Config, evaluate, load_classifier, load_images


def detox(classifier: Classifier, batches: DataLoader, config: D3Config, device: str) -> D3:
    """Train the classifier in place; `batches` gives clean images (N×C×H×W, uint8) and labels (N)."""
    network = classifier.network.to(device).train()  # your own model works as well: D3 needs its logits
    d3 = D3(classifier.model, config)
    for scale in d3.frozen_scales:  # see `freeze_norm` of D3Config
        scale.requires_grad_(False)
    optimizer = config.sgd([p for p in network.parameters() if p.requires_grad])
    schedule = CosineAnnealingLR(optimizer, config.epochs)
    d3.initialize()
    for _ in range(config.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            d3.loss(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            d3.project()
        schedule.step()
    network.eval()
    return d3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, run D3, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an image classifier; default: the toy")
    parser.add_argument("--dataset", help="Hub id or folder of clean images; needed with --model")
    parser.add_argument("--trigger", action="append", default=[], help="a known trigger to measure; repeatable")
    parser.add_argument("--samples", type=int, default=600, help="clean images to train on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.03, help="0.01 is the paper's, for larger sets")
    parser.add_argument("--output", default="toy/detoxed-own-loop")
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model, options.dataset, trigger = toy.write("toy")
        options.trigger.append(trigger)

    torch.manual_seed(0)
    classifier = load_classifier(options.model)
    clean = load_images(options.dataset, labels=classifier.labels, clean_samples=options.samples).clean
    # add your augmentation here: images are uint8, the network normalises them
    images = [classifier.preprocessing.prepare(clean.image(i)) for i in range(len(clean))]
    batches = DataLoader(list(zip(images, clean.labels, strict=True)), batch_size=options.batch_size, shuffle=True)
    config = D3Config(epochs=options.epochs, learning_rate=options.lr)
    detox(classifier, batches, config, "cuda" if torch.cuda.is_available() else "cpu")
    classifier.save(options.output)
    for title, model in (("before", options.model), ("after", options.output)):
        measured = evaluate(model, dataset=options.dataset, triggers=options.trigger)
        print(f"{title}: accuracy {measured.accuracy.value:.1%}")
        for name, result in measured.triggers.items():
            print(f"{title}: attack success of {name} {result.attack_success_rate.value:.1%}")


if __name__ == "__main__":
    main()
