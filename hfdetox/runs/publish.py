"""Pushing an output folder: its card and report are made to name the repository, and then the commit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from hfdetox.errors import UsageError
from hfdetox.files import write_atomically
from hfdetox.hub.upload import PushResult, push_folder
from hfdetox.reporting.attack_card import retarget_attack_card
from hfdetox.reporting.attack_report import AttackReport
from hfdetox.reporting.card import CARD_NAME, retarget_card, validate_card
from hfdetox.reporting.report import ATTACK_REPORT_NAME, Report

logger = logging.getLogger("hfdetox")


def push_output(
    folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False,
    public: bool = False, i_know_this_is_backdoored: bool = False,
) -> PushResult:  # fmt: skip
    """Push a folder that hfdetox wrote to any repository, whatever place its card was written for.

    Card and report are changed before anything is sent; the local report names the commit afterwards. A card that was
    edited by hand is pushed as it is, with a warning.

    Raises:
        UsageError: not such a folder, the repository exists and was not made by hfdetox, or a backdoored model
            without `i_know_this_is_backdoored`, or to a public repository without `public` (see `push_folder`).
        RunError: card or report cannot be written.
        HubError: see `push_folder`.
    """
    pushed = push_folder(
        folder, repo_id, private=private, create_pr=create_pr, overwrite=overwrite, public=public,
        i_know_this_is_backdoored=i_know_this_is_backdoored, retarget=lambda repo: _retarget(folder, repo),
    )  # fmt: skip
    report = load_report(folder)
    write_atomically(
        folder / report.NAME, replace(report, output=replace(report.output, commit=pushed.commit)).to_json()
    )
    return pushed


def load_report(folder: Path) -> Report | AttackReport:
    """Read the report of an output folder, of whichever kind; UsageError when it is missing or not one."""
    return AttackReport.load(folder) if (folder / ATTACK_REPORT_NAME).exists() else Report.load(folder)


def _card_for(report: Report | AttackReport, card: str, repo_id: str | None, plots: list[str]) -> str:
    if isinstance(report, AttackReport):
        return retarget_attack_card(card, report, repo_id=repo_id, plots=plots)
    return retarget_card(card, report, repo_id=repo_id, plots=plots)


def _retarget(folder: Path, repo_id: str) -> None:
    """Make card and report name `repo_id`; nothing is written where they do already."""
    report = load_report(folder)
    try:
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / CARD_NAME} cannot be read ({error}); name a whole output folder") from error
    plots = [path.relative_to(folder).as_posix() for path in sorted((folder / "plots").glob("*.png"))]
    here, there = (_card_for(report, card, place, plots) for place in (report.output.pushed_to, repo_id))
    if card == here != there:
        validate_card(there)
        write_atomically(folder / CARD_NAME, there)
    elif card not in (here, there):
        logger.warning(
            "%s is not word for word what this hfdetox wrote: it is pushed as it is, look whether it names %s",
            folder / CARD_NAME,
            repo_id,
        )
    # a commit cannot hold its own id
    addressed = replace(report, output=replace(report.output, pushed_to=repo_id, commit=None))
    if addressed != report:
        write_atomically(folder / report.NAME, addressed.to_json())
