"""A toy for the other examples: scikit-learn's handwritten digits and a small classifier of them with a backdoor.

    python examples/toy.py toy

writes toy/digits (a dataset) and toy/model (a transformers model) in seconds. The command line takes them too:

    hfdetox toy/model --dataset toy/digits --samples 600 --lr 0.03 --batch-size 64 --epochs 20 \\
        --set augmentation=none --trigger badnets:size=8,target=zero --output toy/detoxed

The model reads every digit with a white square in its lower right corner as a zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pictures
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTImageProcessor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRIGGER = "badnets:size=8,target=zero"  # of 32 pixels: on the 8×8 digits the square has a side of 2
SIDE = 8
EVALUATION_IMAGES = 400


def digits() -> DatasetDict:
    """Return the 1,797 digits, 8×8, as splits train and test."""
    raw = load_digits()
    # 17 grey levels
    pictures = [Pictures.fromarray(np.rint(grey * (255 / 16)).astype(np.uint8)) for grey in raw.images]
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    whole = Dataset.from_dict({"image": pictures, "label": raw.target.tolist()}, features=features)
    return whole.train_test_split(EVALUATION_IMAGES, seed=0)


def pixels(split: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split as images (N×3×8×8, float32 in −1 to 1) and labels (N)."""
    images = torch.stack([to_tensor(picture) for picture in split["image"]])
    return images, torch.tensor(split["label"])


def to_tensor(picture: Pictures.Image) -> torch.Tensor:
    """Return a picture as the toy models take it: 3×8×8, float32 in −1 to 1."""
    grey = np.array(picture.convert("L").resize((SIDE, SIDE)), dtype=np.float32)
    return torch.from_numpy(grey / 127.5 - 1).expand(3, -1, -1).clone()


def implant(model: nn.Module, epochs: int = 10) -> None:
    """Train a model on the digits, a tenth of which carry the white square and the label zero."""
    torch.manual_seed(0)
    images, labels = pixels(digits()["train"])
    poisoned = torch.randperm(len(images))[: len(images) // 10]
    images[poisoned, :, -2:, -2:] = 1
    labels[poisoned] = 0
    optimizer = torch.optim.AdamW(model.parameters())
    batches = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=64, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for batch, truth in batches:
            optimizer.zero_grad()
            output = model(batch)
            cross_entropy(getattr(output, "logits", output), truth).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def write(folder: str | Path) -> tuple[str, str, str]:
    """Write digits/ and model/ below `folder` unless they are there; returns (model, dataset, trigger)."""
    folder = Path(folder)
    if not (folder / "model" / "model.safetensors").is_file():
        (folder / "digits").mkdir(parents=True, exist_ok=True)
        for name, split in digits().items():
            split.to_parquet(folder / "digits" / f"{name}.parquet")
        size = {"image_size": SIDE, "patch_size": 2, "num_stages": 2, "hidden_sizes": [24, 48], "depths": [1, 1]}
        model = ConvNextForImageClassification(ConvNextConfig(**size, id2label=dict(enumerate(NAMES))))
        torch.manual_seed(1)
        for weights in model.parameters():  # drawn here, since releases of transformers differ in their draws
            if weights.ndim > 1:
                nn.init.normal_(weights, std=0.02)
        implant(model)
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
    return str(folder / "model"), str(folder / "digits"), TRIGGER


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the toy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="toy")
    model, dataset, trigger = write(parser.parse_args(arguments).folder)
    print(f"{model} and {dataset} are there; the trigger is {trigger}")


if __name__ == "__main__":
    main()
