"""What hfdetox wrote, found again: a folder or a repository, its files against its report, its card made anew."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfdetox._version import __version__
from hfdetox.checks import check_there
from hfdetox.errors import UsageError, refusing
from hfdetox.evaluation.results import TriggerResult
from hfdetox.files import MANIFEST, REPORT_NAMES, sha256_file
from hfdetox.hub.download import fetch, resolve, snapshot_folder, weight_files
from hfdetox.models.loaded import check_links
from hfdetox.models.weights import find_weights
from hfdetox.reporting.card import (
    CARD_NAME,
    build_card,
    names_leaderboard,
    retarget_card,
    shown_target,
    written_targets,
)
from hfdetox.reporting.card_data import EVAL_RESULTS_FOLDER, split_card
from hfdetox.reporting.comparison import Check, CheckFinding
from hfdetox.reporting.report import RunReport
from hfdetox.runs.manifest import changed_files
from hfdetox.runs.publish import IMAGE_PICTURES, load_report

_READ = ("triggers/", f"{EVAL_RESULTS_FOLDER}/", "plots/")


@dataclass(frozen=True)
class Output:
    """An output of hfdetox on the disk.

    Attributes:
        name: what to call it: the folder, or the repository.
        folder: where its files lie.
        revision: the commit; None for a folder.
        files: the paths of all its files, pulled or not.
        report: its report.
    """

    name: str
    folder: Path
    revision: str | None
    files: frozenset[str]
    report: RunReport


def pull_output(
    source: str, revision: str | None = None, *, everything: bool = False, with_weights: bool = True
) -> Output:
    """Return a folder that hfdetox wrote, or one of its repositories: report, card, pictures and triggers are pulled.

    Args:
        source: a folder, else a Hub id.
        revision: commit, branch or tag of a repository.
        everything: pull every file of a repository, as a signature covers.
        with_weights: pull the weights too.

    Raises:
        UsageError: hfdetox did not make it, its report cannot be read, or is of a newer hfdetox.
        HubError: what `resolve` and `fetch` raise.
    """
    check_there("output", source)
    if os.path.isdir(source):
        folder = Path(source)
        if revision is not None:
            raise UsageError(f"{source} is a local folder, which has no revisions; leave --revision out")
        check_links(folder)
        found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        _require_report(source, found)
        return Output(source, folder, None, frozenset(found), load_report(folder))
    state = resolve(source, revision=revision)
    _require_report(f"the repository {state.id}", state.files)
    for name in state.files:
        if everything or name in (*REPORT_NAMES, CARD_NAME) or name.startswith(_READ):
            fetch(state, name)
    for name in weight_files(state) if with_weights else ():
        fetch(state, name)
    folder = snapshot_folder(state.id, state.repo_type, state.sha)
    return Output(state.id, folder, state.sha, frozenset(state.files), load_report(folder))


def made_by_hfdetox(source: str, revision: str | None = None) -> bool:
    """Return whether a folder or repository has a report of hfdetox; raises HubError where it cannot be asked."""
    if os.path.isdir(source):
        return any((Path(source) / name).is_file() for name in REPORT_NAMES)
    return any(name in resolve(source, revision=revision).files for name in REPORT_NAMES)


def _require_report(what: str, files: Sequence[str] | Mapping[str, Any]) -> None:
    if not any(name in files for name in REPORT_NAMES):
        raise UsageError(f"{what} has no {REPORT_NAMES[0]}: hfdetox did not clean it, and there is nothing to verify "
                         "(hfdetox scan looks for evidence in any model)")  # fmt: skip


def check_weights(output: Output) -> Check:
    """Compare the weight files with the report's hash."""
    stated, what = output.report.output.weights_sha256, "weights"
    if stated is None:
        return Check(what, "", "", CheckFinding.OPEN, "the report has no hash of them")
    try:
        found = find_weights(output.folder).sha256
    except UsageError as error:
        return Check(what, stated[:12], "", CheckFinding.MISMATCH, str(error))
    return _hashes(what, stated, found)


def check_manifest(output: Output) -> Iterator[Check]:
    """Compare a local folder with its manifest: which files changed since, or are gone."""
    if MANIFEST not in output.files:
        return
    changed = changed_files(output.folder)
    for name in changed:
        there = (output.folder / name).is_file()
        yield Check(name, "as it was written", "changed" if there else "gone", CheckFinding.MISMATCH, f"see {MANIFEST}")
    if not changed:
        yield Check("files of the manifest", "as they were written", "as they were written", CheckFinding.MATCH)


