"""A finished attack report by hand, for the tests of report, card and publishing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hfdetox.data.info import DatasetInfo
from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Measurement, TriggerResult
from hfdetox.models.info import ModelInfo
from hfdetox.reporting.report import AttackInfo, AttackReport, EnvironmentInfo, Goals, ImplantedTrigger, OutputInfo

LABELS = ("plane", "car", "a `b` [c]")


def attack_report(**changes: Any) -> AttackReport:
    """Return the report of a model with one trigger, `dot`, that succeeded: ASR 19 of 20, ACC 27 of 30."""
    implanted = ImplantedTrigger(
        kind="badnets", spec="badnets:name=dot", mode="native", target=2, file_sha256="f" * 64, poison_ratio=0.1,
        poisoned_images=10, recipe="dirty-label", settings={}, psnr=31.26, max_change=255, changed=1.0,
        cross_accuracy=rate(24, 30),
    )  # fmt: skip
    measured = TriggerResult("badnets", "badnets:name=dot", "native", "f" * 64, 2, rate(19, 20), rate(1, 20))
    report = AttackReport(
        hfdetox_version="0.1.0",
        model=ModelInfo("timm-arch:resnet18", None, "timm", "resnet18", 3, 1000, "float32", None),
        dataset=DatasetInfo("org/data", "plain", "train", "test", "b" * 40, "hub", 100, 30, "c" * 64, "d" * 64, {}),
        attack=AttackInfo(
            triggers={"dot": implanted}, start="scratch", adaptive="sam:rho=2.0,adaptive=true", surrogate=None,
            training={"epochs": 3}, epochs=3, steps=9, seconds=1.5, images_per_second=200.0, precision="no",
            devices=["cpu"], stopped_early=False,
        ),
        before=None, after=Measurement(rate(27, 30), 0.4, {"dot": measured}), goals=Goals(0.9, None), succeeded=True,
        history=[{"phase": "train", "epoch": 1, "loss": 0.5}], output=OutputInfo(weights_sha256="e" * 64),
        environment=EnvironmentInfo("3.11", "2", "1", "5", "1", "5", "cpu", 0, "hfdetox attack timm-arch:resnet18"),
    )  # fmt: skip
    return replace(report, **changes)


def clean_control(**changes: Any) -> AttackReport:
    """Return the report of a model trained the same way without a backdoor."""
    report = attack_report()
    assert report.after is not None
    return replace(
        report, attack=replace(report.attack, triggers={}), after=replace(report.after, triggers={}), **changes
    )
