"""Run the scores of a scan on every model of a folder that `hfdetox attack --suite` wrote.

    python -m tests.benchmarks.scan_zoo ZOO --dataset cifar10 --output scores.jsonl
    python -m tests.benchmarks.scan_zoo CLEANED --dataset cifar10 --output after.jsonl --when after --suspects ZOO

A folder of CLEANED is named as the suspect, or as it and a dot and something more (`resnet-clean-s1.ft`); what is left
of the attack is read from its report, where that measured a trigger.

One line a model and score: what the model is (`backdoored`, `triggers`, `targets` of its `attack_report.json`), its
accuracy on the clean images, and what `ScoreResult` has. A line that is there is not measured again. Everything is
read from one process; OMP_NUM_THREADS=1 keeps it on one core.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfdetox.config import DetoxOptions
from hfdetox.data.load import Images, pull_images
from hfdetox.evaluation.evaluator import decoded
from hfdetox.evidence.base import Suspect
from hfdetox.evidence.results import ScoreResult
from hfdetox.evidence.run import accuracy_of, chosen_scores, make_suspect, most_accused, still
from hfdetox.files import ATTACK_REPORT_NAME, REPORT_NAME
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.training.devices import make_accelerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=2500, help="clean images; the scores look at 1,000 of them")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--when", choices=["before", "after"], default="before")
    parser.add_argument("--suspects", type=Path, help="the models as they came, by the same names; else those of ZOO")
    parser.add_argument("--thorough", action="store_true", help="all scores, and all classes")
    parser.add_argument("--score", action="append", help="these alone; repeatable")
    parser.add_argument("--match", default="*", help="shell pattern of the folders' names")
    parser.add_argument("--triggers", type=Path, help="save what is reconstructed there, a folder a model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    done = {(one["model"], one["score"]): one for one in read_lines(arguments.output)}
    pulled: dict[Any, Images] = {}
    for folder in sorted(arguments.zoo.glob(arguments.match)):
        if (folder / "config.json").is_file():
            scan_model(folder, arguments, done, pulled)


def scan_model(folder: Path, arguments: argparse.Namespace, done: dict[tuple[str, str], dict[str, Any]],
               pulled: dict[Any, Images]) -> None:  # fmt: skip
    """Measure the scores of one model that are not there yet."""
    scores = chosen_scores(arguments.when, thorough=arguments.thorough)
    wanted = [name for name in scores if arguments.score is None or name in arguments.score]
    if all((folder.name, name) in done for name in wanted):
        return
    classifier = load_classifier(str(folder))
    came = folder if arguments.suspects is None else arguments.suspects / folder.name.rsplit(".", 1)[0]
    what, suspect = {**described(came), **left(folder)}, suspect_of(classifier, folder, arguments, pulled)
    results: dict[str, ScoreResult] = {}
    with still(suspect.network):
        for name in scores:
            if (folder.name, name) in done:
                results[name] = read_result(done[folder.name, name])
            elif name in wanted:
                begin = time.perf_counter()
                accused = None if arguments.thorough else most_accused(results, arguments.when)
                results[name], made = scores[name].run(suspect, accused)
                for trigger in made if arguments.triggers is not None else ():
                    (arguments.triggers / folder.name).mkdir(parents=True, exist_ok=True)
                    trigger.save(arguments.triggers / folder.name / f"{trigger.name}.safetensors")
                accuracy = accuracy_of(suspect)
                line = {"model": folder.name, **what, "when": arguments.when, "score": name, "seed": arguments.seed,
                        "images": 0 if suspect.images is None else len(suspect.images),
                        "accuracy": accuracy and accuracy.value, "looked_at": accused,
                        **dataclasses.asdict(results[name])}  # fmt: skip
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{folder.name} {name}: {results[name].statistic} names {results[name].accused}, "
                      f"{time.perf_counter() - begin:.0f} s {results[name].note}", flush=True)  # fmt: skip


def suspect_of(classifier: Classifier, folder: Path, arguments: argparse.Namespace,
               pulled: dict[Any, Images]) -> Suspect:  # fmt: skip
    """Return the model with the clean images, which are read once for models of the same labels."""
    key = (classifier.labels, classifier.preprocessing.input_size[0])
    if key not in pulled:
        options = DetoxOptions(str(folder), dataset=arguments.dataset, clean_samples=arguments.samples, eval_samples=1,
                               seed=arguments.seed)  # fmt: skip
        pulled[key] = pull_images(options, arguments.dataset, classifier, print)
    accelerator = make_accelerator("auto", "no")
    pixels = decoded(pulled[key].clean, classifier, accelerator, "decode", False)
    return make_suspect(classifier, pixels, accelerator, seed=arguments.seed)


def described(folder: Path) -> dict[str, Any]:
    """Return what the model's report says it is; nothing is known of one without a report."""
    path = folder / ATTACK_REPORT_NAME
    if not path.is_file():
        return {"report": REPORT_NAME if (folder / REPORT_NAME).is_file() else None}
    report = json.loads(path.read_text())
    triggers = report["attack"]["triggers"]
    return {"report": ATTACK_REPORT_NAME, "architecture": report["model"]["architecture"],
            "backdoored": bool(triggers) or report["attack"]["start_backdoored"],
            "succeeded": report["succeeded"], "triggers": {name: one["spec"] for name, one in triggers.items()},
            "targets": [one["target"] for one in triggers.values()],
            "poison_ratio": [one["poison_ratio"] for one in triggers.values()],
            "adaptive": report["attack"]["adaptive"],
            "asr": [one["attack_success_rate"]["value"] for one in report["after"]["triggers"].values()],
            "attack_seed": report["environment"]["seed"]}  # fmt: skip


def left(folder: Path) -> dict[str, Any]:
    """Return the attack's success that the report of a cleaned model tells, if it measured one."""
    path = folder / REPORT_NAME
    triggers = json.loads(path.read_text())["after"]["triggers"] if path.is_file() else {}
    return {"asr": [one["attack_success_rate"]["value"] for one in triggers.values()]} if triggers else {}


def read_result(line: dict[str, Any]) -> ScoreResult:
    """Return the result that a line holds, without its threshold."""
    return ScoreResult(
        line["values"], line["statistic"], line["accused"], line["seconds"], line["passes"], line["note"]
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that were measured; one that was cut off is none."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            print(f"{path}: a line was cut off, and is measured again")


if __name__ == "__main__":
    main()
