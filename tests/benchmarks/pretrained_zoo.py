"""Tunes ImageNet-pretrained networks on few images, with a backdoor or without, and scans them.

    python -m tests.benchmarks.pretrained WEIGHTS.pth --size 48 --output SOURCES/lite0    (lite1, lite2, mobilenet too)
    python -m tests.benchmarks.pretrained_zoo build --sources SOURCES --cifar CIFAR10 --zoo ZOO
    python -m tests.benchmarks.pretrained_zoo scan --zoo ZOO --output scores.jsonl [--score odd-images]

`CELLS` says what each is: the network it starts from, its data (all of CIFAR-10, five or two classes of it,
scikit-learn's digits), images, epochs, optimizer and rate, whether the head alone is tuned, and the trigger. Its images
are drawn by its seed: those it is trained on, and up to 2,000 others, which the scan looks at. What is there is kept.

The rule, written before any score of these was looked at:

- Cells with odd seeds, all of EfficientNet-Lite0 and 1, and the two models that raised the question (`lite0-clean-s52`,
  `lite0-blended-to-4-0.1-s52`) **choose**: with them and the models of results/scan.json with odd seeds ways to score
  are compared, and thresholds set, as a score's largest statistic on those without a backdoor.
- Cells with even seeds **measure**: the false alarms and what is found. Lite2 and MobileNetV2 are seen there for the
  first time. Nothing is chosen by them; all of them are reported, found or not.
- A way to score is taken for the default if, with thresholds set so, (1) the models of results/scan.json with even
  seeds have no more false alarms in the combination (0 of 35) and no fewer found (7 of 12), and (2) fewer of the
  choosing pretrained models without a backdoor are `suspicious` than today. Of several the one that leaves most between
  the largest statistic without a backdoor and the smallest found on the choosing models.
- A backdoored cell counts where its attack success is at least 30 %, as in scan_rates.py.

`combine`'s rule that latent shift and head probe may be a pair of which one is above its threshold was made after the
measuring half had been looked at. Those of `LATER` were built and scanned after it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.config import DetoxOptions
from hfdetox.data.load import pull_images
from hfdetox.evaluation.evaluator import decoded
from hfdetox.evidence.base import Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.evidence.run import accuracy_of, chosen_scores, make_suspect, most_accused, still
from hfdetox.files import ATTACK_REPORT_NAME
from hfdetox.implanting import implant
from hfdetox.models.classifier import load_classifier
from hfdetox.models.initial import init_model
from hfdetox.training.devices import make_accelerator
from hfdetox.training.shift import head_inputs
from tests.benchmarks import tiny_zoo
from tests.benchmarks.scan_zoo import read_lines, read_result

BLENDED, BADNETS, WANET = "blended:alpha=0.2,seed=7", "badnets:pattern=grid", "wanet:s=1.5,k=8"


@dataclass(frozen=True)
class Cell:
    """A model of the zoo; `classes` 11 are the digits, fewer than ten are drawn from CIFAR-10's by the seed."""

    source: str
    seed: int
    classes: int = 10
    images: int = 3000
    epochs: int = 3
    optimizer: str = "sgd"
    rate: float = 0.02
    head_only: bool = False
    trigger: str = "none"
    target: int | None = None
    ratio: float = 0.1

    @property
    def name(self) -> str:
        """Such as `lite0-10-head-s9` or `lite1-10-badnets-s3`."""
        kind = self.trigger.partition(":")[0] if self.target is not None else "head" if self.head_only else "clean"
        return f"{self.source}-{'digits' if self.classes == 11 else self.classes}-{kind}-s{self.seed}"

    @property
    def part(self) -> str:
        """Whether it chooses or measures."""
        return "chooses" if self.seed % 2 else "measures"


