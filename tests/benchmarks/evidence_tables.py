"""The tables of what can be known without the trigger: scores, their errors, and each backdoored model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hfdetox.evaluation.metrics import rate
from tests.benchmarks.markdown import arrow, exists, percent, read, source, table

WORDS = {"grid": "BadNets", "noise": "Blended", "wanet": "WaNet", "lf": "LF", "inputaware": "Input-aware", "sig": "SIG",
         "ssba": "SSBA", "bpp": "BPP", "badnets": "BadNets", "blended": "Blended"}  # fmt: skip
# of networks in scan.json
SORTS = ("from scratch", "pretrained")
KINDS = {"resnet": "ResNet", "convnext": "ConvNeXt", "vit": "ViT", "swin": "Swin", "lite0": "EfficientNet"}
NOT_RUN = ["Not run."]


def _counted(found: list[int]) -> str:
    """Return counts as a share with its interval."""
    if not found[1]:
        return "–"
    one = rate(*found)
    return f"{found[0]} of {found[1]} ({100 * one.interval[0]:.0f}–{100 * one.interval[1]:.0f} %)"


def scan(result: str = "scan") -> list[str]:
    """Return threshold, false alarms, detections and seconds of each score and of all together.

    The rates are those of each kind of network, where there are two.
    """
    if not exists(result):
        return NOT_RUN
    rows, found = [], read(result)["scores"]
    kinds = [kind for kind in SORTS if all(kind in one.get("kinds", {}) for one in found.values())]
    for name, one in found.items():
        seconds = " to ".join(f"{value:.0f}" for value in one["seconds"][0]) if one["seconds"] else "–"
        limit = "–" if one["threshold"] is None else f"{one['threshold']:.3g}"
        rows.append([f"`{name}`" if one["seconds"] else "all together", limit, str(one["models"]),
                     *(_counted(part[what]) for what in ("false_alarms", "found")
                       for part in ([one["kinds"][kind] for kind in kinds] if len(kinds) > 1 else [one])),
                     seconds])  # fmt: skip
    told = [f"{what}, {kind}" if len(kinds) > 1 else what for what in ("false alarms", "found")
            for kind in (kinds if len(kinds) > 1 else [""])]  # fmt: skip
    header = ["score", "threshold", "from models", *told, "seconds"]
    return [*table(header, rows), *source(result)]


def scan_after() -> list[str]:
    """Return the same of the scores after cleaning."""
    return scan("scan_after")


def models() -> list[str]:
    """Return what the scores said of each backdoored model from scratch of the half that gives the rates."""
    if not exists("scan"):
        return NOT_RUN
    found = read("scan")
    names = [name for name, one in found["scores"].items() if one["seconds"]]
    rows = [_model(one, names, found["scores"]) for one in found["models"]
            if one["backdoored"] and one["half"] == "rates" and one.get("kind") != SORTS[1]]  # fmt: skip
    return table(["model", "attack", "ASR", *(f"`{name}`" for name in names), "together"], rows, text_columns=2)


def _model(one: dict[str, Any], names: list[str], scores: dict[str, Any]) -> list[str]:
    parts = one["model"].split("-")
    kind = parts[0]
    attack = WORDS[next(part for part in parts if part in WORDS)]
    attack += ", all to all" if "all-to-all" in one["model"] else ""
    attack += ", SAM" if "sam_" in one["model"] else ""
    attack += " at 1 %" if "-0.01-" in one["model"] else ""
    counted = "" if one["counts"] else "*"
    return [kind, attack + counted, percent(one["asr"][0]), *_said(one, names, scores), one["verdict"]]


def pretrained() -> list[str]:
    """Return what the scores said of each pretrained network, those that gave the thresholds too."""
    if not exists("scan"):
        return NOT_RUN
    found = read("scan")
    models = sorted(filter(_tuned, found["models"]), key=lambda one: (one["half"], one["backdoored"]))
    names = [name for name in found["scores"] if any(name in one["statistics"] for one in models)]
    rows = [[f"`{one['model']}`", one["half"], percent(one["asr"][0]) if one["asr"] else "–",
             *_said(one, names, found["scores"]), one["verdict"]] for one in models]  # fmt: skip
    return table(["model", "gives", "ASR", *(f"`{name}`" for name in names), "together"], rows, text_columns=2)


def _tuned(one: dict[str, Any]) -> bool:
    return bool(one.get("kind") == SORTS[1])


def _said(one: dict[str, Any], names: list[str], scores: dict[str, Any]) -> list[str]:
    """Return the statistics of a model, those above their thresholds bold."""
    cells = []
    for name in names:
        value = one["statistics"].get(name)
        above = value is not None and value > scores[name]["threshold"]
        named = one["accused"].get(name)
        wrong = above and named is not None and one["targets"] != ["all-to-all"] and named not in one["targets"]
        said = "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0e}"
        cells.append(f"**{said}**{' (wrong class)' if wrong else ''}" if above else said)
    return cells


def _attack(cell: str) -> str:
    """Return what the attack of a model of the zoo is called."""
    return WORDS[next(part for part in re.split("[-_]", cell) if part in WORDS)]


def _true(row: dict[str, Any]) -> str:
    return next(name for name in row["rates"] if not name.startswith(("patch-", "blend-")))


def cleaned() -> list[str]:
    """Return the attack success of true and of reconstructed triggers on cleaned models, and how they differ."""
    if not exists("cleaned"):
        return NOT_RUN
    found, rows, pairs = [row for row in read("cleaned")["rows"] if row["defense"] != "none"], [], []
    for row in found:
        true = _true(row)
        cells = []
        for score in ("blend", "patch"):
            made = next((rates for name, rates in row["rates"].items() if name.startswith(f"{score}-")), None)
            cells.append("–" if made is None else arrow(made[0][0], made[1][0]))
        best = max((rates for name, rates in row["rates"].items() if name != true), key=lambda r: r[0][0], default=None)
        if best is not None:
            pairs.append((best[1][0], row["rates"][true][1][0]))
        rows.append([_attack(row["cell"]), f"`{row['defense']}`",
                     arrow(*row["accuracy"]), *(arrow(*pair) for pair in zip(*row["rates"][true], strict=True)),
                     *cells])  # fmt: skip
    header = ["attack", "defense", "ACC", "ASR", "RA", "reconstructed blend", "reconstructed patch"]
    above = np.array([said - true for said, true in pairs])
    rank = spearmanr(*zip(*pairs, strict=True)).statistic
    near, mean = int((abs(above) <= 0.1).sum()), 100 * abs(above).mean()
    most, least = 100 * above.max(), max(0.0, -100 * above.min())
    said = ("Of the reconstruction with the higher rate before, the rate after is within 10 points of the true "
            f"trigger's in {near} of {len(pairs)} rows, {mean:.1f} points apart on average, at most {most:.1f} above "
            f"it and {least:.1f} below it; rank correlation {rank:.2f}.")  # fmt: skip
    return [*table(header, rows, text_columns=2), "", said, *source("cleaned")]


def asleep() -> list[str]:
    """Return the residual tests of the true trigger on cleaned models."""
    if not exists("cleaned"):
        return NOT_RUN
    rows = []
    for row in read("cleaned")["rows"]:
        one = row["residual"][_true(row)]
        attack = _attack(row.get("triggers_of", row["cell"]))
        never = row["defense"] == "none"
        rows.append([f"never backdoored ({attack}'s trigger)" if never else attack,
                     "–" if never else f"`{row['defense']}`",
                     arrow(one["retuned"][0], one["retuned"][-1]), arrow(one["plain"][0], one["plain"][-1]),
                     "–" if never else f"{one['reaches']:.1f}",
                     percent(one["drift"][1]) if never else arrow(*one["drift"])])  # fmt: skip
    header = ["attack", "defense", "re-tuned with 5 triggered images", "re-tuned without", "path: reaches t", "drift"]
    return table(header, rows, text_columns=2)


def canaries() -> list[str]:
    """Return the attack success of planted triggers and of the true one on the same cleaned copies, and the rule."""
    if not exists("canaries"):
        return NOT_RUN
    found, rows = read("canaries"), []
    for row in found["rows"]:
        left = [percent(row["canaries"].get(kind)) for kind in ("patch", "blend", "warp", "few")]
        said = row["mean"]
        rows.append([_attack(row["cell"]) + ("" if row["counts"] else "*"), row["recipe"], arrow(*row["accuracy"][:2]),
                     arrow(*row["true"]), *left, percent(said), percent(row["copy"]),
                     percent(row["suspect"])])  # fmt: skip
    header = ["attack", "recipe", "ACC, planting", "true ASR, planting", "patch", "blend", "warp", "few", "mean",
              "true, same copy", "true, suspect"]  # fmt: skip
    lines = [*table(header, rows, text_columns=2), ""]
    for against, words in (("copy", "on the same copy"), ("suspect", "on the cleaned suspect")):
        one = found["agreement"][against]["mean"]
        if one["near"] is None:
            continue
        near = f"{100 * one['near']:.0f} %"
        lines.append(f"The canaries' mean against the true trigger {words}: within 10 points in {near} of "
                     f"{one['cells']} cells, {100 * one['apart']:.1f} points apart on average, rank correlation "
                     f"{one['rank']:.2f}.")  # fmt: skip
    return [*lines, *source("canaries")]


def _unlearnt(name: str) -> list[str]:
    """Return what defenses made of the models of a zoo, phases alone."""
    return [*unlearnt_table(read(name)["rows"]), *source(name)] if exists(name) else NOT_RUN


def unlearnt_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return runs of `unlearn_zoo.py` as a table, the models without a backdoor last."""
    header = ["model", "attack", "defense", "ACC", "ASR", "RA", "into one class", "passes"]
    return table(header, unlearnt_rows(sorted(rows, key=lambda row: ("clean" in row["cell"], row["cell"]))),
                 text_columns=3)  # fmt: skip


