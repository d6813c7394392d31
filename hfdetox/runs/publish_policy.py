"""Publishing a deliberately backdoored model: only on purpose, and under its own name."""

from __future__ import annotations

from pathlib import Path

from hfdetox._version import __version__
from hfdetox.errors import UsageError
from hfdetox.reporting.attack_card import DELIBERATE
from hfdetox.reporting.attack_report import AttackReport
from hfdetox.reporting.card import CARD_NAME
from hfdetox.reporting.card_data import split_card
from hfdetox.reporting.report import ATTACK_REPORT_NAME, REPORT_NAME


def is_backdoored(folder: Path) -> bool:
    """Return whether an output folder holds a deliberately backdoored model: an attack's, and not its clean baseline.

    Raises:
        UsageError: its attack report cannot be read.
    """
    return (folder / ATTACK_REPORT_NAME).exists() and AttackReport.load(folder).backdoored


def comes_backdoored(folder: Path | None) -> bool:
    """Return whether a model's own files, where it has any, say that it is deliberately backdoored.

    An attack's report says it, or, of a model of the Hub, the card's tag; what hfdetox has cleaned is not.

    Raises:
        UsageError: its attack report cannot be read.
    """
    if folder is None:
        return False
    if (folder / ATTACK_REPORT_NAME).exists():
        return is_backdoored(folder)
    card = folder / CARD_NAME
    if (folder / REPORT_NAME).exists() or not card.is_file():
        return False
    tags = split_card(card.read_text(encoding="utf-8", errors="replace"))[0].get("tags")
    return isinstance(tags, list) and DELIBERATE in tags


def check_publish_policy(*, backdoored: bool, private: bool, public: bool, given: bool) -> None:
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
        what = "a clean baseline made by" if (folder / ATTACK_REPORT_NAME).exists() else "a model cleaned by"
    return f"Upload {what} hfdetox {__version__}"
