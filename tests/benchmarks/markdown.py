"""What every table of the benchmarks' page is made of: results, and the lines of Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

RESULTS = Path(__file__).parent / "results"
UNKNOWN = "; largest class not measured"
# as papers write them
ATTACKS = {"badnets": "BadNets", "grid": "BadNets", "blended": "Blended", "noise": "Blended", "wanet": "WaNet",
           "lf": "LF", "inputaware": "Input-aware", "sig": "SIG", "ssba": "SSBA", "none": "none (clean)",
           "blended-adaptive": "Blended, SAM", "noise-adaptive": "Blended, SAM"}  # fmt: skip


def read(name: str) -> Any:
    """Return the JSON of a result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def exists(name: str) -> bool:
    """Tell whether there is a result of a name."""
    return (RESULTS / f"{name}.json").is_file()


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    """Return the lines of a Markdown table; all but the first columns are numbers, and stand to the right."""
    line = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return [f"| {' | '.join(cells)} |" for cells in (header, line, *rows)]


def source(*names: str) -> list[str]:
    """Return the lines that say who made the numbers, and the commands that repeat them."""
    made = read("made")
    lines = []
    for name in names:
        result = read(name)
        asked = f"; {len(result['rows'])} of the suite's {result['asked']} runs" if "asked" in result else ""
        # the first results did not name it
        named = result.get("hfdetox_version", result.get("hfdetox"))
        version = named if isinstance(named, str) else "0.1.0"
        # of a bench and of the demo; other results have no column for it
        known = "largest_share" in result.get("columns", ["largest_share"])
        known = known and all("largest_class" in run for run in result.get("runs", []))
        asked += "" if known else UNKNOWN
        lines += ["", f"*hfdetox {version}, {made[name]}{asked}:* `{result['command']}`"]
    return lines


def percent(value: float | None) -> str:
    """Return a fraction in percent with one decimal, a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def arrow(*values: float) -> str:
    """Return fractions before and after."""
    return " → ".join(map(percent, values))


def with_interval(values: Sequence[float]) -> str:
    """Return a mean over seeds in percent with half of its 95 % interval (Student's t), alone for one seed."""
    if len(values) == 1:
        return percent(values[0])
    half = float(stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{percent(float(np.mean(values)))} ± {100 * half:.1f}"
