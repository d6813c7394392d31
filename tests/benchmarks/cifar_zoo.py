"""Train the backdoored CIFAR-10 models of the benchmarks: timm and transformers, BadNets and Blended, 10 % poisoned.

    python -m tests.benchmarks.cifar_zoo --cifar DIR --zoo DIR [--epochs 6]

Each model is saved in Hub format as ZOO/LIBRARY-TRIGGER with a `zoo.json` that says how it was made; one that is
there is not trained again. Keep ZOO outside the checkout.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import timm
import torch
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from hfdetox.attacks.poison import PoisonedPixels, train_on
from hfdetox.data import Images, load_images
from hfdetox.devices import make_accelerator
from hfdetox.evaluation import decoded, prepare_evaluation
from hfdetox.models import Classifier, load_classifier
from hfdetox.triggers import parse_trigger

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRIGGERS = ("badnets", "blended")
LIBRARIES = ("timm", "transformers")
TARGET = 0
POISON_RATIO = 0.1


def timm_model(folder: Path) -> Classifier:
    """Save and load a pre-activation ResNet of 1.2 M parameters at 32×32: one bottleneck a stage, stem of stride 2."""
    arguments = {"layers": [1, 1, 1], "channels": [128, 256, 512], "stem_type": "", "bottle_ratio": 0.5}
    model = timm.create_model("resnetv2_50", num_classes=len(NAMES), **arguments)
    own = {"input_size": (3, 32, 32), "crop_pct": 1.0, "num_classes": len(NAMES), "label_names": list(NAMES)}
    statistics = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)}
    model.pretrained_cfg = {**model.pretrained_cfg, **own, **statistics}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return load_classifier(folder)


def transformers_model(folder: Path) -> Classifier:
    """Save and load a ResNet of 0.7 M parameters at 48×48 (its stem has stride 4): one basic block a stage."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 192],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=1.0).save_pretrained(folder)
    return load_classifier(folder)


def build(name: str, images: Images, folder: Path, epochs: int, seed: int) -> None:
    """Train one model of the zoo, measure it and save it to `folder`."""
    library, kind = name.split("-")
    torch.manual_seed(seed)
    scratch = folder.with_name(folder.name + ".start")
    scratch.mkdir(parents=True, exist_ok=True)
    classifier = timm_model(scratch) if library == "timm" else transformers_model(scratch)
    accelerator = make_accelerator()
    trigger = parse_trigger(kind)
    clean = decoded(images.clean, classifier, accelerator, "decode", progress=True)
    poisoned = PoisonedPixels(clean, trigger, ratio=POISON_RATIO, target=TARGET, seed=seed)
    begin = time.perf_counter()
    record = train_on(
        classifier.network, poisoned, accelerator, epochs=epochs, seed=seed, augmentation="crop-flip", progress=True
    )
    evaluation = prepare_evaluation(
        classifier, images.evaluation, [trigger], accelerator, target=str(TARGET), warn=print, progress=True
    )
    measured = evaluation.measure("measure").measurement
    classifier.save(folder)
    success = measured.triggers[kind].attack_success_rate.value
    made = {
        "model": name,
        "parameters": classifier.info.parameters,
        "epochs": epochs,
        "seed": seed,
        "poison_ratio": POISON_RATIO,
        "accuracy": measured.accuracy.value,
        "attack_success_rate": success,
        "seconds": time.perf_counter() - begin,
        "images_per_second": record.images_per_second,
        "precision": record.precision,
    }
    (folder / "zoo.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made))


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images = None
    for name in (f"{library}-{trigger}" for trigger in TRIGGERS for library in LIBRARIES):
        folder = arguments.zoo / name
        if not (folder / "zoo.json").is_file():
            images = images or load_images(arguments.cifar, labels=NAMES, samples=50_000, warn=print)
            build(name, images, folder, arguments.epochs, arguments.seed)


if __name__ == "__main__":
    main()
