"""Any `nn.Module` with a preprocessing function and labels, and a `datasets` object in place of a Hub id.

    python examples/own_module.py
    python examples/own_module.py --samples 300 --epochs 100 --output toy/cnn-detoxed

A small CNN is trained on scikit-learn's digits with a backdoor, then cleaned. For a model of your own, replace
`make_cnn`, `toy.to_tensor`, `toy.NAMES` and `toy.digits`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import toy
from torch import nn

from hfdetox import D3Config, DetoxResult, detoxify


def make_cnn() -> nn.Module:
    """Return a backdoored network that neither timm nor transformers knows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, len(toy.NAMES)),
    )  # fmt: skip
    toy.implant(model)
    return model


def main(arguments: Sequence[str] | None = None) -> DetoxResult:
    """Clean the network and print what that did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600, help="clean images to train on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.03, help="0.01 is the paper's, for larger sets")
    parser.add_argument("--output", help="folder for the cleaned weights, card and report; default: nothing is written")
    options = parser.parse_args(arguments)

    result = detoxify(
        make_cnn(),
        preprocessing=toy.to_tensor,  # from a PIL image to the float tensor the module takes
        labels=toy.NAMES,
        dataset=toy.digits(),
        clean_samples=options.samples,
        triggers=[toy.TRIGGER],
        # "auto" would crop and mirror, and a mirrored digit is another one
        defense=D3Config(epochs=options.epochs, learning_rate=options.lr, batch_size=64, augmentation="none"),
    )
    for title, measured in (("before", result.report.before), ("after", result.report.after)):
        success = measured.triggers["badnets"].attack_success_rate
        print(f"{title}: accuracy {measured.accuracy.value:.1%}, attack success {success.value:.1%}")
    if options.output:
        print(f"saved: {result.save(options.output)}")
    return result


if __name__ == "__main__":
    main()
