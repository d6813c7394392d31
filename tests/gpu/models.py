"""Images and networks of the parts, and how a backdoor gets into them; at toy size digits and a tiny network."""

from __future__ import annotations

import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.attacks import AttackContext, Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.data.images import ImageSet
from hfdetox.data.load import Images, load_images
from hfdetox.evaluation.evaluator import decoded
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.training.batches import ImageSource
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.engine import Engine
from hfdetox.triggers import parse_trigger
from hfdetox.triggers.base import Trigger
from tests.backdoored import NAMES as DIGITS
from tests.backdoored import SIDE as DIGITS_SIDE
from tests.backdoored import write_digits
from tests.gpu.needs import ROOT

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TARGET = 0


def device() -> str:
    """Return the device of the parts."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def bundle() -> Path:
    """Return the bundle's folder."""
    return Path(os.environ.get("GPU_BUNDLE") or ROOT / "build" / "gpu-bundle")


@dataclass(frozen=True)
class Data:
    """The images of a part: CIFAR-10 from the bundle, digits at toy size."""

    toy: bool

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes."""
        return DIGITS if self.toy else CIFAR

    @property
    def side(self) -> int:
        """Height and width of the images."""
        return DIGITS_SIDE if self.toy else 32

    @cached_property
    def folder(self) -> Path:
        """The dataset's folder; RuntimeError where the bundle has no images."""
        if self.toy:
            # gone when the process ends
            self.__dict__["_kept"] = kept = tempfile.TemporaryDirectory()
            write_digits(Path(kept.name) / "digits")
            return Path(kept.name) / "digits"
        folder = bundle() / "cifar10"
        if not folder.is_dir():
            raise RuntimeError(f"no images in {folder}: make gpu-bundle CIFAR10=DIR")
        return folder

    def load(self, clean: int | None, evaluation: int | None = None) -> Images:
        """Return so many clean and evaluation images; None is all there are."""
        return load_images(self.folder, labels=self.labels, clean_samples=clean, eval_samples=evaluation, warn=print)

    def classifier(self, architecture: str, side: int, *, small_stem: bool = False) -> Classifier:
        """Return a seeded timm model for images of a size, a ViT's positions too.

        With `small_stem` a resnetv2 sees small images as PreAct-ResNet does: 3×3 pixels, no stride, no pooling.
        """
        torch.manual_seed(0)
        sized = {"img_size": side} if "vit" in architecture else {}
        model = timm.create_model(architecture, num_classes=len(self.labels), **sized)
        if small_stem:
            conv = nn.Conv2d(3, model.stem.conv.out_channels, 3, padding=1, bias=False)
            model.stem = nn.Sequential(OrderedDict(conv=conv))
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side), "crop_pct": 1.0,
                                "num_classes": len(self.labels), "label_names": list(self.labels)}  # fmt: skip
        return load_classifier(model, labels=self.labels)


@dataclass
class Implanted:
    """A classifier with a backdoor, the trigger as it is in it, and what the training took."""

    classifier: Classifier
    trigger: Trigger
    seconds: float


def implanted(classifier: Classifier, clean: ImageSet, accelerator: Accelerator, spec: str, ratio: float = 0.1, *,
              surrogate: Callable[[], Classifier] | None = None, checkpoints: CheckpointStore | None = None,
              **settings: Any) -> Implanted:  # fmt: skip
    """Train a fresh classifier on `clean` with the trigger of `spec` (`none` for a clean one).

    Args:
        surrogate: gives a clean model, for triggers that are made on one.
        checkpoints: where the training goes on, and keeps its epochs.
        settings: of `TrainingSettings`.
    """
    begin = time.perf_counter()
    classifier.network.to(accelerator.device)
    pixels = decoded(clean, classifier, accelerator, "decode", progress=False)
    implants = []
    needed = None
    if spec != "none":
        trigger = parse_trigger(spec)
        poisoner = poisoner_for(trigger.kind, {})
        # a clean-label attack has no more than the images of its class
        most = float((clean.labels == TARGET).sum()) / len(clean) if poisoner.how == "clean label" else 1.0
        implants = [Implant(trigger, TARGET, min(ratio, most), poisoner)]
        needed = surrogate() if surrogate is not None and poisoner.on_clean_model(trigger) else None
    context = _Context(classifier=classifier, clean=pixels, accelerator=accelerator, from_scratch=True,
                       surrogate=needed, training=TrainingSettings(**settings), checkpoints=checkpoints)  # fmt: skip
    done = run_attack(context, implants)
    return Implanted(classifier, done.implants[0].trigger if done.implants else parse_trigger("badnets"),
                     time.perf_counter() - begin)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Context(AttackContext):
    """A context whose engine keeps checkpoints."""

    checkpoints: CheckpointStore | None = None

    def engine(self, source: ImageSource | None = None) -> Engine:
        return Engine(self.accelerator, source or self.clean, seed=self.seed, checkpoints=self.checkpoints)
