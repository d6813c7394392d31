"""Results that become a folder and a repository: whole or not at all."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from hfdetox.errors import RunError
from hfdetox.files import locked
from hfdetox.hub.upload import PushResult
from hfdetox.logging import is_main_process
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.reporting.card import CARD_NAME, validate_card
from hfdetox.runs.folder import RunFolder, check_output, publish_folder
from hfdetox.runs.manifest import write_manifest
from hfdetox.runs.publish import push_output
from hfdetox.triggers.base import Trigger


class SavedResult(ABC):
    """What a run gives: a report and a model, and the folder they were written to (None before `save`)."""

    report: Any
    classifier: Classifier
    output: Path | None

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Write everything into an empty folder."""

    def _write_model(self, folder: Path, probe: torch.Tensor | None, triggers: Sequence[Trigger]) -> None:
        """Write the model, checked on `probe` as `check_loads` does, and the trigger files."""
        weights = self.classifier.save(folder)
        check_loads(self.classifier, folder, probe)
        self.report = replace(self.report, output=replace(self.report.output, weights_sha256=weights))
        for trigger in triggers:
            (folder / "triggers").mkdir(exist_ok=True)
            trigger.save(folder / "triggers" / f"{trigger.name}.safetensors")

    def _write_card(self, folder: Path, build: Callable[..., str], source_card: str | None, plots: list[str]) -> None:
        """Write the card that `build` makes of the report, if it is valid, and the report."""
        card = build(
            self.report, source_card=source_card, repo_id=self.report.output.pushed_to, plots=plots,
            labels=self.classifier.labels,
        )  # fmt: skip
        validate_card(card)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        self.report.save(folder)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write model, card, report, pictures and triggers to `folder`, which appears complete or not at all.

        Of several processes only the main one writes; the others return at once, with the same path.

        Args:
            overwrite: replace an earlier result of hfdetox; anything else is never replaced.

        Raises:
            UsageError: the folder holds something else.
            RunError: it cannot be written (disk full), or what was written does not give the same logits again.
        """
        folder = Path(folder)
        if not is_main_process():
            self.output = folder
            return folder
        with locked(RunFolder.beside(folder.absolute()).path, f"the output {folder}"):
            check_output(folder, overwrite=overwrite)
            self._place(folder)
        self.output = folder
        return folder

    def _place(self, folder: Path) -> None:
        try:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            fresh = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(4)}")
            # not mkdtemp, whose folders only their owner can read, whatever the umask
            fresh.mkdir()
        except OSError as error:
            raise RunError(
                f"cannot write beside {folder}: {error.strerror or error}; choose another --output"
            ) from error
        try:
            self._write(fresh)
            write_manifest(fresh)
            publish_folder(fresh, folder)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"cannot write {folder}: {reason}; free some space") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _push(self, repo_id: str, **push_options: Any) -> PushResult:
        """Push the saved folder (or a temporary one) as one commit; the local report then names the commit.

        Of several processes only the main one pushes; the others return at once, with an empty commit.
        """
        if not is_main_process():
            return PushResult(repo_id, "", f"{constants.ENDPOINT}/{repo_id}", None)
        saved = self.output
        # what is pushed from memory stays on the disk until it has arrived: the message of a failed push names it
        folder = saved or self.save(Path(tempfile.mkdtemp(prefix="hfdetox-")) / repo_id.rpartition("/")[2])
        pushed = push_output(folder, repo_id, **push_options)
        self.report = replace(
            self.report, output=replace(self.report.output, pushed_to=pushed.repo_id, commit=pushed.commit)
        )
        if saved is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
            self.output = None
        return pushed


@torch.inference_mode()
def check_loads(classifier: Classifier, folder: Path, probe: torch.Tensor | None) -> None:
    """Raise RunError unless the model saved in `folder` gives the logits of the one in memory on `probe` (uint8).

    The numbers in a card are those of the model in memory; they must be those of the file as well. Nothing is
    compared without a probe, or for a module of neither library, which only its author can build.
    """
    if probe is None or classifier.info.library == "torch":
        return
    again = load_classifier(
        folder, preprocessing=classifier.given_preprocessing, labels=classifier.labels,
        trust_remote_code=classifier.trusts_remote_code,
    )  # fmt: skip
    # the model in memory is its caller's: it stays on its device, and every part of it in its mode
    network = classifier.network
    device = next(iter(network.model.parameters()), probe).device
    modes = {part: part.training for part in network.modules()}
    try:
        here = network.eval().to(device)(probe.to(device))
    finally:
        for part, training in modes.items():
            part.training = training
    if not torch.allclose(again.network.to(device)(probe.to(device)), here, rtol=1e-4, atol=1e-4):
        raise RunError("the saved model does not give the logits of the one in memory; nothing was written. "
                       "Report this with the model's id")  # fmt: skip
