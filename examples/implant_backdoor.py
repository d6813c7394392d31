"""Train a backdoor into a classifier, for research on defenses; look at it, and clean it again.

    python examples/implant_backdoor.py
    python examples/implant_backdoor.py timm-arch:resnet18 --input-size 32 --dataset uoft-cs/cifar10 \\
        --target airplane --trigger blended --epochs 30 --output backdoored

Without a dataset the digits of toy.py are used (written to ./toy). The folder holds the model, its trigger file, a
report, a gallery (plots/gallery.png) and a card whose first line says that the model is deliberately backdoored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import toy

from hfdetox import implant


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the attack and print what the trigger does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="timm-arch:test_resnet", help="timm-arch:NAME, a Hub id or a folder"
    )
    parser.add_argument("--input-size", type=int, default=16, help="image height and width of a timm-arch")
    parser.add_argument("--dataset", help="Hub id or folder; default: the toy's digits")
    parser.add_argument("--trigger", default="badnets:size=8")
    parser.add_argument("--target", default="zero", help="what triggered images are to be taken for")
    parser.add_argument("--poison-ratio", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", default="toy/backdoored")
    options = parser.parse_args(arguments)
    if options.dataset is None:
        _, options.dataset, _ = toy.write("toy")

    result = implant(
        options.model,
        dataset=options.dataset,
        triggers=[options.trigger],
        target=options.target,
        poison_ratio=options.poison_ratio,
        input_size=options.input_size if options.model.startswith("timm-arch:") else None,
        # digits are not to be mirrored
        settings={"epochs": str(options.epochs), "augmentation": "none"},
        output=options.output,
        overwrite=True,
    )
    print(f"accuracy: {result.report.after.accuracy.value:.1%}")
    for name, trigger in result.report.after.triggers.items():
        rate = trigger.attack_success_rate
        print(f"attack success of {name}: {rate.value:.1%} ({rate.successes}/{rate.samples})")
    print("the attack succeeded" if result.succeeded else "the attack did not succeed: train longer, or poison more")
    file = f"{result.output}/triggers/{name}.safetensors"
    print(f"clean it: hfdetox {result.output} --dataset {options.dataset} --trigger {file}")


if __name__ == "__main__":
    main()
