"""The paper's setting on CIFAR-10, attack by attack, as far as the time goes; another call goes on where it stopped.

PreAct-ResNet18's size (timm's resnetv2_18 with a 3×3 stem, 11.2 million parameters) at 32 pixels; SGD, batches of 128,
100 epochs, 10 % of the training images poisoned. Every defense gets 2,500 clean images (5 % of CIFAR-10) and 100
epochs; `d3:auto` chooses its own. Rates are of the test split. The backdoored models, and the epochs of one in
training, stay in a folder beside the bundle: a call on the same machine needs no attack twice. Finished rows are taken
from the output file, or from tests/benchmarks/results.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hfdetox.data.load import Images
from hfdetox.defenses import parse_defense
from hfdetox.errors import RunError
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator
from hfdetox.evaluation.metrics import Predictions, defense_effectiveness_rating
from hfdetox.models.classifier import Classifier
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.triggers import load_trigger
from tests.gpu.models import TARGET, Data, bundle, implanted
from tests.gpu.needs import ROOT
from tests.gpu.report import BEGIN, Report, arguments_of, machine

# those that need a clean model, which is trained for them, come last
ATTACKS = {"badnets": "badnets", "blended": "blended", "wanet": "wanet:mode=input", "inputaware":
           "inputaware:mode=input", "sig": "sig", "ssba": "ssba", "lf": "lf"}  # fmt: skip
DEFENSES = ("d3:paper", "d3:auto", "ft", "ft-sam")
RESULT = ROOT / "tests" / "benchmarks" / "results" / "gpu_paper.json"
# seconds between two checkpoints, which take a fifth of an epoch to write
KEEP_EVERY = 20.0


class RareStore(CheckpointStore):
    """Keeps an epoch now and then, so that the training does not wait for the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept = time.monotonic()

    def save(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        if time.monotonic() - self.kept > KEEP_EVERY:
            super().save(tensors, record)
            self.kept = time.monotonic()


@dataclass(frozen=True)
class Paper:
    """The setting, and its models in a folder."""

    data: Data
    folder: Path

    @property
    def epochs(self) -> int:
        """Of an attack and of a defense."""
        return 5 if self.data.toy else 100

    @cached_property
    def everything(self) -> Images:
        """All training images, and the test split."""
        return self.data.load(None, 100 if self.data.toy else None)

    @cached_property
    def trusted(self) -> Images:
        """The clean images, and the test split."""
        return self.data.load(200 if self.data.toy else 2500, 100 if self.data.toy else None)

    def accelerator(self) -> Accelerator:
        """Return the Accelerator of a run; oneDNN's bf16 gives NaN gradients of kernels wider than the image."""
        return make_accelerator(precision="no" if self.data.toy else "auto")

    def network(self) -> Classifier:
        """Return the network, not trained."""
        toy = self.data.toy
        return self.data.classifier("test_resnet" if toy else "resnetv2_18", self.data.side, small_stem=not toy)

    def clean_model(self) -> Classifier:
        """Return a model without a backdoor, which triggers may be made on; a fifth of the epochs is enough for it."""
        weights, classifier = self.folder / "clean.safetensors", self.network()
        if not weights.is_file():
            # within an attack's: its Accelerator has a state of its own
            with accelerate_state_kept():
                implanted(
                    classifier, self.everything.clean, self.accelerator(), "none", epochs=max(1, self.epochs // 5)
                )
            _write(classifier, weights)
        classifier.model.load_state_dict(load_file(weights))
        return classifier

    def attacked(self, attack: str) -> Path:
        """Return the folder of an attack's model, trained now if it is not there."""
        place, store = self.folder / attack, self.folder / f"{attack}-training"
        if not (place / "trigger.safetensors").is_file():
            place.mkdir(parents=True, exist_ok=True)
            with accelerate_state_kept():
                made = implanted(self.network(), self.everything.clean, self.accelerator(), ATTACKS[attack],
                                 surrogate=self.clean_model, epochs=self.epochs,
                                 checkpoints=RareStore(store) if attack in _CONTINUED else None)  # fmt: skip
            _write(made.classifier, place / "model.safetensors")
            (place / "seconds.json").write_text(json.dumps(made.seconds), encoding="utf-8")
            replace(made.trigger, target=TARGET).save(place / "trigger.safetensors")
            shutil.rmtree(store, ignore_errors=True)
        return place

    def run(self, report: Report, attack: str, wanted: list[str]) -> None:
        """Attack, and add a row for every defense that is wanted."""
        place = self.attacked(attack)
        seconds = json.loads((place / "seconds.json").read_text(encoding="utf-8"))
        trigger, before = load_trigger(place / "trigger.safetensors"), None
        for name in wanted:
            with accelerate_state_kept():
                classifier, accelerator = self.network(), self.accelerator()
                classifier.model.load_state_dict(load_file(place / "model.safetensors"))
                evaluator = prepare_evaluator(classifier, self.trusted.evaluation, [trigger], accelerator,
                                              target=str(TARGET), warn=print, progress=False)  # fmt: skip
                before = before or evaluator.measure("before")
                try:
                    found = self.defend(name, classifier, evaluator, before)
                except RunError as error:
                    found = {"error": str(error)}
                report.add(attack=attack, defense=name, attack_seconds=round(seconds, 1), **found)

    def defend(self, name: str, classifier: Classifier, evaluator: Evaluator, before: Predictions) -> dict[str, Any]:
        """Clean a model; returns its rates before and after, and what the defense took."""
        # what `auto` chooses itself is its own
        settings = {} if name == "d3:auto" and not self.data.toy else {"epochs": str(self.epochs)}
        config, _ = parse_defense(name, settings)
        pixels = decoded(self.trusted.clean, classifier, evaluator.accelerator, "decode", progress=False)
        record = Engine(evaluator.accelerator, pixels).run(classifier.network, config.phases(classifier.network))
        rates = [_rates(predictions) for predictions in (before, evaluator.measure("after"))]
        accuracy, success, robust = zip(*rates, strict=True)
        return {"accuracy": accuracy, "attack_success": success, "robust_accuracy": robust,
                "der": defense_effectiveness_rating(accuracy, success), "epochs": record.epochs,
                "seconds": round(record.seconds, 1), "precision": record.precision}  # fmt: skip


# an attack of several trainings keeps its checkpoints in the last alone
_CONTINUED = frozenset(ATTACKS) - {"ssba", "lf"}


def _rates(predictions: Predictions) -> tuple[float, float, float]:
    measured = predictions.measurement
    [trigger] = measured.triggers.values()
    return measured.accuracy.value, trigger.attack_success_rate.value, trigger.robust_accuracy.value


def _write(classifier: Classifier, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in classifier.model.state_dict().items()
    }
    save_file(weights, path)


def main() -> None:
    """Run what is not done yet, until the time is up: a part that is over its limit is ended."""
    arguments = arguments_of(__doc__)
    data = Data(arguments.toy)
    report = Report(arguments.output, "make gpu PART=paper", keep=True)
    if not report.found["rows"] and RESULT.is_file() and not data.toy:
        report.put(rows=json.loads(RESULT.read_text(encoding="utf-8"))["rows"])
    report.put(**machine())
    # not in the output, which is small
    paper = Paper(data, bundle().with_name("gpu-models"))
    report.put(training_images=len(paper.everything.clean), clean_images=len(paper.trusted.clean), epochs=paper.epochs)
    for attack in ("badnets", "sig") if data.toy else ATTACKS:
        done = {row["defense"] for row in report.found["rows"] if row["attack"] == attack}
        wanted = [name for name in DEFENSES if name not in done]
        if wanted and time.monotonic() - BEGIN < arguments.seconds:
            paper.run(report, attack, wanted)


if __name__ == "__main__":
    main()
