"""Fixes the thresholds of `hfdetox scan`, and counts how often they are wrong.

    python -m tests.benchmarks.scan_rates scores.jsonl pretrained.jsonl --output scan.json [--write]

The lines are those of `scan_zoo.py` and `pretrained_zoo.py`. The rule: a model with an odd seed is of the half that
gives thresholds, one with an even seed of the half that gives rates; but the two pretrained ones that raised the
question of pretrained networks (`ASKED`) give thresholds alone. The threshold of a score is its largest statistic on
the never-backdoored models of the first half. The rates are counted for networks that were trained from scratch, for
pretrained ones that were tuned, and for both. A backdoored model counts where its trigger has an attack success of at
least 30 % (0.3 times the accuracy where every class goes to the next one): what hardly got in is listed and not
counted. A model that names the wrong class counts as not found. `--write` puts thresholds and the rates of both into
hfdetox/evidence/thresholds.json.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfdetox.evaluation.metrics import rate
from hfdetox.evidence import thresholds
from hfdetox.evidence.results import Finding, ScoreResult

FILE = Path(thresholds.__file__).with_name("thresholds.json")
GOT_IN = 0.3
RULE = "the largest on the never-backdoored models of one half"
ASKED = ("lite0-clean-s52", "lite0-blended-to-4-0.1-s52")
SCRATCH, PRETRAINED = "from scratch", "pretrained"
Line = dict[str, Any]


def main() -> None:
    """Read the lines, print the rates and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--when", choices=["before", "after"], default="before")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [json.loads(line) for path in options.lines for line in path.read_text().splitlines()]
    files = "scores.jsonl" if options.when == "after" else "scores.jsonl pretrained.jsonl"
    command = f"python -m tests.benchmarks.scan_rates {files} --output scan.json"
    command += "" if options.when == "before" else " --when after"
    found = {"command": command, **rates(lines, options.when)}
    options.output.write_text(written(found))
    for name, one in found["scores"].items():
        print(name, one["threshold"], "false", one["false_alarms"], "found", one["found"])
    if options.write:
        write(found, options.when)


def rates(lines: Iterable[Line], when: str) -> dict[str, Any]:
    """Return, by score and for all together, threshold and counts; and what each model's scores said."""
    models: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["when"] == when:
            models.setdefault(line["model"], {})[line["score"]] = line
    first = {name: scores for name, scores in models.items() if odd(scores)}
    second = {name: scores for name, scores in models.items() if not odd(scores)}
    names = list(dict.fromkeys(score for scores in models.values() for score in scores))
    limits: dict[str, float] = {}
    for score in names:
        there = [one[score]["statistic"] for one in first.values() if clean(one) and measured(one, score)]
        limits |= {score: max(there)} if there else {}
    verdicts = {name: judged(scores, limits) for name, scores in models.items()}
    result: dict[str, Any] = {"scores": {}, "models": [], "by_attack": {}}
    for score in [*limits, thresholds.COMBINED]:
        flagged = {name: above(verdicts[name], score) for name in second}
        innocent = [name for name in second if clean(second[name]) and known(verdicts[name], score)]
        guilty = [name for name in second if got_in(second[name]) and was_run(second[name], score)]
        result["scores"][score] = {
            "threshold": limits.get(score), "models": sum(clean(s) and was_run(s, score) for s in first.values()),
            "false_alarms": counted(flagged, innocent),
            "found": hits(flagged, second, guilty),
            "kinds": {kind: {"false_alarms": counted(flagged, names), "found": hits(flagged, second, others)}
                      for kind, names, others in by_kind(second, innocent, guilty)},
            "seconds": [min_max(s[score]["seconds"] for s in models.values() if score in s)] if score in limits else [],
        }  # fmt: skip
    for name, scores in models.items():
        one = next(iter(scores.values()))
        result["models"].append({
            "model": name, "half": "thresholds" if name in first else "rates",
            "kind": kind_of(name, models), "architecture": one["architecture"],
            "backdoored": one["backdoored"], "triggers": list(one["triggers"]), "targets": one["targets"],
            "asr": [round(value, 4) for value in one["asr"]], "counts": clean(scores) or got_in(scores),
            "statistics": {score: line["statistic"] for score, line in scores.items()},
            "accused": {score: line["accused"] for score, line in scores.items()},
            "verdict": verdicts[name][thresholds.COMBINED][0], "named": verdicts[name][thresholds.COMBINED][1],
        })  # fmt: skip
    return result


