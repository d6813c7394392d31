"""The tables of what `make gpu` measured: of `gpu_PART.json` in results/, "not run" where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.markdown import ATTACKS, arrow, exists, percent, read, table

NOT_RUN = ["Not run: no GPU was at hand."]
GOAL_SHARE, GOAL_SECONDS, GOAL_TIMES = 0.9, 60, 20
# Wei et al., arXiv 2411.09585, by a note on it: attack success before and after, with the accuracy after D3
PUBLISHED: dict[str, dict[str, float]] = {
    "badnets": {"before": 95.03, "ft": 1.48, "ft-sam": 2.28, "d3:paper": 0.74, "accuracy": 90.77},
    "blended": {"before": 99.92, "ft": 96.11, "ft-sam": 11.61, "d3:paper": 0.22, "accuracy": 92.29},
    "wanet": {"before": 89.73, "ft": 17.10, "ft-sam": 1.31, "d3:paper": 0.04, "accuracy": 93.31},
    "lf": {"before": 99.28, "ft": 78.44, "ft-sam": 6.89, "d3:paper": 1.31, "accuracy": 92.37},
    "inputaware": {"before": 98.26, "ft": 1.72, "ft-sam": 1.54, "d3:paper": 0.06, "accuracy": 92.96},
    "sig": {"before": 98.27, "ft": 2.37, "ft-sam": 0.57, "d3:paper": 0.00, "accuracy": 89.99},
    "ssba": {"before": 97.86, "ft": 74.79, "ft-sam": 3.20, "d3:paper": 0.46, "accuracy": 91.93},
}


def source(name: str) -> list[str]:
    """Return the line that says who made the numbers, on what, and the command that repeats them."""
    found, made = read(name), read("made")
    commit = f", {made[name]}" if name in made else ""
    versions = f"{found['device']}, {found['cores']} CPU cores, torch {found['torch']}"
    return ["", f"*hfdetox {found['hfdetox']}{commit}, {versions}:* `{found['command']}`"]


def checks() -> list[str]:
    """Return how the tests that need a GPU went, and what was compared with the CPU."""
    lines = []
    if exists("gpu_tests"):
        found = read("gpu_tests")
        counts = ", ".join(f"{count} {name}" for name, count in sorted(found.get("counts", {}).items()))
        failed = "".join(f"; `{row['test']}`" for row in found["rows"])
        lines += [f"Tests that need a GPU: {counts or 'none ended'}{failed}.", ""]
    if exists("gpu_correctness"):
        shown = {"worst": "{:.4f}", "apart": "{:.4f}", "largest_difference": "{:.2g}", "why": "{}"}
        rows = []
        for row in read("gpu_correctness")["rows"]:
            passed = {True: "yes", False: "**no**", None: "not run"}[row["passed"]]
            told = [shown[key].format(row[key]) for key in shown if row.get(key) is not None]
            limit = row.get("tolerance", row.get("limit"))
            rows.append([row["check"], passed, ", ".join(told) or "–", "–" if limit is None else f"{limit:g}"])
        lines += [*table(["check", "passed", "found", "limit"], rows, text_columns=2), *source("gpu_correctness")]
    elif lines:
        lines += source("gpu_tests")[1:]
    return lines or NOT_RUN


def speed() -> list[str]:
    """Return images a second and their ratios, network by network."""
    if not exists("gpu_speed"):
        return NOT_RUN
    found, rows = read("gpu_speed"), []
    for row in found["rows"]:
        texts = [row["network"], row["precision"], "yes" if row["compiled"] else "no"]
        if "error" in row:
            rows.append([*texts, "failed", *["–"] * 5])
            continue
        waits = "–" if row["waits"] is None else f"{row['waits']:g}"
        memory = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        rows.append([*texts, f"{row['engine']:,.0f}", percent(row["share"]), waits, memory,
                     percent(row["share_of_bf16_peak"]), f"{row['first_step_seconds']:.1f}"])  # fmt: skip
    header = ["network", "precision", "compiled", "images a second", "of the bare step", "waits a step", "peak, GiB",
              "of the bf16 peak", "first step, s"]  # fmt: skip
    note = [f"{found['side']} pixels, batches of {found['batch']} (a quarter in float32 without TF32); memory beyond",
            f"the images; the peak is a matrix product's, {found['bf16_flops'] / 1e12:.0f} TFLOP/s."]  # fmt: skip
    return [*note, "", *table(header, rows, text_columns=3), *source("gpu_speed")]


def jobs() -> list[str]:
    """Return the seconds from the command to the card."""
    if not exists("gpu_speed") or not read("gpu_speed").get("jobs"):
        return NOT_RUN
    rows = []
    for job in read("gpu_speed")["jobs"]:
        told = ["failed", "–", "–"] if "error" in job else [f"{job['seconds']:.0f}", f"{job['defense_seconds']:.0f}",
                                                            f"{job['epochs']}"]  # fmt: skip
        rows.append([job["network"], f"{job['clean']:,}", f"{job['evaluation']:,}", *told])
    header = ["network", "clean images", "evaluation images", "seconds, command to card", "of these D3", "epochs"]
    return [*table(header, rows), *source("gpu_speed")]


def loop() -> list[str]:
    """Return how much faster than the same method as research code writes it."""
    if not exists("gpu_loop") or "times_faster" not in read("gpu_loop"):
        return NOT_RUN
    found = read("gpu_loop")
    texts = {"training": "training only", "same_evaluations": "the whole job with the same evaluations",
             "research_habit": "… with that code's habit of evaluating both test sets after every epoch"}  # fmt: skip
    rows = [[texts[name], f"{times:.1f} times faster"] for name, times in found["times_faster"].items()]
    rows.append(["DER of that code, and of hfdetox", f"{percent(found['research']['der'])} and "
                 f"{percent(found['hfdetox']['der'])}"])  # fmt: skip
    return [*table(["against D3 as research code writes it", "hfdetox"], rows), *source("gpu_loop")]


def paper() -> list[str]:
    """Return the paper's setting beside its figures."""
    if not exists("gpu_paper") or not read("gpu_paper")["rows"]:
        return NOT_RUN
    found = read("gpu_paper")
    rows = [_paper_row(row) for row in found["rows"]]
    note = f"{found['training_images']:,} training images, {found['clean_images']:,} clean ones, {found['epochs']} " \
           "epochs; ASR and, of D3, ACC as the paper has them."  # fmt: skip
    header = ["attack", "defense", "ACC", "ASR", "RA", "DER", "seconds", "paper: ASR", "paper: ACC"]
    return [note, "", *table(header, rows, text_columns=2), *source("gpu_paper")]


def _paper_row(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [ATTACKS[row["attack"]], f"`{row['defense']}`", "failed", *["–"] * 6]
    published = PUBLISHED[row["attack"]]
    success = f"{published['before']:.1f} → {published[row['defense']]:.1f}" if row["defense"] in published else "–"
    accuracy = f"{published['accuracy']:.1f}" if row["defense"] == "d3:paper" else "–"
    rates = [arrow(*row[key]) for key in ("accuracy", "attack_success", "robust_accuracy")]
    return [ATTACKS[row["attack"]], f"`{row['defense']}`", *rates, percent(row["der"]), f"{row['seconds']:.0f}",
            success, accuracy]  # fmt: skip


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu_checks": checks, "gpu_speed": speed, "gpu_jobs": jobs, "gpu_loop": loop, "gpu_paper": paper,
}  # fmt: skip
