"""The gate: may this model go to production? It scans, verifies what hfdetox cleaned, and cleans only if asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hfdetox.arguments import takes
from hfdetox.config_verify import GateOptions
from hfdetox.detox import detoxify
from hfdetox.documents import read_json
from hfdetox.errors import HfdetoxError, UsageError
from hfdetox.evaluation.results import Rate, TriggerResult
from hfdetox.evaluation.verdict import Verdict, describe_loss, judge_trigger, percent
from hfdetox.evidence.results import Finding, Reconstructed, ScanResult
from hfdetox.files import write_atomically
from hfdetox.gate_policy import Policy, load_policy
from hfdetox.models.classifier import fetch_model
from hfdetox.models.weights import find_weights
from hfdetox.reporting.card_data import shown_id
from hfdetox.reporting.cyclonedx import cyclonedx
from hfdetox.reporting.gate_facts import GatedModel, GateResult, GateVerdict, Reason, Rule, decide
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.reporting.sarif import sarif
from hfdetox.runs.folder import check_output
from hfdetox.runs.integrity import made_by_hfdetox, pull_output
from hfdetox.runs.publish import comes_backdoored
from hfdetox.scanning import scan
from hfdetox.verifying import MATCH, MISMATCH, verify

PASS, CLEANED, REJECT, UNKNOWN = GateVerdict.PASS, GateVerdict.CLEANED, GateVerdict.REJECT, GateVerdict.UNKNOWN
# what may be said of a trigger for a cleaned model to pass, and for it to be refused
_GONE = (Verdict.MITIGATED, Verdict.NO_EVIDENCE)
_LEFT = (Verdict.NOT_MITIGATED, Verdict.REDIRECTED)


@takes(GateOptions)
def gate(given: GateOptions) -> GateResult:
    """Decide whether a model may be used: `pass`, `pass after cleaning`, `reject` or `unknown`, with reasons.

    It scans the model. One that hfdetox cleaned is verified first. Nothing is trained unless `clean`. Whatever goes
    wrong with the model or its images is a reason for `unknown`; nothing that is not looked at passes.

    Args:
        {arguments}

    Raises:
        UsageError: the options do not go together, or the policy cannot be read.
        RunError: a file of the result cannot be written.
    """
    policy = load_policy(given.policy)
    if policy.cleaned.signed and given.public_key is None:
        raise UsageError("the policy asks for a signature (cleaned: signed): give the key with --public-key")
    if given.clean and given.output is not None:
        check_output(Path(given.output), overwrite=False)
    deciding = _Gate(given, policy)
    # whoever reads a file of an earlier run, or of one that was killed, must not find a pass there
    open_still = Reason(Rule.UNDECIDED, UNKNOWN, "hfdetox gate has not finished: it was stopped, or is still at work")
    _write_files(given, replace(deciding.found, reasons=[open_still]))
    found = deciding.run()
    _write_files(given, found)
    return found


def _write_files(options: GateOptions, found: GateResult) -> None:
    for file, form in ((options.sarif, sarif), (options.cyclonedx, cyclonedx)):
        if file is not None:
            write_atomically(Path(file), json.dumps(form(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class _Gate:
    """One decision on the way; `found` has what is known so far."""

    def __init__(self, options: GateOptions, policy: Policy) -> None:
        self.options, self.policy = options, policy
        self.source = str(options.model)
        name = Path(self.source).resolve().name if os.path.isdir(self.source) else self.source
        images = str(options.dataset or "")
        shown = Path(images).name if Path(images).exists() else images
        self.found = GateResult(UNKNOWN, [], GatedModel(name), shown, options.dataset_revision, asdict(policy))
        self.report: Report | None = None

    def run(self) -> GateResult:
        """Return the result; every step that fails is a reason to decide nothing."""
        steps = [("the model", self._pull), ("verify", self._verify), ("scan", self._scan)]
        if not all(self._done(what, step) for what, step in steps):
            return self._decided()
        refused = [one.rule for one in self.found.reasons if one.verdict is not PASS]
        cleanable = refused and set(refused) <= {Rule.SUSPICIOUS, Rule.DELIBERATE}
        if self.options.clean and cleanable:
            # what the model was does not count against what is made of it
            self.found = replace(self.found, reasons=[])
            self._done("clean", self._clean)
        return self._decided()

    def _done(self, what: str, step: Callable[[], None]) -> bool:
        """Take a step; False, with a reason, where it could not be taken."""
        try:
            step()
        except HfdetoxError as error:
            self._add(Rule.UNDECIDED, UNKNOWN, f"{what}: {error}")
            return False
        return True

    def _add(self, rule: Rule, verdict: GateVerdict, text: str) -> None:
        self.found.reasons.append(Reason(rule, verdict, text))

    def _decided(self) -> GateResult:
        reasons = sorted(self.found.reasons, key=lambda one: [REJECT, UNKNOWN, CLEANED, PASS].index(one.verdict))
        return replace(self.found, reasons=reasons, verdict=decide(reasons))

    def _pull(self) -> None:
        """Pull the model, and see what its own files say of it."""
        options = self.options
        pulled, name = fetch_model(self.source, options.revision, options.trust_remote_code)
        config = read_json(pulled.folder / "config.json", dict[str, Any])
        named = config.get("architecture") or next(iter(config.get("architectures") or []), None)
        weights = find_weights(pulled.folder, pulled.weights).sha256
        model = GatedModel(name, pulled.revision or None, weights, named if isinstance(named, str) else None)
        self.found = replace(self.found, model=model)
        if model.revision is not None:
            # what is looked at from here on is this commit, wherever its branch goes meanwhile
            self.options, self.source = replace(options, model=model.id, revision=model.revision), model.id
        if comes_backdoored(pulled.folder):
            self._add(Rule.DELIBERATE, REJECT, "its own files say that it was backdoored on purpose")

    def _verify(self) -> None:
        """Verify a model that hfdetox wrote, and read what its report says."""
        options, revision = self.options, self.found.model.revision
        if not made_by_hfdetox(self.source, revision):
            return
        report = pull_output(self.source, revision).report
        if isinstance(report, AttackReport):
            if report.backdoored:
                self._add(Rule.DELIBERATE, REJECT, "its report says that hfdetox backdoored it on purpose")
            return
        assert isinstance(report, Report)
        self.report = report
        self.found = replace(self.found, base=report.model, triggers=_after(report))
        if report.published is not None:
            self.found = replace(self.found, accuracy=report.published.accuracy)
        if self.policy.cleaned.verify:
            local = report.dataset.revision is None and os.path.isdir(str(options.dataset))
            again = verify(self.source, revision=revision, dataset=options.dataset if local else None,
                           public_key=options.public_key, device=options.device, progress=options.progress,
                           trust_remote_code=options.trust_remote_code)  # fmt: skip
            self.found = replace(self.found, verified=again.verdict)
            if again.verdict == MISMATCH:
                wrong = ", ".join(check.what for check in again.mismatches)
                self._add(Rule.ALTERED, REJECT, f"hfdetox verify found a mismatch: {wrong}")
            elif again.verdict != MATCH:
                why = "; ".join(f"{what}: {reason}" for what, reason in again.missing.items())
                self._add(Rule.UNDECIDED, UNKNOWN, f"hfdetox verify could not count its rates again: {why}")
        for reason in _judge_report(report, PASS):
            self.found.reasons.append(reason)

    def _scan(self) -> None:
        # what was verified was cleaned; a report alone anybody can write
        found = scan(**self.options.images(), cleaned=self.found.verified == MATCH)
        images, measured = found.dataset, found.measurement
        accuracy = measured.accuracy if measured is not None else found.scan.accuracy
        self.found = replace(self.found, scan=found.scan, accuracy=accuracy, reconstructed=found.reconstructed)
        if images is not None:
            shown = shown_id(images.id, images.revision)
            self.found = replace(self.found, dataset=shown, dataset_revision=images.revision)
        if self.report is None:
            self.found = replace(self.found, triggers={name: one.before for name, one in found.reconstructed.items()})
        self.found.reasons.extend(judge_scan(found.scan, self.policy, PASS))
        self._check_accuracy(accuracy)

    def _clean(self) -> None:
        """Clean the model into the output folder, and judge what came of it."""
        options = self.options
        cleaned = detoxify(**options.cleaning(), defense=self.policy.clean.defense,
                           max_accuracy_loss=self.policy.accuracy.most_lost)  # fmt: skip
        report = cleaned.report
        evidence = report.evidence
        after = evidence.after if evidence is not None else None
        accuracy = report.after.accuracy if report.after else None
        self.found = replace(self.found, rescan=after, accuracy=accuracy, triggers=_after(report),
                             base=report.model, output=str(options.output), reconstructed=_made(report))  # fmt: skip
        self.found.reasons.extend(_judge_report(report, CLEANED))
        if after is None:
            self._add(Rule.UNDECIDED, UNKNOWN, "the cleaned model was not scanned")
        else:
            self.found.reasons.extend(judge_scan(after, self.policy, CLEANED))
        self._check_accuracy(accuracy)
        if decide(self.found.reasons) is CLEANED:
            self._add(Rule.CLEANED, CLEANED, f"cleaned into {options.output}: use that model, not {self.found.name}")

    def _check_accuracy(self, accuracy: Rate | None) -> None:
        least = self.policy.accuracy.least
        if least is None:
            return
        if accuracy is None:
            self._add(Rule.ACCURACY, UNKNOWN, f"its accuracy is not known, and {percent(least)} is asked for")
        elif accuracy.interval[0] < least:
            low, high = accuracy.interval
            verdict = REJECT if high < least else UNKNOWN
            self._add(Rule.ACCURACY, verdict, f"its accuracy is {percent(accuracy.value)} ({percent(low)} to "
                      f"{percent(high)}), and {percent(least)} is asked for")  # fmt: skip


def judge_scan(found: ScanResult, policy: Policy, good: GateVerdict) -> Iterator[Reason]:
    """Give the reasons that a scan is for a verdict, `good` where nothing speaks against the model.

    A pass needs the words `no evidence found`, enough images, and, if the policy says so, scores whose error rates
    were measured.
    """
    if found.finding == Finding.SUSPICIOUS:
        verdict = REJECT if policy.scan.suspicious == "reject" else UNKNOWN
        named = f" the class {found.label!r}" if found.label is not None else " a class"
        yield Reason(Rule.SUSPICIOUS, verdict, f"the scan suspects{named}: {found.why}")
        return
    if found.finding != Finding.NO_EVIDENCE:
        yield Reason(Rule.UNDECIDED, UNKNOWN, f"the scan cannot tell: {found.why}")
        return
    few = found.samples < policy.scan.least_images
    if few:
        yield Reason(Rule.UNDECIDED, UNKNOWN, f"only {found.samples:,} clean images were looked at, and the policy "
                     f"asks for {policy.scan.least_images:,}")  # fmt: skip
    rates = found.combined
    unmeasured = policy.scan.measured_rates and (rates is None or not rates.measured)
    if unmeasured:
        yield Reason(Rule.UNDECIDED, UNKNOWN, "no evidence found, by scores whose error rates were not measured, which "
                     "the policy asks for (scan: measured_rates)")  # fmt: skip
    if not few and not unmeasured:
        said = ""
        if rates is not None and rates.found is not None:
            said = f"; this scan finds {percent(rates.found.value)} of backdoored models"
        yield Reason(Rule.NO_EVIDENCE, good, f"no evidence found on {found.samples:,} clean images{said}")


def _judge_report(report: Report, good: GateVerdict) -> Iterator[Reason]:
    """Give the reasons that a cleaned model's report is for a verdict; none where nothing speaks against it."""
    if report.rejected:
        yield Reason(Rule.ACCURACY, REJECT, f"cleaning cost too much: {describe_loss(report.rejected)}")
    elif good is CLEANED and report.accuracy_loss is not None and report.accuracy_loss.verdict != Verdict.ACCEPTED:
        yield Reason(Rule.ACCURACY, UNKNOWN, f"what cleaning cost is not known: {describe_loss(report.accuracy_loss)}")
    for name, verdict in _verdicts(report).items():
        if verdict not in _GONE:
            left = REJECT if verdict in _LEFT else UNKNOWN
            yield Reason(Rule.LEFT, left, f"trigger {name}: {verdict}")


def _verdicts(report: Report) -> dict[str, Verdict]:
    """Return what may be said of each known and each reconstructed trigger of a cleaned model, by its name."""
    return report.verdicts | {name: judge_trigger(one.before, one.after) for name, one in _made(report).items()}


def _after(report: Report) -> dict[str, TriggerResult]:
    """Return what each known and reconstructed trigger does to a cleaned model, by its name."""
    known = report.published.triggers if report.published else {}
    return known | {name: one.after for name, one in _made(report).items() if one.after is not None}


def _made(report: Report) -> dict[str, Reconstructed]:
    return report.evidence.reconstructed if report.evidence is not None else {}
