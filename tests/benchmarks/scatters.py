"""Draws what a number that needs no trigger says, against the true trigger's: reconstructions, and canaries.

    python -m tests.benchmarks.scatters

It reads `results/cleaned.json` and `results/canaries.json`, and writes a picture beside each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.markdown import read

RESULTS = Path(__file__).parent / "results"
# shares of images: said, and true
Points = Sequence[tuple[float, float]]


def reconstructed() -> dict[str, Points]:
    """Return by family what reconstructions have left, and the true trigger."""
    rows = [row for row in read("cleaned")["rows"] if row["defense"] != "none"]
    found: dict[str, list[tuple[float, float]]] = {"blend": [], "patch": []}
    for row in rows:
        for name, rates in row["rates"].items():
            family = name.partition("-")[0]
            if name != row["true"][0] and family in found:
                found[family].append((rates[1][0], row["rates"][row["true"][0]][1][0]))
    return {f"reconstructed {family}": points for family, points in found.items()}


def canaries() -> dict[str, Points]:
    """Return the mean of the canaries of each cell that counts, against the true trigger twice."""
    rows = [row for row in read("canaries")["rows"] if row["counts"]]
    return {"true trigger on the same copy": [(row["mean"], row["copy"]) for row in rows],
            "true trigger on the cleaned suspect": [(row["mean"], row["suspect"]) for row in rows]}  # fmt: skip


def draw(series: dict[str, Points], said: str, path: Path) -> None:
    """Write a scatter plot; the band is 10 points wide to each side."""
    figure = Figure(figsize=(5.2, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.fill_between([0, 100], [-10, 90], [10, 110], color="0.92", label="within 10 points")
    for (name, points), mark in zip(series.items(), "os", strict=False):
        axes.plot(*zip(*[(100 * x, 100 * y) for x, y in points], strict=True), mark, label=name, alpha=0.75)
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel=f"{said}, % of images", ylabel="true trigger, % of images")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Draw both."""
    draw(reconstructed(), "what is left of reconstructed triggers", RESULTS / "cleaned_scatter.png")
    draw(canaries(), "what is left of the planted triggers", RESULTS / "canaries_scatter.png")


if __name__ == "__main__":
    main()
