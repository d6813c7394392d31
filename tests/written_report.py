"""A report written by hand, with intervals that are written down, and a card of it."""

from __future__ import annotations

from hfdetox.data.info import DatasetInfo
from hfdetox.evaluation.results import Destination, Difference, Measurement, Rate, Rating, TriggerResult
from hfdetox.models.info import ModelInfo
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.report import DefenseInfo, EnvironmentInfo, OutputInfo, Report

LABELS = ("plane", "car", "bird|nest")
MODEL_COMMIT, DATA_COMMIT = "a1" * 20, "d2" * 20


def trigger(attack: Rate, robust: Rate, spec: str = "badnets:size=3") -> TriggerResult:
    """Return what was measured of a trigger with target 2, to which most images go."""
    without = Rate(0.03, 12, 400, (0.0156, 0.0518))
    low, high = attack.interval
    excess = Difference(attack.value - without.value, (low - 0.04, high - 0.02))
    return TriggerResult("badnets", spec, "native", None, 2, attack, robust, Rate(0.93, 372, 400, (0.9004, 0.9531)),
                         Destination(2, LABELS[2], attack, without, excess))  # fmt: skip


def written_report(*, triggers: bool = True, library: str = "timm") -> Report:
    """Two triggers with intervals written down, not computed: `badnets` mitigated, `blended` reduced."""
    before = {
        "badnets": trigger(Rate(0.955, 382, 400, (0.9298, 0.9732)), Rate(0.0425, 17, 400, (0.0249, 0.0672))),
        "blended": trigger(Rate(0.8, 320, 400, (0.7574, 0.8381)), Rate(0.19, 76, 400, (0.1527, 0.2319))),
    }
    after = {
        "badnets": trigger(Rate(0.0125, 5, 400, (0.0041, 0.0289)), Rate(0.9, 360, 400, (0.8663, 0.9276))),
        "blended": trigger(Rate(0.35, 140, 400, (0.3033, 0.399)), Rate(0.6, 240, 400, (0.5501, 0.6484))),
    }
    ratings = {
        "badnets": Rating(0.96125, (0.944, 0.977)),
        "blended": Rating(0.715, (0.685, 0.744)),
        "mean": Rating(0.838125, (0.82, 0.856)),
    }
    return Report(
        hfdetox_version="0.1.0",
        model=ModelInfo("someone/net", MODEL_COMMIT, library, "resnet18", 3, 11_173_962, "float16", "b3" * 32),
        dataset=DatasetInfo(
            "org/pictures", "plain", "train", "test", DATA_COMMIT, "hub", 1250, 600, "c4" * 32, "e5" * 32, {}
        ),
        defense=DefenseInfo(
            "d3",
            "paper",
            {"epsilon": 0.1, "layers": ["head"], "nesterov": False},
            ["fc"],
            100,
            1000,
            61.25,
            2040.6,
            "bf16",
            ["cpu"],
            description="D3 fine-tuned the model on 1,250 trusted images while pushing its head away.",
        ),
        before=Measurement(Rate(0.935, 561, 600, (0.9122, 0.9534)), 0.2109, before if triggers else {}),
        after=Measurement(Rate(0.915, 549, 600, (0.8897, 0.936)), 0.2553, after if triggers else {}),
        defense_effectiveness_rating=ratings if triggers else None,
        history=[],
        output=OutputInfo("f6" * 32),
        environment=EnvironmentInfo(
            "3.11.2",
            "2.15.0",
            "1.15.0",
            "5.23.0",
            "1.0.31",
            "5.2.0",
            "cpu",
            7,
            "hfdetox someone/net --dataset org/pictures --seed 7",
        ),
    )


SOURCE = """---
license: other
license_name: house-licence
license_link: LICENSE
tags:
- backdoor-free
---
# Net

A net, see [the licence](LICENSE) and ![curve](img/curve.png). {{ 7 * 7 }} {% raw %}
"""


def card_of(report: Report, source: str | None = None, **options: object) -> str:
    """Return the valid card of a report, below it that of the source model."""
    card = build_card(report, source_card=source, repo_id="me/net-detoxed", labels=LABELS, **options)  # type: ignore[arg-type]
    validate_card(card)
    return card
