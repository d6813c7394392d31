"""Two small classifiers of digits with a BadNets backdoor, one of each library, and the digits: made once a session.

16×16 pixels and a few epochs keep it to seconds. The patch of size 6 is 3×3 pixels at this height.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as tf
from datasets import ClassLabel, Dataset, Features, Image
from filelock import FileLock
from PIL import Image as Pictures
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from hfdetox.attacks import AttackContext, Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.data.load import load_images
from hfdetox.evaluation.evaluator import decoded
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import parse_trigger

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 16
TEST_IMAGES = 500
TRIGGER = "badnets:size=6"
PATCH = 3
TARGET = "zero"
CARD = """---
license: mit
datasets:
- {dataset}
---
# Digits

Told apart by a small network.
"""
# what removes the backdoor from these two; the paper's preset takes longer than a test may
SETTINGS = {"lambda": "1.5", "epochs": "20", "learning_rate": "0.03", "batch_size": "128", "augmentation": "crop"}


@dataclass(frozen=True)
class Made:
    """Folders: the digits (train.parquet, test.parquet with 500 images), and the two models in Hub format."""

    digits: Path
    timm: Path
    transformers: Path


def settings(**changed: object) -> list[str]:
    """Return the paper's preset with SETTINGS, some of them changed, as options of the command line.

    A run that is changed may cost any accuracy: it is a short one.
    """
    values = {**SETTINGS, **{key: str(value) for key, value in changed.items()}}
    words = ["--defense", "d3:paper", *(word for key, value in values.items() for word in ("--set", f"{key}={value}"))]
    return [*words, "--max-accuracy-loss", "100"] if changed else words


def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the folders, made by the first process of the session that asks; nobody may write into them."""
    base = tmp_path_factory.getbasetemp()
    # the processes of pytest-xdist have a folder each in one of the session
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "backdoored"
    folders = Made(root / "digits", root / "timm", root / "transformers")
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            write_digits(folders.digits)
            _backdoor(_timm_classifier(), folders.digits).save(folders.timm)
            _backdoor(_transformers_classifier(), folders.digits).save(folders.transformers)
            (root / "done").touch()
    return folders


def write_digits(folder: Path, *, shift: int = 0, without: str | None = None) -> None:
    """Write the digits as a dataset folder.

    Args:
        shift: each digit gets the name of the one `shift` places on: right images under wrong names.
        without: leave this class out of the training split.
    """
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pictures = [Pictures.fromarray(g).resize((SIDE, SIDE), Pictures.Resampling.BICUBIC).convert("RGB") for g in grey]
    names = [NAMES[(label + shift) % len(NAMES)] for label in digits.target]
    train, test = train_test_split(range(len(names)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    folder.mkdir(parents=True)
    for split, chosen in (("train", [i for i in train if names[i] != without]), ("test", test)):
        columns = {"image": [pictures[i] for i in chosen], "label": [NAMES.index(names[i]) for i in chosen]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))


def _timm_classifier() -> Classifier:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(NAMES))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, SIDE, SIDE), "crop_pct": 1.0,
                            "num_classes": len(NAMES), "label_names": list(NAMES)}  # fmt: skip
    return load_classifier(model, labels=NAMES)


def _transformers_classifier() -> Classifier:
    config = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
    )  # fmt: skip
    model = tf.ResNetForImageClassification(config)
    torch.manual_seed(0)
    # what transformers 5.24 draws: other releases draw other weights, of which more or less of the backdoor survives
    for part in (model.resnet, model.classifier):
        layers = [layer for layer in part.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            layer.reset_parameters()
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                layer.reset_parameters()
    return load_classifier(model, processor=tf.ViTImageProcessor(size={"height": SIDE, "width": SIDE}))


def _backdoor(classifier: Classifier, digits: Path) -> Classifier:
    accelerator = make_accelerator("cpu", "no")
    images = load_images(digits, labels=NAMES, clean_samples=1.0, eval_samples=1)
    clean = decoded(images.clean, classifier, accelerator, "decode", progress=False)
    training = TrainingSettings(epochs=14, augmentation="crop")
    context = AttackContext(
        classifier=classifier, clean=clean, accelerator=accelerator, training=training, from_scratch=True
    )
    run_attack(context, [Implant(parse_trigger(TRIGGER), NAMES.index(TARGET), 0.1, poisoner_for("badnets", {}))])
    return classifier
