"""`hfdetox scan`: what can be known of a model's backdoor without its trigger."""

from accelerate import Accelerator

from hfdetox.arguments import takes
from hfdetox.config_scan import ScanOptions
from hfdetox.data.load import NoDatasetError
from hfdetox.errors import RunError
from hfdetox.evaluation.evaluator import check_plausible, decoded, prepare_evaluator, settle_order
from hfdetox.evidence.cost import measuring_effort, say_cost, scan_efforts
from hfdetox.evidence.inquiry import Inquiry
from hfdetox.evidence.results import ScanReport
from hfdetox.evidence.run import make_suspect, scan_suspect
from hfdetox.evidence.thresholds import When
from hfdetox.logging import RunWarnings
from hfdetox.models.classifier import Classifier
from hfdetox.runs.pulling import pull, pull_classifier
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.triggers import parse_triggers

__all__ = ["scan"]


@takes(ScanOptions)
@accelerate_state_kept()
def scan(given: ScanOptions) -> ScanReport:
    """Look for a backdoor without its trigger: scores, and triggers reconstructed on the model and measured.

    Nothing is trained, and nothing written. Its words are `suspicious` (a class is named), `no evidence found` and
    `unknown`; none of them says that the model has no backdoor.

    Args:
        {arguments}

    Raises:
        UsageError, HubError, RunError: as `detoxify` does; but a model near chance is `unknown`.
    """
    options, known = given.plain(), parse_triggers(given.triggers)
    own = given.accelerator
    accelerator = make_accelerator(options.device, "no" if own is None else "auto", given=own)
    notes = RunWarnings()
    with accelerator.main_process_first():
        try:
            classifier, images = pull(given, options, notes.warn)
        except NoDatasetError as error:
            notes.warn(f"{error}; without images, only scores that need none are measured")
            return _blind(pull_classifier(given, options), accelerator, given, notes)
    images = settle_order(images, classifier, accelerator, notes.warn, given.progress)
    evaluation = prepare_evaluator(classifier, images.evaluation, known, accelerator, target=options.target,
                                   warn=notes.warn, progress=given.progress, also=images.info.label_map)  # fmt: skip
    efforts = scan_efforts(measuring_effort(evaluation), len(evaluation.clean), len(classifier.labels),
                           thorough=options.thorough)  # fmt: skip
    say_cost(evaluation, "the scan", *efforts, progress=given.progress)
    outcome = evaluation.measure("measure")
    try:
        check_plausible(outcome, evaluation.clean.labels, classifier.labels, notes.warn, trains=False)
    except RunError as error:
        notes.warn(str(error))
    pixels = decoded(images.clean, classifier, accelerator, "decode", given.progress)
    inquiry = Inquiry(evaluation, pixels, options.seed, thorough=options.thorough)
    when: When = "after" if options.cleaned else "before"
    found = inquiry.begin(outcome, when)
    assert found is not None
    assert found.before is not None
    return ScanReport(classifier.info, images.info, when, found.before, outcome.measurement, found.reconstructed,
                      found.images, notes.texts)  # fmt: skip


def _blind(classifier: Classifier, accelerator: Accelerator, given: ScanOptions, notes: RunWarnings) -> ScanReport:
    suspect = make_suspect(classifier, None, accelerator, seed=given.seed, progress=given.progress)
    when: When = "after" if given.cleaned else "before"
    result, _ = scan_suspect(suspect, classifier.labels, when, thorough=given.thorough)
    return ScanReport(classifier.info, None, when, result, None, {}, None, notes.texts)
