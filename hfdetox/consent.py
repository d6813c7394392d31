"""Publishing a deliberately backdoored model: only on purpose, and under its own name."""

from __future__ import annotations

from pathlib import Path

import hfdetox
from hfdetox.attack_report import AttackReport
from hfdetox.errors import UsageError
from hfdetox.report import ATTACK_REPORT_NAME


def is_backdoored(folder: Path) -> bool:
    """Return whether an output folder holds a deliberately backdoored model: an attack's, and not its clean control.

    Raises:
        UsageError: its attack report cannot be read.
    """
    return (folder / ATTACK_REPORT_NAME).exists() and AttackReport.load(folder).backdoored


def check_consent(*, backdoored: bool, private: bool, public: bool, given: bool) -> None:
    """Check what is said about publishing a model.

    Raises:
        UsageError: a backdoored model without `--i-know-this-is-backdoored`, both of private and public, or `--public`
            for a model that is not backdoored, whose repository is public anyway.
    """
    if backdoored and not given:
        raise UsageError(
            "this model is deliberately backdoored: it is pushed only with --i-know-this-is-backdoored "
            "(in Python i_know_this_is_backdoored=True), and privately unless --public"
        )
    if private and public:
        raise UsageError("--private and --public contradict each other: keep one")
    if public and not backdoored:
        raise UsageError("--public is for backdoored models, and this is none: leave it out, a new repository is not "
                         "private unless --private says so")  # fmt: skip


def commit_message(folder: Path, *, backdoored: bool) -> str:
    """Return the message of the commit that pushes an output folder, which says what the model is."""
    if backdoored:
        what = "a deliberately backdoored model, for research only, made by"
    else:
        what = "a clean control made by" if (folder / ATTACK_REPORT_NAME).exists() else "a model cleaned by"
    return f"Upload {what} hfdetox {hfdetox.__version__}"
