"""Publishing an output folder: under its own name, a deliberately backdoored model only on purpose."""

import logging
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hfdetox._version import __version__
from hfdetox.config import AnyPublishOptions, AttackOptions
from hfdetox.data.info import DatasetInfo
from hfdetox.errors import HfdetoxError, HubError, UsageError, on_disk, refusing
from hfdetox.evaluation.verdict import describe_loss
from hfdetox.files import ATTACK_REPORT_NAME, REPORT_NAME, SIGNATURE, locked
from hfdetox.hub.download import ask_info
from hfdetox.hub.upload import PushResult, check_repo, is_published, push_folder
from hfdetox.reporting.card import CARD_NAME, DELIBERATE, retarget_card, validate_card
from hfdetox.reporting.card_data import split_card
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.runs.folder import RunFolder, check_output
from hfdetox.runs.manifest import added_files, remove_one, write_own
from hfdetox.runs.signing import require_signing, sign_folder

logger = logging.getLogger(__name__)

# the pictures that show images themselves, not numbers
IMAGE_PICTURES = frozenset(f"plots/{name}.png" for name in ("samples", "reconstructed", "moved", "gallery"))
# what a person may have put beside the model that cannot hold pictures, and texts that can
_WEIGHTS = (".safetensors", ".onnx", ".onnx_data", ".gguf", ".tflite")
_PAGES = (".html", ".htm", ".svg", ".pdf", ".ipynb")
_PUBLISHES = "; --publish-images publishes them"


def check_push_allowed(repo_id: str, *, backdoored: bool = False, **how: bool) -> str:
    """Find out before any work whether `push_output` with these options could succeed; nothing is changed.

    Args:
        how: the options of `AnyPublishOptions`.

    Returns:
        The whole id of the repository: a name alone is the user's own, a moved repository has its new name.

    Raises:
        UsageError: the options do not fit the model (see `push_output`) or the repository.
        HubError: token or network.
    """
    return check_repo(repo_id, **_policy(backdoored, AnyPublishOptions(**how)))


def check_attack_places(options: AttackOptions) -> str | None:
    """Return the whole id of the repository that an attack pushes to, None for none.

    Raises:
        UsageError, HubError: what is in the way of its output or push.
    """
    if options.output is not None:
        check_output(Path(options.output), overwrite=options.overwrite)
    if options.push_to is None:
        return None
    return check_push_allowed(options.push_to, backdoored=not options.clean, **options.publishing())


def push_output(folder: Path, repo_id: str, *, sign: Path | None = None, **how: bool) -> PushResult:
    """Push a folder that hfdetox wrote to any repository, whatever place its card was written for.

    Card and report are changed before anything is sent; the local report names the commit afterwards. A card that was
    edited by hand is pushed as it is, with a warning. A deliberately backdoored model is pushed only with
    `i_know_this_is_backdoored`, into a new private repository or an existing private one; into public ones only with
    `public`, which is refused for other models.

    Args:
        sign: a private key: every file is signed with it. Without it, an earlier signature is left out and removed.
        how: the options of `AnyPublishOptions`.

    Raises:
        UsageError: not such a folder, another process works on it, the repository exists and was not made by hfdetox,
            or the options do not fit.
        RunError: card or report cannot be written.
        HubError: see `push_folder`; the line ends with the command that repeats the push.
    """
    backdoored = is_backdoored(folder)
    options, message = AnyPublishOptions(**how), _commit_message(folder, backdoored=backdoored)
    policy = _policy(backdoored, options)
    omit = _staying(folder, options.publish_images)
    retarget = partial(_retarget, folder, accept=options.accept_accuracy_loss, sign=sign, omit=omit)
    if sign is not None:
        require_signing(sign)
    elif (folder / SIGNATURE).is_file():
        # it would be of other files: those that name another repository
        logger.warning("%s is removed: sign again with --sign KEY", folder / SIGNATURE)
        remove_one(folder, SIGNATURE)
    with locked(RunFolder.beside(folder.absolute()).path, f"the output {folder}"):
        try:
            pushed = push_folder(folder, repo_id, message=message, retarget=retarget, omit=omit, **policy,
                                 verify_upload=not options.no_verify_upload)  # fmt: skip
        except HubError as error:
            command = push_command(folder, repo_id, sign=sign, **how)
            raise type(error)(f"{error}; the folder is whole, push it with `{command}`") from error
        report = load_report(folder)
        write_own(folder, report.NAME, replace(report, output=replace(report.output, commit=pushed.commit)).to_json())
        if sign is not None:
            _sign(folder, sign, omit)  # what is here knows the commit
    return pushed


def _staying(folder: Path, publish: bool) -> frozenset[str]:
    """Return the files with pictures of images that stay here, and say which do, and which do not.

    hfdetox's own go where anybody may see the dataset. What somebody put into the folder (a page of `hfdetox report`,
    a gallery, another run) may be of other images.
    """
    own = sorted(name for name in IMAGE_PICTURES if (folder / name).is_file())
    added = [name for name in added_files(folder) if is_published(name) and _may_show_images(folder, name)]
    if publish:
        _say("pictures of images are published, as --publish-images says", own + added)
        return frozenset()
    dataset = load_report(folder).dataset
    public = bool(own) and _is_public(dataset)
    if public:
        _say(f"pictures of images are published, for {dataset.id} is public", own)
    else:
        _say(f"pictures of images stay here, for {dataset.id} is no public dataset of the Hub", own, _PUBLISHES)
    _say("files that may show images stay here, for hfdetox did not put them into the folder", added, _PUBLISHES)
    return frozenset([*(() if public else own), *added])


