"""The gate's findings as a bill of materials: CycloneDX 1.7 with a model, its card and declarations."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from huggingface_hub import constants

from hfdetox.evaluation.results import Rate
from hfdetox.evaluation.verdict import percent
from hfdetox.reporting.card_data import hub_id
from hfdetox.reporting.gate_facts import GateResult, GateVerdict
from hfdetox.reporting.taxonomies import REMEDY, TAXONOMIES

MODEL, DATASET, CLAIM, EVIDENCE, ASSESSOR = "model", "dataset", "claim-backdoor", "evidence-gate", "assessor-hfdetox"
# what no scan can show, said wherever its result stands
LIMITS: Final = (
    "No scan shows that a model has no backdoor: 'no evidence found' is what it says, with its scores' error rates.",
    "Triggers in the physical world, attacks made against these scores, and images of the attacker's are outside.",
)


def cyclonedx(found: GateResult) -> dict[str, Any]:
    """Return the bill of materials of a gate's result."""
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.7",
        "version": 1, "metadata": _metadata(found), "components": [_model(found), _dataset(found)],
        "dependencies": [{"ref": MODEL, "dependsOn": [DATASET]}, {"ref": DATASET, "dependsOn": []}],
        "declarations": _declarations(found), "definitions": {"standards": list(_standards())},
    }  # fmt: skip
    # one bill of one finding: the same model, verdict and program give the same number
    print_of = f"hfdetox:{found.name}:{found.model.weights_sha256}:{found.verdict}:{found.hfdetox_version}"
    return bill | {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, print_of)}"}


def _metadata(found: GateResult) -> dict[str, Any]:
    tool = {"type": "application", "name": "hfdetox", "version": found.hfdetox_version}
    return {"timestamp": datetime.now(UTC).isoformat(timespec="seconds"), "tools": {"components": [tool]},
            "properties": [_property("verdict", found.verdict), _property("exitStatus", found.status)]}  # fmt: skip


def _model(found: GateResult) -> dict[str, Any]:
    model, base = found.model, found.base
    component = _component(MODEL, model.id, model.revision, model.weights_sha256)
    if base is not None:
        ancestor = _component("base", base.id, base.revision, base.weights_sha256)
        component["pedigree"] = {
            "ancestors": [ancestor], "notes": "Fine-tuned by hfdetox to weaken any backdoor in its ancestor.",
        }  # fmt: skip
    return component | {"modelCard": _card(found)}


def _component(ref: str, name: str, revision: str | None, sha256: str | None) -> dict[str, Any]:
    group, _, last = name.rpartition("/")
    component: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": ref, "name": last or name}
    if group:
        component["group"] = group
    if revision is not None:
        component["version"] = revision
    if sha256 is not None:
        component["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    if hub_id(name, revision):
        component["externalReferences"] = [
            {"type": "distribution", "url": f"{constants.ENDPOINT}/{name}/tree/{revision}"}
        ]
        component["purl"] = f"pkg:huggingface/{name}@{revision}"
    return component


def _card(found: GateResult) -> dict[str, Any]:
    parameters: dict[str, Any] = {"task": "image-classification", "datasets": [{"ref": DATASET}]}
    if found.model.architecture is not None:
        parameters["modelArchitecture"] = found.model.architecture
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(found))},
        "considerations": {
            "technicalLimitations": [*LIMITS, *_errors(found)],
            "performanceTradeoffs": [reason.text for reason in found.reasons],
            "ethicalConsiderations": [{
                "name": "A backdoor makes the model answer as an attacker chooses, where the image carries a trigger.",
                "mitigationStrategy": "Scanned before use; kept out, or cleaned and measured again, where a class "
                                      "stands out.",
            }],
        },
    }  # fmt: skip


def _metrics(found: GateResult) -> Iterator[dict[str, Any]]:
    if found.accuracy is not None:
        yield _metric("accuracy", found.accuracy, "clean images")
    for name, result in found.triggers.items():
        yield _metric("attack-success-rate", result.attack_success_rate, f"images with trigger {name}")
        yield _metric("robust-accuracy", result.robust_accuracy, f"images with trigger {name}")


def _metric(kind: str, rate: Rate, images: str) -> dict[str, Any]:
    low, high = rate.interval
    return {"type": kind, "value": f"{rate.value:.6f}", "slice": f"{rate.samples} {images}",
            "confidenceInterval": {"lowerBound": f"{low:.6f}", "upperBound": f"{high:.6f}"}}  # fmt: skip


def _errors(found: GateResult) -> Iterator[str]:
    """Give the error rates of the scores together, or that they are not known."""
    for scan in filter(None, (found.rescan or found.scan,)):
        known = scan.combined
        if known is None or not known.measured or known.false_alarms is None:
            yield "The error rates of this scan were not measured."
            continue
        yield f"False alarms: {_counted(known.false_alarms)} of never-backdoored models that were not used to fix it."
        if known.found is not None:
            yield f"Found: {_counted(known.found)} of backdoored models."


def _counted(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.successes} of {rate.samples} ({percent(rate.value)}; {percent(low)} to {percent(high)})"


def _dataset(found: GateResult) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "data", "bom-ref": DATASET, "name": found.dataset,
        "data": [{"type": "dataset", "name": found.dataset}],
    }  # fmt: skip
    return component | ({"version": found.dataset_revision} if found.dataset_revision else {})


def _declarations(found: GateResult) -> dict[str, Any]:
    held = found.verdict in (GateVerdict.PASS, GateVerdict.CLEANED)
    reasons = "; ".join(reason.text for reason in found.reasons)
    claim = {
        "bom-ref": CLAIM, "target": MODEL, "reasoning": reasons,
        "predicate": "No evidence of a backdoor was found, and the policy of the gate is met.",
        "evidence" if held else "counterEvidence": [EVIDENCE],
    }  # fmt: skip
    attested = {
        "requirement": REMEDY, "claims" if held else "counterClaims": [CLAIM],
        "conformance": {"score": 1 if held else 0, "rationale": f"verdict of hfdetox gate: {found.verdict}"},
    }  # fmt: skip
    return {
        "assessors": [{"bom-ref": ASSESSOR, "thirdParty": False, "organization": {"name": "hfdetox, run by its user"}}],
        "attestations": [{"summary": f"Validated by hfdetox gate: {found.verdict}.", "assessor": ASSESSOR,
                          "map": [attested]}],
        "claims": [claim],
        "evidence": [{"bom-ref": EVIDENCE, "description": f"hfdetox {found.hfdetox_version} scanned the model, and "
                      f"verified what hfdetox had published, if it had: {reasons}"}],
    }  # fmt: skip


def _standards() -> Iterator[dict[str, Any]]:
    for taxonomy in TAXONOMIES:
        yield {
            "bom-ref": taxonomy.name, "name": taxonomy.name, "version": taxonomy.version,
            "owner": taxonomy.organization,
            "requirements": [{"bom-ref": one.id, "identifier": one.id, "title": one.name} for one in taxonomy.taxa],
        }  # fmt: skip


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": f"hfdetox:gate:{name}", "value": str(value)}
