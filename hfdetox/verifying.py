"""Verifying: what hfdetox published is pulled again, its hashes are checked, and every rate is counted anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from hfdetox.arguments import takes
from hfdetox.config_verify import VerifyOptions
from hfdetox.data.info import DatasetInfo, ImageChoice
from hfdetox.data.labels import LabelMismatchError
from hfdetox.data.load import Images, load_images
from hfdetox.errors import HfdetoxError, UsageError
from hfdetox.evaluation.evaluator import Evaluator, decoded, prepare_evaluator
from hfdetox.evaluation.metrics import BROKEN, Predictions, paired_difference, ratings
from hfdetox.evaluation.results import Measurement
from hfdetox.evidence.claims import find_agreement, grade_images
from hfdetox.evidence.cost import measuring_effort, say_cost
from hfdetox.evidence.run import make_suspect
from hfdetox.hub.download import read_text_file
from hfdetox.models.classifier import Classifier, load_classifier
from hfdetox.reporting.card_data import eval_results
from hfdetox.reporting.comparison import Check, CheckFinding, Comparison, differing_environment
from hfdetox.reporting.environment import describe_environment
from hfdetox.reporting.report import Report, RunReport
from hfdetox.reporting.stated import arithmetic, unchecked
from hfdetox.runs.integrity import (
    Output,
    check_card,
    check_manifest,
    check_results,
    check_triggers,
    check_weights,
    pull_output,
)
from hfdetox.runs.publish import IMAGE_PICTURES
from hfdetox.runs.rescan import (
    base_wanted,
    evidence_of,
    grade_checks,
    images_wanted,
    reconstructed_of,
    recount_effort,
    results_of,
    scan_checks,
    stated_checks,
)
from hfdetox.runs.signing import check_signature
from hfdetox.threads import use_threads
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.triggers import load_trigger
from hfdetox.triggers.base import Trigger

Value = TypeVar("Value")

MATCH: Final = "match"
MISMATCH: Final = "mismatch"
INCOMPLETE: Final = "incomplete"


class OtherRowsError(UsageError):
    """The images that are chosen again are other rows than those of the report."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        source: the folder, or the repository.
        revision: its commit; None for a folder.
        checks: every file and number that was compared.
        missing: what could not be recomputed, and why.
        unchecked: what the report has that is never recomputed, whatever is there.
        differing: in what this machine differs from the report's; while it is empty, counts have to be equal.
        status: the exit status: 0, 1 for a mismatch, else that of the error for which the model's rates could not be
            counted again.
    """

    source: str
    revision: str | None
    checks: list[Check]
    missing: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    status: int = 0

    @property
    def verdict(self) -> str:
        """`match`, `mismatch`, or `incomplete` where the model's own rates could not be counted again."""
        if self.mismatches:
            return MISMATCH
        return INCOMPLETE if self.status else MATCH

    @property
    def mismatches(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.finding is CheckFinding.MISMATCH]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole as plain JSON types."""
        return {"verdict": self.verdict, **asdict(self)}


@takes(VerifyOptions)
@accelerate_state_kept()
def verify(given: VerifyOptions) -> Verification:
    """Check what hfdetox wrote: every hash, the card against the report, and every rate by counting it again.

    Args:
        {arguments}

    Returns:
        Every check. What could not be recomputed (a dataset that is gone, gated, private or local) is among its
        `missing`, with the reason; nothing is raised for it.

    Raises:
        UsageError: hfdetox did not write it, or a newer one did. HubError: it cannot be pulled.
    """
    output = pull_output(str(given.source), given.revision, everything=given.public_key is not None)
    accelerator = make_accelerator(given.device, "no")
    with _threads(output.report.environment.threads):
        return _Verifier(output, given, accelerator).run()


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Compute with as many threads as the report's run did, while inside: sums of another order are other sums."""
    before = torch.get_num_threads()
    use_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Verifier:
    """One verification on the way."""

    def __init__(self, output: Output, options: VerifyOptions, accelerator: Accelerator) -> None:
        self.output, self.options, self.accelerator = output, options, accelerator
        self.report: RunReport = output.report
        self.checks: list[Check] = []
        self.errors: dict[str, HfdetoxError] = {}
        here = describe_environment(accelerator.device, seed=0, command="")
        self.differing = differing_environment(self.report.environment, here)

    def run(self) -> Verification:
        output, report = self.output, self.report
        if self.options.public_key is not None:
            self.checks.append(check_signature(output.folder, self.options.public_key, unpublished=IMAGE_PICTURES))
        self.checks += [check_weights(output), *check_manifest(output), *check_triggers(output, results_of(report))]
        self.checks += arithmetic(report)
        classifier = self._tried("after", self._load_output)
        base = self._tried("before", self._load_base)
        # the card of a folder that was named need not be that of the model as it came
        source_card = base.card_source() or "" if base is not None and base.info.revision is not None else None
        self.checks.append(check_card(output, None if classifier is None else classifier.labels, source_card))
        if classifier is not None:
            self.checks += stated_checks(report, classifier.labels)
        images = None if classifier is None else self._tried("after", partial(self._choose_again, classifier))
        if classifier is not None and images is not None:
            self._check_leaderboards(images)
            self._recount(classifier, base, images)
        elif report.before is not None:
            self.errors.setdefault("before", self.errors["after"])
        missing = {what: str(error) for what, error in self.errors.items()}
        wrong = any(check.finding is CheckFinding.MISMATCH for check in self.checks)
        error = self.errors.get("after")
        status = 1 if wrong else error.exit_status if error is not None else 0
        return Verification(output.name, output.revision, self.checks, missing, unchecked(report), self.differing,
                            status)  # fmt: skip

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Note an error inside as the reason for which something cannot be recomputed."""
        try:
            yield
        except OtherRowsError as error:
            self.checks.append(Check("rows of the images", "as the report has them", "others", CheckFinding.MISMATCH,
                                     str(error)))  # fmt: skip
            self.errors.setdefault(what, error)
        except HfdetoxError as error:
            self.errors.setdefault(what, error)

    def _tried(self, what: str, make: Callable[[], Value]) -> Value | None:
        """Return `make()`, None where it fails, see `trying`."""
        made: list[Value] = []
        with self.trying(what):
            made.append(make())
        return next(iter(made), None)

    def _load_output(self) -> Classifier:
        output = self.output
        return self._load(str(output.folder) if output.revision is None else output.name, output.revision)

    def _load(self, model: str, revision: str | None) -> Classifier:
        return load_classifier(model, revision=revision, trust_remote_code=self.options.trust_remote_code)

    def _load_base(self) -> Classifier | None:
        """Return the model as it came, its weights compared with the report's hash; None where there was none."""
        stated = self.report.model
        if self.report.before is None:
            return None
        if self.options.base is not None:
            base = self._load(str(self.options.base), None)
        elif stated.revision is None:
            raise UsageError(base_wanted(stated.id))
        else:
            base = self._load(stated.id, stated.revision)
        if stated.weights_sha256 is not None:
            found = base.info.weights_sha256 or ""
            same = CheckFinding.MATCH if found == stated.weights_sha256 else CheckFinding.MISMATCH
            self.checks.append(Check("weights of the model as it came", stated.weights_sha256[:12], found[:12], same))
        return base

    def _choose_again(self, classifier: Classifier) -> Images:
        """Return the images that the run measured on.

        Raises:
            OtherRowsError: the report states other rows. UsageError: local images that nobody named. HubError: gone.
        """
        info, given = self.report.dataset, self.options.dataset
        if given is None and info.revision is None:
            raise UsageError(images_wanted(info.id))
        tries = [info.asked] if info.asked else [
            ImageChoice(info.clean_samples, count, allow_missing_classes=True) for count in (None, info.eval_samples)
        ]  # fmt: skip
        for asked in tries:
            for label_map in ({}, info.label_map):
                with contextlib.suppress(LabelMismatchError):
                    images = self._load_images(classifier, asked, label_map)
                    # of an attack's images some are held out of the training
                    trained = isinstance(self.report, Report)
                    for found in filter(None, (images, images.other)):
                        if _is_of(found.info, info, trained=trained):
                            return found
                if not info.label_map:
                    break
        if given is not None:
            raise UsageError(f"{given} does not hold the images of the report: other rows are chosen from it")
        if info.asked is None:
            raise UsageError("a report of an earlier version does not say how its images were chosen, and they are not "
                             "those that its counts alone give")  # fmt: skip
        raise OtherRowsError(f"dataset {info.id} at commit {str(info.revision)[:12]} gives other rows than the report "
                             "states")  # fmt: skip

    def _load_images(self, classifier: Classifier, asked: ImageChoice, label_map: dict[str, str]) -> Images:
        info, given = self.report.dataset, self.options.dataset
        span = ",".join(f"{end:g}" for end in info.pixel_range) if info.pixel_range else None
        return load_images(
            info.id if given is None else given, labels=classifier.labels, aliases=classifier.aliases,
            clean_samples=asked.clean_samples, eval_samples=asked.eval_samples,
            dataset_config=info.config if given is None else None, split=info.split, eval_split=info.eval_split,
            image_column=asked.image_column, label_column=asked.label_column,
            revision=info.revision if given is None else None,
            label_map={name: label or None for name, label in label_map.items()} or None,
            seed=self.report.environment.seed, channels=classifier.preprocessing.input_size[0],
            allow_missing_classes=asked.allow_missing_classes,
            pixel_range=asked.pixel_range if self.report.dataset.asked else span, hub_only=given is None,
        )  # fmt: skip

    def _check_leaderboards(self, images: Images) -> None:
        info = self.report.dataset
        if isinstance(self.report, Report) and info.revision is not None and self.options.dataset is None:
            stated = read_text_file(info.id, "eval.yaml", info.revision, "dataset")
            self.checks += check_results(self.output, eval_results(self.report, stated, whole_split=images.whole_split))

    def _recount(self, classifier: Classifier, base: Classifier | None, images: Images) -> None:
        """Count every rate of the report again, as far as the models, the images and the trigger files are there."""
        report = self.report
        if classifier.network.convolutional:
            # as the training left it: the same sums in another order of memory are others
            classifier.network.to(memory_format=torch.channels_last)
        evaluation = prepare_evaluator(classifier, images.evaluation, [], self.accelerator, target=None,
                                       warn=lambda _: None, progress=self.options.progress)  # fmt: skip
        for trigger in self._triggers():
            with self.trying(f"trigger {trigger.name}"):
                evaluation = evaluation.with_triggers([*(view.trigger for view in evaluation.views), trigger])
        effort = recount_effort(report, measuring_effort(evaluation), based=base is not None)
        say_cost(evaluation, "counting again", effort, progress=self.options.progress)
        counts = np.bincount(images.evaluation.labels.numpy(), minlength=len(classifier.labels)).tolist()
        comparison = Comparison(not self.differing, counts)
        after = self._compare("after", report.after, evaluation, comparison)
        if report.uncorrected is not None:
            found = evaluation.measure_uncorrected("after, uncorrected")
            if found is None:
                self.checks.append(Check("correction.safetensors", "there", "gone", CheckFinding.MISMATCH))
            else:
                self.checks += comparison.measurements("after, uncorrected", report.uncorrected, found)
        self._rescan("after", classifier, images, comparison)
        if base is None:
            return
        self._rescan("before", base, images, comparison)
        before = self._compare("before", report.before, replace(evaluation, classifier=base), comparison)
        if isinstance(report, Report) and before is not None and after is not None:
            self.checks += _paired(report, before, after, comparison)
            self.checks += _agreeing(report, before, after, evaluation, comparison)

    def _rescan(self, when: str, classifier: Classifier, images: Images, comparison: Comparison) -> None:
        """Measure again the scores that search nothing, and grade the clean images again."""
        evidence = evidence_of(self.report)
        scan = evidence.scans.get(when) if evidence is not None else None
        if evidence is None or scan is None:
            return
        with self.trying(f"{when}: scan"):
            pixels = decoded(images.clean, classifier, self.accelerator, "decode", self.options.progress)
            suspect = make_suspect(classifier, pixels, self.accelerator, seed=self.report.environment.seed)
            self.checks += scan_checks(when, scan, suspect, comparison)
            if when == "before" and evidence.images is not None:
                self.checks += grade_checks(evidence.images, grade_images(pixels, suspect), comparison)

    def _compare(self, where: str, stated: Measurement | None, evaluation: Evaluator,
                 comparison: Comparison) -> Predictions | None:  # fmt: skip
        if stated is None:
            return None
        found = None
        with self.trying(where):
            found = evaluation.measure(where, broken=BROKEN)
            self.checks += comparison.measurements(where, stated, found.measurement)
            for name, one in reconstructed_of(self.report).items():
                result = getattr(one, where)
                if result is not None and name in found.measurement.triggers:
                    again = found.measurement.triggers[name]
                    self.checks += comparison.triggers(f"{where}: reconstructed {name}", result, again)
        return found

    def _triggers(self) -> Iterator[Trigger]:
        """Give the triggers of the report from their files, aimed as the report says."""
        for name, result in results_of(self.report).items():
            file = self.output.folder / "triggers" / f"{name}.safetensors"
            with self.trying(f"trigger {name}"):
                yield replace(load_trigger(file), name=name, target=result.target)