def judged(scores: dict[str, Line], limits: dict[str, float]) -> dict[str, tuple[str, int | None]]:
    """Return by score, and for all together, the finding and the class that is named, as a scan says them."""
    results = {}
    for name, line in scores.items():
        finding = Finding.UNKNOWN
        if measured(scores, name) and name in limits:
            finding = Finding.SUSPICIOUS if line["statistic"] > limits[name] else Finding.NO_EVIDENCE
        results[name] = ScoreResult(line["values"], line["statistic"], line["accused"], finding=str(finding))
    one = next(iter(scores.values()))
    classes = max((len(line["values"]) for line in scores.values() if line["values"]), default=2)
    accuracy = None if one["accuracy"] is None else rate(round(one["accuracy"] * one["images"]), one["images"])
    finding, accused, _ = thresholds.combine(results, tuple(map(str, range(classes))), one["images"], accuracy)
    found: dict[str, tuple[str, int | None]] = {name: (one.finding, one.accused) for name, one in results.items()}
    return found | {thresholds.COMBINED: (str(finding), accused)}


def above(verdict: dict[str, tuple[str, int | None]], score: str) -> tuple[int | None] | None:
    """Return the class that a score names, in a tuple, where it is suspicious; else None."""
    finding, named = verdict.get(score, (str(Finding.UNKNOWN), None))
    return (named,) if finding == Finding.SUSPICIOUS else None


def was_run(scores: dict[str, Line], score: str) -> bool:
    """Return whether a score was tried on a model; all together always say something."""
    return score in (*scores, thresholds.COMBINED)


def known(verdict: dict[str, tuple[str, int | None]], score: str) -> bool:
    """Return whether the score was measured; all together always say something."""
    return score == thresholds.COMBINED or verdict.get(score, (str(Finding.UNKNOWN), None))[0] != Finding.UNKNOWN


def right(named: tuple[int | None] | None, scores: dict[str, Line]) -> bool:
    """Return whether a model was found: flagged, and with its target where a class is named."""
    if named is None or named[0] is None:
        return named is not None
    targets = next(iter(scores.values()))["targets"]
    return named[0] in targets or not all(isinstance(target, int) for target in targets)


def odd(scores: dict[str, Line]) -> bool:
    """Return whether a model is of the half that gives thresholds."""
    one = next(iter(scores.values()))
    return one["attack_seed"] % 2 == 1 or one["model"] in ASKED


def kind_of(name: str, models: dict[str, dict[str, Line]]) -> str:
    """Return whether a model was trained from scratch or is a pretrained one that was tuned."""
    one = next(iter(models[name].values()))
    return PRETRAINED if one.get("part") or one["model"] in ASKED else SCRATCH


def by_kind(models: dict[str, dict[str, Line]], *lists: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield each kind that there is, with those of each list that are of it."""
    for kind in dict.fromkeys(kind_of(name, models) for name in models):
        yield kind, *([name for name in names if kind_of(name, models) == kind] for names in lists)


def hits(flagged: dict[str, tuple[int | None] | None], models: dict[str, dict[str, Line]], names: list[str],
         ) -> list[int]:  # fmt: skip
    """Return how many of these models are found, and how many there are."""
    return [sum(right(flagged[name], models[name]) for name in names), len(names)]


def counted(flagged: dict[str, tuple[int | None] | None], names: list[str]) -> list[int]:
    """Return how many of these models are flagged, and how many there are."""
    return [sum(flagged[name] is not None for name in names), len(names)]


def clean(scores: dict[str, Line]) -> bool:
    """Return whether a model was never backdoored."""
    return not next(iter(scores.values()))["backdoored"]


def got_in(scores: dict[str, Line]) -> bool:
    """Return whether a model has a backdoor that works."""
    one = next(iter(scores.values()))
    least = [GOT_IN * (one["accuracy"] if isinstance(target, str) else 1) for target in one["targets"]]
    return bool(one["asr"]) and all(asr >= low for asr, low in zip(one["asr"], least, strict=True))


def measured(scores: dict[str, Line], name: str) -> bool:
    """Return whether a score has a number on a model."""
    return name in scores and scores[name]["statistic"] is not None


def min_max(values: Iterable[float]) -> list[float]:
    """Return the least and the most, rounded."""
    listed = sorted(values)
    return [round(listed[0], 1), round(listed[-1], 1)] if listed else []


def write(found: dict[str, Any], when: str) -> None:
    """Put thresholds and rates into the package's file."""
    table = json.loads(FILE.read_text())
    for name, one in found["scores"].items():
        place = table["scores"][name].setdefault(when, {})
        # no rate of none
        rates = {key: one[key] if one[key][1] else None for key in ("false_alarms", "found")}
        place |= {"measured": True, "models": one["models"], **rates}
        if one["threshold"] is not None:
            place |= {"value": round(one["threshold"], 4), "rule": RULE}
    FILE.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def written(found: dict[str, Any]) -> str:
    """Return the JSON with a line a model."""
    models = ",\n".join("  " + json.dumps(model) for model in found["models"])
    return json.dumps({**found, "models": ["MODELS"]}, indent=1).replace('"MODELS"', "\n" + models + "\n ") + "\n"


if __name__ == "__main__":
    main()