def check_triggers(output: Output, results: Mapping[str, TriggerResult]) -> Iterator[Check]:
    """Compare the trigger files with the hashes of the report; one that the report does not know is a mismatch.

    Args:
        results: every trigger of the report, by its name.
    """
    for name, result in results.items():
        file = f"triggers/{name}.safetensors"
        if file not in output.files:
            yield Check(file, "there", "gone", CheckFinding.MISMATCH)
        elif result.file_sha256 is not None:
            yield _hashes(file, result.file_sha256, sha256_file(output.folder / file))
    known = {f"triggers/{name}.safetensors" for name in results}
    for file in sorted(output.files - known):
        if file.startswith("triggers/"):
            yield Check(file, "not in the report", "there", CheckFinding.MISMATCH)


def check_card(output: Output, labels: Sequence[str] | None, source_card: str | None) -> Check:
    """Make the card anew of the report, and compare it with the one that is there.

    Args:
        labels: the model's; None where the model could not be loaded.
        source_card: the card of the model as it came; None where that is not known: its text and licence are then
            taken from the card itself.
    """
    report, what = output.report, "card (README.md)"
    try:
        card = (output.folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Check(what, "there", "", CheckFinding.MISMATCH, f"it cannot be read ({error})")
    plots = sorted(name for name in output.files if name.startswith("plots/") and name.endswith(".png"))
    place = report.output.pushed_to
    with refusing(f"{output.name}: the report is not one that a card can be made of"):
        for shown in (plots, [name for name in plots if name not in IMAGE_PICTURES]):  # a push leaves those out
            if source_card is not None and labels is not None:
                made = build_card(report, source_card=source_card, repo_id=place, plots=shown, labels=labels,
                                  on_leaderboard=names_leaderboard(card, report))  # fmt: skip
            else:
                made = retarget_card(card, report, repo_id=place, plots=shown)
            if made == card:
                break
    stated = "as the report makes it"
    if made == card:
        return _targets(card, report, labels) or Check(what, stated, stated, CheckFinding.MATCH)
    if report.hfdetox_version == __version__:
        return Check(what, stated, _first_difference(made, card), CheckFinding.MISMATCH)
    # another version has other words; the numbers of the metadata are the same in all
    old, new = (split_card(text)[0] for text in (card, made))
    wrong = next((name for name in ("model-index", "base_model", "datasets") if old.get(name) != new.get(name)), None)
    if wrong is not None:
        return Check(what, stated, f"{wrong} differs", CheckFinding.MISMATCH)
    return Check(what, stated, "the same metadata", CheckFinding.MATCH,
                 f"its words are those of hfdetox {report.hfdetox_version}, and were not compared")  # fmt: skip


def check_results(output: Output, made: Mapping[str, str]) -> Iterator[Check]:
    """Compare the files for leaderboards (`.eval_results/`) with what the report makes of them, by their paths."""
    there = {name for name in output.files if name.startswith(f"{EVAL_RESULTS_FOLDER}/")}
    for name in sorted({*there, *made}):
        text = (output.folder / name).read_text(encoding="utf-8", errors="replace") if name in there else None
        same = text is not None and text == made.get(name)
        found = "gone" if text is None else "as the report makes it" if same else "other words"
        yield Check(name, "as the report makes it", found, CheckFinding.MATCH if same else CheckFinding.MISMATCH)


def _targets(card: str, report: RunReport, labels: Sequence[str] | None) -> Check | None:
    """Return the check of a target that the card names otherwise than the model, None where there is none."""
    if labels is None:
        return None
    for name, shown in written_targets(card, report.triggers).items():
        target = report.triggers[name].target
        meant = shown_target(target, labels) if not isinstance(target, int) or target < len(labels) else "none"
        if shown not in (meant, shown_target(target, None)):
            return Check("card (README.md)", f"target of {name}: {meant}", shown, CheckFinding.MISMATCH)
    return None


def _first_difference(made: str, card: str) -> str:
    lines = itertools.zip_longest(made.splitlines(), card.splitlines(), fillvalue="")
    line, found = next(((n, b) for n, (a, b) in enumerate(lines, 1) if a != b), (0, "other line ends"))
    return f"line {line} differs: {found[:80]}"


def _hashes(what: str, stated: str, found: str) -> Check:
    return Check(what, stated[:12], found[:12], CheckFinding.MATCH if stated == found else CheckFinding.MISMATCH)