def _say(what: str, names: Sequence[str], advice: str = "") -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        logger.warning("%s: %s%s%s", what, ", ".join(names[:8]), more, advice)


def _may_show_images(folder: Path, name: str) -> bool:
    """Return whether a file that somebody added may hold pictures: all but weights and plain text."""
    if name.endswith(_WEIGHTS):
        return False
    with on_disk(f"read {folder / name}"):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
    try:
        return name.lower().endswith(_PAGES) or "\0" in content.decode()
    except UnicodeDecodeError:
        return True


def _is_public(dataset: DatasetInfo) -> bool:
    """Return whether anybody may see the images, at the commit that was used, without asking for it."""
    if dataset.source != "hub" or dataset.revision is None:
        return False
    try:
        found = ask_info(dataset.id, f"dataset {dataset.id}", repo_type="dataset", revision=dataset.revision)
    except HfdetoxError:
        return False
    return found.private is False and found.gated is False


def push_command(folder: Path, repo_id: str, *, sign: Path | None = None, **options: bool) -> str:
    """Return the command line that pushes `folder` with the options of `push_output`."""
    flags = ["--" + name.replace("_", "-") for name, on in options.items() if on]
    signed = [] if sign is None else ["--sign", str(sign)]
    return shlex.join(["hfdetox", "push", str(folder), repo_id, *flags, *signed])


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


def _sign(folder: Path, key: Path, omit: Iterable[str]) -> None:
    sign_folder(folder, key, omit=omit)
    write_own(folder, SIGNATURE, (folder / SIGNATURE).read_text(encoding="utf-8"))


def _retarget(folder: Path, repo_id: str, *, accept: bool, sign: Path | None, omit: Iterable[str]) -> list[str]:
    """Make card and report name `repo_id`, sign, and return the names; nothing is written where they do already.

    UsageError for a model that was rejected for its accuracy, unless that is accepted.
    """
    report = load_report(folder)
    if isinstance(report, Report) and report.rejected and not accept:
        raise UsageError(f"{folder} was rejected: {describe_loss(report.rejected)}; it is pushed only with "
                         "--accept-accuracy-loss (in Python accept_accuracy_loss=True)")  # fmt: skip
    try:
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder / CARD_NAME} cannot be read ({error}); name a whole output folder") from error
    plots = [path.relative_to(folder).as_posix() for path in sorted((folder / "plots").glob("*.png"))]
    with refusing(f"{folder / report.NAME} is not a report that a card can be made of"):
        # an earlier push may have left the pictures of images out
        here = [retarget_card(card, report, repo_id=report.output.pushed_to, plots=shown)
                for shown in (plots, [name for name in plots if name not in IMAGE_PICTURES])]  # fmt: skip
        there = retarget_card(card, report, repo_id=repo_id, plots=[name for name in plots if name not in omit])
    if card != there and card in here:
        validate_card(there)
        write_own(folder, CARD_NAME, there)
    elif card != there:
        logger.warning("%s is not word for word what this hfdetox wrote: it is pushed as it is, look whether it names "
                       "%s", folder / CARD_NAME, repo_id)  # fmt: skip
    # a commit cannot hold its own id
    addressed = replace(report, output=replace(report.output, pushed_to=repo_id, commit=None))
    if addressed != report:
        write_own(folder, report.NAME, addressed.to_json())
    if sign is None:
        return [CARD_NAME, report.NAME]
    _sign(folder, sign, omit)
    return [CARD_NAME, report.NAME, SIGNATURE]


def _policy(backdoored: bool, how: AnyPublishOptions) -> dict[str, Any]:
    """Return what the Hub's room is to do, a model to hide included; UsageError for options that do not fit it."""
    if backdoored and not how.i_know_this_is_backdoored:
        raise UsageError("this model is deliberately backdoored: it is pushed only with --i-know-this-is-backdoored "
                         "(in Python i_know_this_is_backdoored=True), and privately unless --public")  # fmt: skip
    if how.private and how.public:
        raise UsageError("--private and --public contradict each other: keep one")
    if how.public and not backdoored:
        raise UsageError("--public is for backdoored models, and this is none: leave it out, a new repository is not "
                         "private unless --private says so")  # fmt: skip
    return {"private": how.private, "create_pr": how.create_pr, "overwrite": how.overwrite,
            "hidden": backdoored and not how.public}  # fmt: skip


def _commit_message(folder: Path, *, backdoored: bool) -> str:
    """Return the message of the commit that pushes an output folder, which says what the model is."""
    if backdoored:
        what = "a deliberately backdoored model, for research only, made by"
    else:
        what = "a clean baseline made by" if (folder / ATTACK_REPORT_NAME).exists() else "a model cleaned by"
    return f"Upload {what} hfdetox {__version__}"
