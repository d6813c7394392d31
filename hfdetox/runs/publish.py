"""Publishing an output folder: under its own name, a deliberately backdoored model only on purpose."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path

from hfdetox._version import __version__
from hfdetox.errors import HubError, UsageError
from hfdetox.files import ATTACK_REPORT_NAME, REPORT_NAME
from hfdetox.hub.upload import PushResult, check_repo, push_folder
from hfdetox.reporting.card import CARD_NAME, DELIBERATE, retarget_card, validate_card
from hfdetox.reporting.card_data import split_card
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.runs.manifest import write_own

logger = logging.getLogger(__name__)


def check_push_allowed(
    repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False, public: bool = False,
    backdoored: bool = False, i_know_this_is_backdoored: bool = False,
) -> str:  # fmt: skip
    """Find out before any work whether `push_output` with these options could succeed; nothing is changed.

    Returns:
        The whole id of the repository: a name alone is the user's own, a moved repository has its new name.

    Raises:
        UsageError: the options do not fit the model (see `push_output`) or the repository.
        HubError: token or network.
    """
    hidden = _check_policy(backdoored, private=private, public=public, known=i_know_this_is_backdoored)
    return check_repo(repo_id, private=private, create_pr=create_pr, overwrite=overwrite, hidden=hidden)


def push_output(
    folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False,
    public: bool = False, i_know_this_is_backdoored: bool = False,
) -> PushResult:  # fmt: skip
    """Push a folder that hfdetox wrote to any repository, whatever place its card was written for.

    Card and report are changed before anything is sent; the local report names the commit afterwards. A card that was
    edited by hand is pushed as it is, with a warning. A deliberately backdoored model is pushed only with
    `i_know_this_is_backdoored`, into a new private repository or an existing private one; into public ones only with
    `public`, which is refused for other models.

    Args:
        private: make the new repository private; an existing one has to be.
        create_pr: open a pull request on an existing repository.
        overwrite: push into a repository that hfdetox did not make.

    Raises:
        UsageError: not such a folder, the repository exists and was not made by hfdetox, or the options do not fit.
        RunError: card or report cannot be written.
        HubError: see `push_folder`; the line ends with the command that repeats the push.
    """
    backdoored = is_backdoored(folder)
    hidden = _check_policy(backdoored, private=private, public=public, known=i_know_this_is_backdoored)
    try:
        pushed = push_folder(
            folder, repo_id, message=_commit_message(folder, backdoored=backdoored), private=private,
            create_pr=create_pr, overwrite=overwrite, hidden=hidden, retarget=lambda repo: _retarget(folder, repo),
        )  # fmt: skip
    except HubError as error:
        command = push_command(folder, repo_id, private=private, create_pr=create_pr, overwrite=overwrite,
                               public=public, i_know_this_is_backdoored=i_know_this_is_backdoored)  # fmt: skip
        raise type(error)(f"{error}; the folder is whole, push it with `{command}`") from error
    report = load_report(folder)
    write_own(folder, report.NAME, replace(report, output=replace(report.output, commit=pushed.commit)).to_json())
    return pushed


def push_command(folder: Path, repo_id: str, **options: bool) -> str:
    """Return the command line that pushes `folder` with the options of `push_output`."""
    flags = ["--" + name.replace("_", "-") for name, on in options.items() if on]
    return shlex.join(["hfdetox", "push", str(folder), repo_id, *flags])


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


def load_report(folder: Path) -> Report | AttackReport:
    """Read the report of an output folder, of whichever kind; UsageError when it is missing or not one."""
    return AttackReport.load(folder) if (folder / ATTACK_REPORT_NAME).exists() else Report.load(folder)


def _retarget(folder: Path, repo_id: str) -> list[str]:
    """Make card and report name `repo_id`, and return their names; nothing is written where they do already."""
    report = load_report(folder)
    try:
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / CARD_NAME} cannot be read ({error}); name a whole output folder") from error
    plots = [path.relative_to(folder).as_posix() for path in sorted((folder / "plots").glob("*.png"))]
    here, there = (
        retarget_card(card, report, repo_id=place, plots=plots) for place in (report.output.pushed_to, repo_id)
    )
    if card == here != there:
        validate_card(there)
        write_own(folder, CARD_NAME, there)
    elif card not in (here, there):
        logger.warning(
            "%s is not word for word what this hfdetox wrote: it is pushed as it is, look whether it names %s",
            folder / CARD_NAME,
            repo_id,
        )
    # a commit cannot hold its own id
    addressed = replace(report, output=replace(report.output, pushed_to=repo_id, commit=None))
    if addressed != report:
        write_own(folder, report.NAME, addressed.to_json())
    return [CARD_NAME, report.NAME]


def _check_policy(backdoored: bool, *, private: bool, public: bool, known: bool) -> bool:
    """Return whether the model has to be hidden; UsageError for options that do not fit it, or leave something out."""
    if backdoored and not known:
        raise UsageError(
            "this model is deliberately backdoored: it is pushed only with --i-know-this-is-backdoored "
            "(in Python i_know_this_is_backdoored=True), and privately unless --public"
        )
    if private and public:
        raise UsageError("--private and --public contradict each other: keep one")
    if public and not backdoored:
        raise UsageError("--public is for backdoored models, and this is none: leave it out, a new repository is not "
                         "private unless --private says so")  # fmt: skip
    return backdoored and not public


def _commit_message(folder: Path, *, backdoored: bool) -> str:
    """Return the message of the commit that pushes an output folder, which says what the model is."""
    if backdoored:
        what = "a deliberately backdoored model, for research only, made by"
    else:
        what = "a clean baseline made by" if (folder / ATTACK_REPORT_NAME).exists() else "a model cleaned by"
    return f"Upload {what} hfdetox {__version__}"
