"""hfdetox: pull an image classifier, fine-tune a backdoor away, measure what that did, publish the result."""

import importlib
from typing import TYPE_CHECKING, Any

from hfdetox import logging as logging
from hfdetox._version import __version__

if TYPE_CHECKING:
    from hfdetox.data.load import load_images
    from hfdetox.defenses.auto import D3Config
    from hfdetox.defenses.d3 import D3
    from hfdetox.detox import DetoxResult, detoxify, evaluate
    from hfdetox.errors import HfdetoxError, HubError, RunError, UsageError
    from hfdetox.gating import gate
    from hfdetox.implanting import AttackResult, implant
    from hfdetox.models.classifier import Classifier, load_classifier
    from hfdetox.reporting.report import AttackReport, Report
    from hfdetox.scanning import scan
    from hfdetox.verifying import Verification, verify

_HOMES = {
    "detoxify": "detox", "evaluate": "detox", "DetoxResult": "detox",
    "scan": "scanning",
    "implant": "implanting", "AttackResult": "implanting", "AttackReport": "reporting.report",
    "load_classifier": "models.classifier", "Classifier": "models.classifier",
    "load_images": "data.load",
    "gate": "gating",
    "verify": "verifying", "Verification": "verifying",
    "D3": "defenses.d3", "D3Config": "defenses.auto",
    "Report": "reporting.report",
    "HfdetoxError": "errors", "RunError": "errors", "UsageError": "errors", "HubError": "errors",
}  # fmt: skip

__all__ = [
    "D3", "AttackReport", "AttackResult", "Classifier", "D3Config", "DetoxResult", "HfdetoxError", "HubError", "Report",
    "RunError", "UsageError", "Verification", "__version__", "detoxify", "evaluate", "gate", "implant",
    "load_classifier", "load_images", "scan", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `hfdetox --help` must not pay for them
    if name not in _HOMES:
        raise AttributeError(f"module 'hfdetox' has no attribute {name!r}")
    if _HOMES[name] in ("implanting", "detox", "models.classifier", "gating", "scanning", "verifying"):
        from hfdetox.reporting.environment import check_torchvision

        # timm and transformers would die of a mismatch with a traceback that does not say what to do
        check_torchvision()
    return getattr(importlib.import_module(f"hfdetox.{_HOMES[name]}"), name)
