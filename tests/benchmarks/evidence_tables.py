"""The tables of what can be known without the trigger: scores, their errors, and each backdoored model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hfdetox.evaluation.metrics import rate
from tests.benchmarks.markdown import exists, percent, read, source, table

WORDS = {"grid": "BadNets", "noise": "Blended", "wanet": "WaNet", "lf": "LF", "inputaware": "Input-aware", "sig": "SIG",
         "ssba": "SSBA"}  # fmt: skip
NOT_RUN = ["Not run."]


def _counted(found: list[int]) -> str:
    """Return counts as a share with its interval."""
    if not found[1]:
        return "–"
    one = rate(*found)
    return f"{found[0]} of {found[1]} ({100 * one.interval[0]:.0f}–{100 * one.interval[1]:.0f} %)"


def scan() -> list[str]:
    """Return threshold, false alarms, detections and seconds of each score and of all together."""
    if not exists("scan"):
        return NOT_RUN
    rows = []
    for name, one in read("scan")["scores"].items():
        seconds = " to ".join(f"{value:.0f}" for value in one["seconds"][0]) if one["seconds"] else "–"
        limit = "–" if one["threshold"] is None else f"{one['threshold']:.3g}"
        rows.append([f"`{name}`" if one["seconds"] else "all together", limit, str(one["models"]),
                     _counted(one["false_alarms"]), _counted(one["found"]), seconds])  # fmt: skip
    header = ["score", "threshold", "from models", "false alarms", "found", "seconds"]
    return [*table(header, rows), *source("scan")]


def models() -> list[str]:
    """Return what the scores said of each backdoored model of the half that gives the rates."""
    if not exists("scan"):
        return NOT_RUN
    found = read("scan")
    names = [name for name, one in found["scores"].items() if one["seconds"]]
    rows = [_model(one, names, found["scores"]) for one in found["models"]
            if one["backdoored"] and one["half"] == "rates"]  # fmt: skip
    return table(["model", "attack", "ASR", *(f"`{name}`" for name in names), "together"], rows, text_columns=2)


def _model(one: dict[str, Any], names: list[str], scores: dict[str, Any]) -> list[str]:
    parts = one["model"].split("-")
    kind = parts[0]
    attack = WORDS[next(part for part in parts if part in WORDS)]
    attack += ", all to all" if "all-to-all" in one["model"] else ""
    attack += ", SAM" if "sam_" in one["model"] else ""
    attack += " at 1 %" if "-0.01-" in one["model"] else ""
    cells = []
    for name in names:
        value = one["statistics"].get(name)
        above = value is not None and value > scores[name]["threshold"]
        named = one["accused"].get(name)
        wrong = above and named is not None and one["targets"] != ["all-to-all"] and named not in one["targets"]
        said = "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0e}"
        cells.append(f"**{said}**{' (wrong class)' if wrong else ''}" if above else said)
    counted = "" if one["counts"] else "*"
    return [kind, attack + counted, percent(one["asr"][0]), *cells, one["verdict"]]


TABLES: dict[str, Callable[[], list[str]]] = {"scan": scan, "scan_models": models}