def unlearnt_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of each run."""
    lines = []
    for row in rows:
        before, after = row["before"], row["after"]
        kind, attack = row["cell"].split("-")[0], "none"
        if "two_targets" in row["cell"]:
            attack = f"two targets: {WORDS[after['trigger']]}"
        elif "clean" not in row["cell"]:
            attack = _attack(row["cell"])
        for word, named in (("all-to-all", ", all to all"), ("sam_", ", SAM"), ("shift_", ", hidden"),
                            ("-0.02-", " at 2 %")):  # fmt: skip
            attack += named if word in row["cell"] else ""
        cells = ["–"] * 3
        if "asr" in after:
            cells = [arrow(*(state[key] for state in (before, after))) for key in ("asr", "ra")]
            cells.append(f"{100 * after['share']:.0f} ({100 * after['excess']:+.0f})")
        accuracy = arrow(before["accuracy"], after["accuracy"])
        lines.append([KINDS[kind], attack, f"`{row['arm']}`", accuracy, *cells, f"{row['passes']:,}"])
    return lines


def unlearnt() -> list[str]:
    """Return `unlearn` on some of the models on which it was made."""
    return _unlearnt("unlearn_development")


def held_out() -> list[str]:
    """Return `unlearn`, `d3:auto-1` and plain fine-tuning on models that had no say."""
    return _unlearnt("unlearn_heldout")


def trials() -> list[str]:
    """Return ideas that were tried alone, at the end and on the way back to the suspect's weights."""
    return _tried("unlearn_trials")