def _is_of(found: DatasetInfo, stated: DatasetInfo, *, trained: bool) -> bool:
    names = ["eval_indices_sha256", "label_map", *(["indices_sha256"] if trained else [])]
    return all(getattr(found, name) == getattr(stated, name) for name in names)


def _agreeing(
    report: Report, before: Predictions, after: Predictions, evaluation: Evaluator, comparison: Comparison
) -> Iterator[Check]:
    """Give the check of how far the cleaned model answers as the one that came."""
    if report.evidence is not None and report.evidence.agreement is not None:
        truth = evaluation.clean.labels.cpu().numpy()
        found = find_agreement(truth, before.predicted, after.predicted, evaluation.classifier.labels)
        yield comparison.rates("answers as before", report.evidence.agreement.rate, found.rate)
        if comparison.exact:
            same = CheckFinding.MATCH if report.evidence.agreement == found else CheckFinding.MISMATCH
            yield Check("classes that are answered otherwise", "as counted again",
                        "as counted again" if same is CheckFinding.MATCH else "others", same)  # fmt: skip


def _paired(report: Report, before: Predictions, after: Predictions, comparison: Comparison) -> Iterator[Check]:
    """Give the checks of what compares before and after image by image."""
    samples, stated = len(after.correct), report.defense_effectiveness_rating or {}
    known = [name for name in stated if name != "mean"]
    if set(known) <= before.hits.keys() & after.hits.keys():
        # of the known triggers, in their order: the draws of the bootstrap depend on both
        pair = (replace(state, hits={name: state.hits[name] for name in known}) for state in (before, after))
        found = ratings(*pair, seed=report.environment.seed)
        for name, one in stated.items():
            yield comparison.estimates(f"DER of {name}" if name != "mean" else "DER, mean", one, found[name], samples)
    if report.accuracy_loss is not None:
        lost = paired_difference(before.correct, after.correct)
        yield comparison.estimates("points of accuracy lost", report.accuracy_loss, lost, samples)