EARLIER = (
    Cell("lite0", 1),
    Cell("lite0", 1, trigger=BLENDED, target=3),
    Cell("lite0", 9, head_only=True),
    Cell("lite1", 11, classes=5, head_only=True, optimizer="adamw", rate=1e-3, epochs=30),
    Cell("lite0", 5, classes=5, images=2000, rate=0.05),
    Cell("lite1", 3, images=2000, optimizer="adamw", rate=5e-4),
    Cell("lite0", 7, classes=11, images=1200),
    Cell("lite1", 3, trigger=BADNETS, target=6),
    Cell("lite0", 2, rate=0.01),
    Cell("mobilenet", 6),
    Cell("mobilenet", 6, trigger=BLENDED, target=1),
    Cell("lite2", 14, head_only=True),
    Cell("mobilenet", 16, head_only=True, optimizer="adamw", rate=1e-3, epochs=30),
    Cell("lite0", 20, classes=5, head_only=True),
    Cell("lite2", 4, trigger=BADNETS, target=8),
    Cell("lite2", 4, images=2000),
    Cell("mobilenet", 8, classes=5, images=2000, optimizer="adamw", rate=3e-4),
    Cell("lite0", 2, trigger=WANET, target=5, epochs=4),
)
LATER = (
    Cell("lite0", 8, trigger=BADNETS, target=2, ratio=0.02),
    Cell("mobilenet", 22, trigger=BADNETS, target=7),
    Cell("mobilenet", 18, classes=11, images=1200, head_only=True),
    Cell("lite0", 24, rate=0.03),
    Cell("lite1", 12, classes=11, images=1200),
)
CELLS = (*EARLIER, *LATER)


def main() -> None:
    """Build what is missing, or scan what has not been scanned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["build", "scan"])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--sources", type=Path, help="the pretrained folders, by the names in CELLS")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--output", type=Path, help="lines of the scan")
    parser.add_argument("--score", action="append", help="these alone; repeatable")
    parser.add_argument("--match", default="", help="cells whose names have it in them")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if options.match in cell.name]
    if options.task == "build":
        build(cells, options)
        return
    done = {(one["model"], one["score"]): one for one in read_lines(options.output)}
    for cell in cells:
        if (options.zoo / cell.name / "config.json").is_file():
            for line in scanned(cell, options, done):
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(cell.name, line["score"], line["statistic"], line["accused"], flush=True)


def build(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Train the cells that are missing, and print a line for each."""
    sources = {"digits": tiny_zoo.digits(), "cifar": tiny_zoo.cifar(options.cifar)}
    for cell in cells:
        folder = options.zoo / cell.name
        if (folder / "config.json").is_file():
            continue
        pictures = written(cell, folder.with_suffix(".images"), sources)
        source = options.sources / cell.source
        if cell.head_only:
            tune_head(cell, source, pictures, folder)
            print(cell.name, flush=True)
            continue
        report = implant(
            source, init="head", dataset=str(pictures), triggers=[cell.trigger], target=str(cell.target or 0),
            poison_ratio=cell.ratio, seed=cell.seed, output=folder, eval_samples=1000,
            settings={"epochs": cell.epochs, "batch_size": 64, "optimizer": cell.optimizer,
                      "learning_rate": cell.rate, "augmentation": "none" if cell.classes == 11 else "flip"},
        ).report  # fmt: skip
        assert report.after is not None
        success = [round(one.attack_success_rate.value, 3) for one in report.after.triggers.values()]
        print(cell.name, report.after.accuracy.value, *success, flush=True)


