"""The Python API in ten lines: clean a model, read the numbers, save it and push it to the Hub.

    python examples/python_api.py
    python examples/python_api.py user/model --dataset uoft-cs/cifar10 --trigger badnets \\
        --samples 2500 --epochs 100 --lr 0.01 --batch-size 256 --augmentation auto \\
        --push-to user/model-detoxed

Without a model the toy of toy.py is used (written to ./toy). Pushing needs a token (`hf auth login` or HF_TOKEN) and
goes to the Hub that HF_ENDPOINT names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import toy

from hfdetox import D3Config, detoxify


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the API."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="Hub id or folder; default: the toy")
    parser.add_argument("--dataset", help="Hub id or folder of clean images; default: the one the model's card names")
    parser.add_argument("--trigger", action="append", default=[], help="a known trigger to measure; repeatable")
    parser.add_argument("--samples", type=int, default=600, help="clean images to train on")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.03, help="0.01 is the paper's, for larger sets")
    parser.add_argument("--augmentation", default="none", help="auto mirrors as well, which spoils digits")
    parser.add_argument("--output", default="toy/detoxed-python-api")
    parser.add_argument("--push-to", help="repository that the result goes to, private when it is new")
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model, options.dataset, trigger = toy.write("toy")
        options.trigger.append(trigger)

    config = D3Config(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        augmentation=options.augmentation,
    )
    result = detoxify(
        options.model, dataset=options.dataset, clean_samples=options.samples, defense=config, triggers=options.trigger
    )
    before, after = result.report.before, result.report.after
    print(f"accuracy: {before.accuracy.value:.1%} before, {after.accuracy.value:.1%} after")
    for name, trigger in after.triggers.items():
        was, now = before.triggers[name].attack_success_rate, trigger.attack_success_rate
        print(
            f"attack success of {name}: {was.value:.1%} before, {now.value:.1%} after ({now.successes}/{now.samples})"
        )
    print(f"saved: {result.save(options.output, overwrite=True)}")
    if options.push_to:
        print(f"pushed: {result.push_to_hub(options.push_to, private=True).url}")


if __name__ == "__main__":
    main()