def ablation() -> list[str]:
    """Return the same of the defense as it is, with one part left out or changed."""
    return _tried("unlearn_ablation")


def _tried(name: str) -> list[str]:
    if not exists(name):
        return NOT_RUN
    rows = []
    for row in read(name)["rows"]:
        kind, attack = row["cell"].split("-")[0], "none" if "clean" in row["cell"] else _attack(row["cell"])
        attack += ", all to all" if "all-to-all" in row["cell"] else ""
        states = [row["before"], *(row["after"].get(part, {}) for part in ("1", "0.75", "0.5"))]
        ends = [" / ".join(percent(state[key]) if key in state else "–" for key in ("accuracy", "asr", "ra"))
                for state in states]  # fmt: skip
        rows.append([KINDS[kind], attack, row["trial"], *ends])
    header = ["model", "attack", "trial", "before", "after", "¾ of the way", "½ of the way"]
    return ["ACC / ASR / RA.", "", *table(header, rows, text_columns=3), *source(name)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "scan": scan, "scan_after": scan_after, "scan_models": models, "scan_pretrained": pretrained, "cleaned": cleaned,
    "asleep": asleep, "canaries": canaries, "unlearnt": unlearnt, "held_out": held_out, "trials": trials,
    "ablation": ablation,
}  # fmt: skip