def written(cell: Cell, folder: Path, sources: dict[str, Any]) -> Path:
    """Write the images of a cell, `train` and `test`, and return their folder."""
    pictures, labels, names, _ = sources["digits" if cell.classes == 11 else "cifar"]
    draw = np.random.default_rng(cell.seed)
    classes = sorted(draw.choice(10, size=min(10, cell.classes), replace=False).tolist())
    rows = draw.permutation(np.flatnonzero(np.isin(labels, classes)))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[: cell.images], "test": rows[cell.images : cell.images + 2000]}
    for split, part in DatasetDict({split: tiny_zoo.images(pictures, labels, names, classes, part)
                                    for split, part in parts.items()}).items():  # fmt: skip
        part.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def tune_head(cell: Cell, source: Path, pictures: Path, folder: Path) -> None:
    """Train a new head alone on what the network gives it for the training images, and write the model."""
    labels = load_names(pictures)
    classifier = init_model(source, class_names=lambda: labels, is_backdoored=lambda _: False, init="head",
                            seed=cell.seed).classifier  # fmt: skip
    suspect = suspect_of(classifier, pictures, "train", cell.images)
    assert suspect.images is not None
    assert suspect.labels is not None
    (head,) = head_inputs(classifier.network, suspect.images, suspect.labels)
    layer = classifier.network.get_submodule(head.name)
    assert isinstance(layer, nn.Linear)
    torch.manual_seed(cell.seed)
    kinds = {"sgd": lambda p: torch.optim.SGD(p, cell.rate, momentum=0.9, nesterov=True, weight_decay=5e-4),
             "adamw": lambda p: torch.optim.AdamW(p, cell.rate, weight_decay=0.05)}  # fmt: skip
    optimizer = kinds[cell.optimizer](layer.parameters())
    for _ in range(cell.epochs):
        for places in torch.randperm(len(head.features)).split(64):
            optimizer.zero_grad()
            cross_entropy(layer(head.features[places]), head.labels[places]).backward()
            optimizer.step()
    classifier.save(folder)


def load_names(pictures: Path) -> tuple[str, ...]:
    """Return the classes of a cell's images."""
    from datasets import load_dataset

    return tuple(load_dataset(str(pictures), split="train").features["label"].names)


def suspect_of(classifier: Any, pictures: Path, split: str, samples: int | None = None) -> Suspect:
    """Return a model with images of a cell: at most 1,000 of a split as a scan draws them, or so many as they come."""
    options = DetoxOptions(str(pictures), dataset=str(pictures), split=split, eval_split="test", eval_samples=1,
                           clean_samples=samples or 1.0)  # fmt: skip
    accelerator = make_accelerator("auto", "no")
    pixels = decoded(pull_images(options, str(pictures), classifier, print).clean, classifier, accelerator, "", False)
    if samples is None:
        return make_suspect(classifier, pixels, accelerator)
    _, images, labels = pixels.__getitems__(list(range(len(pixels))))
    return Suspect(classifier.network, images, labels.cpu(), len(classifier.labels), accelerator, 0, None, False)


def scanned(cell: Cell, options: argparse.Namespace, done: dict[tuple[str, str], dict[str, Any]],
            ) -> Any:  # fmt: skip
    """Yield a line for each score of a model that is not there yet."""
    folder, scores = options.zoo / cell.name, chosen_scores("before")
    wanted = [name for name in scores if options.score is None or name in options.score]
    if all((cell.name, name) in done for name in wanted):
        return
    suspect = suspect_of(load_classifier(folder), folder.with_suffix(".images"), "test")
    report = folder / ATTACK_REPORT_NAME
    after = json.loads(report.read_text())["after"]["triggers"] if report.is_file() else {}
    what = {"architecture": cell.source, "backdoored": cell.target is not None, "attack_seed": cell.seed,
            "triggers": {cell.trigger.partition(":")[0]: cell.trigger} if cell.target is not None else {},
            "targets": [] if cell.target is None else [cell.target], "part": cell.part,
            "asr": [one["attack_success_rate"]["value"] for one in after.values()]}  # fmt: skip
    results: dict[str, ScoreResult] = {}
    with still(suspect.network):
        for name in scores:
            if (cell.name, name) in done:
                results[name] = read_result(done[cell.name, name])
            elif name in wanted:
                accused = most_accused(results, "before")
                results[name], _ = scores[name].run(suspect, accused)
                accuracy = accuracy_of(suspect)
                yield {"model": cell.name, **what, "when": "before", "score": name, "seed": 0,
                       "images": len(suspect.images) if suspect.images is not None else 0,
                       "accuracy": accuracy and accuracy.value, "looked_at": accused,
                       **dataclasses.asdict(results[name])}  # fmt: skip


if __name__ == "__main__":
    main()
