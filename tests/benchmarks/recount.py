"""Count again, without hfdetox, what the table says of the cleaned models: by timm, PIL, NumPy and PyTorch.

    python -m tests.benchmarks.recount --cifar CIFAR10 --zoo ZOO --results defend_zoo.json

Prints for each row whose trigger has a short formula (BadNets, Blended, SIG to one label) the counts of correct and of
attacked images, here and in the table; all 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import Dataset, load_dataset
from PIL import Image

Stamp = Callable[[Image.Image], Image.Image]


def badnets(picture: Image.Image) -> Image.Image:
    """Draw the white 3×3 square in the lower right corner."""
    array = np.array(picture)
    array[-3:, -3:] = 255
    return Image.fromarray(array)


def blended(picture: Image.Image) -> Image.Image:
    """Mix 20 % of the seeded noise in, truncated to whole grey levels."""
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mixed = 0.8 * np.array(picture, dtype=np.float64) + 0.2 * noise.permute(1, 2, 0).numpy()
    return Image.fromarray((mixed + 1e-6).astype(np.uint8))


def sig(picture: Image.Image) -> Image.Image:
    """Add a sine wave of six periods over the width, 40 grey levels high, truncated to whole grey levels."""
    wave = 40 * np.sin(2 * np.pi * 6 * np.arange(picture.width) / picture.width)
    waved = np.clip(np.array(picture, dtype=np.float64) + wave[None, :, None], 0, 255)
    return Image.fromarray(waved.astype(np.uint8))


STAMPS: dict[str, Stamp] = {"badnets": badnets, "blended": blended, "sig": sig}


def answers(folder: Path, pictures: list[Image.Image]) -> list[int]:
    """Return the predicted label indices, by timm's own loading code."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        parts = [torch.stack([transform(p) for p in pictures[i : i + 250]]) for i in range(0, len(pictures), 250)]
        return [label for part in parts for label in model(part).argmax(1).tolist()]


def main() -> None:
    """Count every row of the table again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--cifar", "--zoo", "--results"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    test: Dataset = load_dataset(str(arguments.cifar), split="test")
    pictures, labels = [row.convert("RGB") for row in test[test.column_names[0]]], list(test[test.column_names[1]])
    for row in json.loads(arguments.results.read_text())["rows"]:
        folder = arguments.zoo.with_name(arguments.zoo.name + ".cleaned") / row["setting"] / row["cell"]
        stamp = STAMPS.get(row["trigger"])
        if stamp is None or "all-to-all" in row["cell"] or not folder.exists():
            continue
        correct = sum(int(a == b) for a, b in zip(answers(folder, pictures), labels, strict=True))
        others = [stamp(picture) for picture, label in zip(pictures, labels, strict=True) if label != 0]
        attacked = sum(answer == 0 for answer in answers(folder, others))
        table = [row["after"][key]["successes"] for key in ("accuracy", "attack_success_rate")]
        print(
            json.dumps(
                {
                    "cell": row["cell"],
                    "setting": row["setting"],
                    "correct": [correct, table[0]],
                    "attacked": [attacked, table[1]],
                }
            )
        )


if __name__ == "__main__":
    main()
