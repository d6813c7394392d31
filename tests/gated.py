"""Results of the gate, written by hand: one a verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hfdetox.evaluation.metrics import rate
from hfdetox.evidence.results import ScanResult, ScoreResult, Threshold
from hfdetox.gate_policy import load_policy
from hfdetox.reporting.gate_facts import GatedModel, GateResult, Reason, decide
from tests.written_report import MODEL_COMMIT, written_report

MEASURED = Threshold(3.0, True, 30, "the highest of 30 clean models", rate(1, 60), rate(22, 24))


def scan(finding: str = "no evidence found", **changes: Any) -> ScanResult:
    """Return a scan of 500 images by two scores, with measured error rates."""
    scores = {"latent-shift": ScoreResult([1.0, 2.0, None], 4.2, 1, 0.5, 500, "", MEASURED, "suspicious"),
              "margin": ScoreResult(None, None, None, note="needs more classes")}  # fmt: skip
    values: dict[str, Any] = {
        "finding": finding, "accused": None, "label": None, "why": "two scores agree", "scores": scores,
        "samples": 500, "accuracy": rate(450, 500), "passes": 1000, "seconds": 3.0, "combined": MEASURED,
    }  # fmt: skip
    if finding == "suspicious":
        values |= {"accused": 1, "label": "cat <script>"}
    return ScanResult(**values | changes)


def result(*reasons: Reason, **changes: Any) -> GateResult:
    """Return a gate's result with these reasons."""
    model = GatedModel("org/net", MODEL_COMMIT, "b3" * 32, "resnet18")
    values: dict[str, Any] = {"scan": scan(), "accuracy": rate(450, 500)}
    return GateResult(decide(list(reasons)), list(reasons), model, "org/pictures", "d2" * 20, asdict(load_policy()),
                      **values | changes)  # fmt: skip


def cleaned(*reasons: Reason) -> GateResult:
    """Return the result of a model that hfdetox cleaned, with the numbers of `written_report`."""
    report = written_report()
    assert report.after is not None
    return result(*reasons, base=report.model, accuracy=report.after.accuracy, triggers=report.after.triggers,
                  verified="match", rescan=scan(), output="out")  # fmt: skip
