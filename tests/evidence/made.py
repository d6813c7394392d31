"""Evidence written by hand, for what shows it."""

from __future__ import annotations

from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Rate
from hfdetox.evidence.results import (
    Agreement,
    ClassShift,
    Evidence,
    ImageGrade,
    Moved,
    Reconstructed,
    Residual,
    ScanResult,
    ScoreResult,
    Threshold,
)
from tests.written_report import LABELS, trigger

MEASURED = Threshold(3.5, True, 8, "the largest of never-backdoored models", Rate(0.05, 1, 20, (0.0013, 0.2487)),
                     Rate(0.9, 18, 20, (0.683, 0.9877)))  # fmt: skip
FILE = "triggers/r.safetensors"
GUESSED = Threshold(5.0, False, 0, "a guess")


def scan(finding: str = "suspicious", *, after: bool = False) -> ScanResult:
    """Return what a scan found of the class `bird|nest`, or that it found nothing."""
    accused = 2 if finding == "suspicious" else None
    scores = {
        "latent-shift": ScoreResult([3.0, 2.9, 0.4], 7.25, 2, 0.5, 1000, "", MEASURED, finding, LABELS[2]),
        "odd-images": ScoreResult(None, None, None, 0.0, 0, "left out: the run is too short for it", GUESSED),
    }
    if after:
        scores["scar"] = ScoreResult([1.0, 1.1, 9.0], 8.5, 2, 0.1, 0, "", GUESSED, "suspicious", LABELS[2])
    return ScanResult(finding, accused, None if accused is None else LABELS[accused], "patch and blend are above",
                      scores, 1000, Rate(0.9, 900, 1000, (0.8797, 0.9179)), 3000, 12.5, MEASURED)  # fmt: skip


def evidence(*, finished: bool = True) -> Evidence:
    """Return the evidence of a run with a reconstructed patch for `bird|nest`, 97.2 % before and 1.8 % after."""
    before = trigger(
        Rate(0.972, 389, 400, (0.9513, 0.9862)), Rate(0.02, 8, 400, (0.0087, 0.039)), "triggers/r.safetensors"
    )
    after = trigger(
        Rate(0.0175, 7, 400, (0.0071, 0.0357)), Rate(0.9, 360, 400, (0.8663, 0.9276)), "triggers/r.safetensors"
    )
    made = Reconstructed("patch", 2, LABELS[2], before, after if finished else None)
    agreement = Agreement(Rate(0.96, 576, 600, (0.9411, 0.9742)),
                          [Moved(1, LABELS[1], Rate(0.1, 20, 200, (0.0622, 0.1502)), 0, LABELS[0])])  # fmt: skip
    grade = ImageGrade(500, 3, 160, 170, Rate(0.9, 450, 500, (0.8703, 0.9249)), 0.0073, 0.012,
                       ["3 have the same pixels as another one"], 0.64)  # fmt: skip
    shifts = [ClassShift(0, LABELS[0], 0.1, -0.3), ClassShift(1, LABELS[1], -0.2, None),
              ClassShift(2, LABELS[2], -7.25, 9.04)]  # fmt: skip
    return Evidence(scan(), scan("no evidence found", after=True) if finished else None,
                    {"reconstructed-patch-2": made}, grade, agreement if finished else None,
                    shifts=shifts if finished else [])  # fmt: skip


def residual() -> Residual:
    """Return the tests of a trigger whose backdoor five triggered images wake."""
    path = [rate(count, 400) for count in (390, 388, 380, 360, 300, 190, 120, 60, 30, 20, 16)]
    return Residual([rate(count, 400) for count in (16, 90, 180, 240, 250, 256)],
                    [rate(count, 400) for count in (16, 20, 24, 26, 28, 30)], path,
                    [rate(count, 600) for count in (560, 561, 562, 560, 558, 560, 562, 563, 560, 561, 562)],
                    [rate(60, 600), rate(470, 600)], 5, 495)  # fmt: skip
